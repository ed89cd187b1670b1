"""Indexes by which an owner's sessions are counted and listed without a look at each of them."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_index("ix_sessions_owner_expires_at", "sessions", ["owner", "expires_at"])
    op.create_index("ix_sessions_owner_updated_at", "sessions", ["owner", "updated_at"])


def downgrade() -> None:
    op.drop_index("ix_sessions_owner_updated_at", "sessions")
    op.drop_index("ix_sessions_owner_expires_at", "sessions")

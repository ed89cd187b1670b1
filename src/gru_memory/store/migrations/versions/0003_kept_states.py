"""Indexes by which a session finds what it lets go of, however many turns it has."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    kept = sa.text("state IS NOT NULL")
    op.create_index("ix_snapshots_parent", "snapshots", ["parent"])
    op.create_index(
        "ix_snapshots_kept", "snapshots", ["session_id", "number"], sqlite_where=kept, postgresql_where=kept
    )


def downgrade() -> None:
    op.drop_index("ix_snapshots_kept", "snapshots")
    op.drop_index("ix_snapshots_parent", "snapshots")

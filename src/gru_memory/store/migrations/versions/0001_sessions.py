"""Sessions and their snapshots."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("head", sa.String(64)),
        sa.Column("salt", sa.LargeBinary(16), nullable=False),
        sa.Column("keep_text", sa.Boolean, nullable=False),
        sa.Column("settings", sa.Text, nullable=False),
        sa.Column("turns", sa.Integer, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("state_bytes", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.String(64)),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("updated_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
        sa.UniqueConstraint("owner", "name", name="uq_sessions_owner_name"),
    )
    op.create_index("ix_sessions_expires_at", "sessions", ["expires_at"])
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("session_id", sa.String(32), sa.ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
        sa.Column("parent", sa.String(64)),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("turn_digest", sa.LargeBinary(16), nullable=False),
        sa.Column("user_digest", sa.LargeBinary(16), nullable=False),
        sa.Column("user_text", sa.Text),
        sa.Column("reply_text", sa.Text),
        sa.Column("turns", sa.Integer, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("state", sa.LargeBinary),
        sa.UniqueConstraint("session_id", "number", name="uq_snapshots_session_number"),
    )


def downgrade() -> None:
    op.drop_table("snapshots")
    op.drop_table("sessions")

"""The tables. `migrations/` makes them; a test checks that both say the same."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData()
_KEPT = text("state IS NOT NULL")

sessions = Table(
    "sessions",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("name", String(200), nullable=False),
    Column("version", Integer, nullable=False),
    Column("head", String(64)),
    Column("salt", LargeBinary(16), nullable=False),
    Column("keep_text", Boolean, nullable=False),
    Column("settings", Text, nullable=False),  # JSON
    Column("turns", Integer, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("state_bytes", Integer, nullable=False),
    Column("fingerprint", String(64)),
    Column("created_at", Float, nullable=False),  # seconds since 1970
    Column("updated_at", Float, nullable=False),
    Column("expires_at", Float),
    UniqueConstraint("owner", "name", name="uq_sessions_owner_name"),
    Index("ix_sessions_expires_at", "expires_at"),
    Index("ix_sessions_owner_expires_at", "owner", "expires_at"),
    Index("ix_sessions_owner_updated_at", "owner", "updated_at"),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("session_id", String(32), ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
    Column("parent", String(64)),
    Column("number", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("turn_digest", LargeBinary(16), nullable=False),
    Column("user_digest", LargeBinary(16), nullable=False),
    Column("user_text", Text),
    Column("reply_text", Text),
    Column("turns", Integer, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("state", LargeBinary),
    Column("about", Text),  # JSON, of whoever keeps conversations here
    UniqueConstraint("session_id", "number", name="uq_snapshots_session_number"),
    Index("ix_snapshots_parent", "parent"),
    Index("ix_snapshots_kept", "session_id", "number", sqlite_where=_KEPT, postgresql_where=_KEPT),
)

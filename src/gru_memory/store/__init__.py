"""Named sessions that survive restarts: conversations in SQLite or PostgreSQL."""

from .conversation import StoredConversation
from .database import default_url
from .errors import (
    LimitExceeded,
    SessionConflict,
    SessionExists,
    SessionNotFound,
    StateNotKept,
    StoreError,
    StoreUnavailable,
    TooManySessions,
)
from .records import Limits, Session, Snapshot, TurnRecord
from .sessions import SessionStore

__all__ = [
    "LimitExceeded",
    "Limits",
    "Session",
    "SessionConflict",
    "SessionExists",
    "SessionNotFound",
    "SessionStore",
    "Snapshot",
    "StateNotKept",
    "StoreError",
    "StoreUnavailable",
    "StoredConversation",
    "TooManySessions",
    "TurnRecord",
    "default_url",
]

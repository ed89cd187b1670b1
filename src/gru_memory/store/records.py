"""What a store hands out: values, no rows that change behind one's back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

EDIT = "edit"  # ids of states that were edited by hand begin with it


def is_edit(snapshot_id: str) -> bool:
    """Whether this is the id of a state that was edited by hand."""
    return str(snapshot_id).startswith(f"{EDIT}_")


@dataclass(frozen=True)
class Limits:
    """How much a store takes. None is without bound."""

    max_state_bytes: int = field(default=4 << 20, metadata={"help": "bytes of one state"})
    max_text_bytes: int = field(default=256 << 10, metadata={"help": "bytes of one message that is kept"})
    max_states: int = field(
        default=64, metadata={"help": "states a session keeps; of more, those that were continued go first"}
    )
    max_turns: int = field(default=5000, metadata={"help": "turns a session remembers the text or digest of"})
    max_sessions: int | None = field(default=None, metadata={"help": "sessions of one owner"})
    ttl_seconds: float | None = field(default=None, metadata={"help": "life of a session after its last turn"})

    def __post_init__(self) -> None:
        for name in ("max_state_bytes", "max_text_bytes", "max_states", "max_turns", "max_sessions", "ttl_seconds"):
            value = getattr(self, name)
            if value is None and name in ("max_sessions", "ttl_seconds"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}: it must be a finite number above 0")


@dataclass(frozen=True)
class Session:
    """A named conversation, as it was when it was read. Times are seconds since 1970.

    Attributes:
        id: of the store, never reused; "" until the first `commit` of a session that was only begun.
        owner: whose it is; "" where there is one user.
        name: unique among the owner's.
        version: goes up with every change; `commit` refuses an outdated one.
        head: id of the snapshot from which the conversation goes on; None before the first turn.
        keep_text: whether messages are kept too, or their digests alone.
        settings: of whoever keeps conversations here, as plain values.
        turns, tokens: that memory has taken in, at the head.
        state_bytes: of the head.
        fingerprint: of the model and memory that made the head.
    """

    id: str
    owner: str
    name: str
    version: int
    head: str | None
    keep_text: bool
    settings: dict[str, Any]
    turns: int
    tokens: int
    state_bytes: int
    fingerprint: str | None
    created_at: float
    updated_at: float
    expires_at: float | None
    salt: bytes = field(repr=False, default=b"")


@dataclass(frozen=True)
class TurnRecord:
    """One turn of a session's tree: what was said (where text is kept) and after what."""

    id: str
    parent: str | None
    number: int  # order of writing within the session, from 1
    created_at: float
    turn_digest: bytes  # of message and reply, keyed by the session
    user_digest: bytes  # of the message alone
    has_state: bool
    user: str | None
    reply: str | None
    about: dict[str, Any] | None = None  # what `commit` was told to keep with it

    @property
    def is_edit(self) -> bool:
        """Whether memory was edited by hand after the turn: a record with such a state stands in the place of the turn's own."""
        return is_edit(self.id)


@dataclass(frozen=True)
class Snapshot:
    """The conversation after one response. It never changes; it may be gone, once many newer ones exist."""

    id: str
    session: Session
    parent: str | None
    created_at: float
    turns: int
    tokens: int
    state: bytes  # what `Conversation.to_bytes` returned

"""Errors as OpenAI's clients know them."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from ..conversation import TurnTooLong
from ..store import (
    LimitExceeded,
    SessionConflict,
    SessionExists,
    SessionNotFound,
    StateNotKept,
    StoreUnavailable,
    TooManySessions,
)
from .engine import Overloaded, ShuttingDown, TimedOut


class ApiError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


NOT_FOUND = "there is nothing of this name or id"  # the same for what never was and for what is somebody else's

_MAKE_ROOM = (
    "GET /v1/memory lists them, DELETE /v1/memory/{session} removes one. A response without a conversation makes one, too, "
    "unless `store` is false, which keeps nothing. What there is can be gone on from as before"
)

_KNOWN: tuple[tuple[type[BaseException], int, str], ...] = (
    (StateNotKept, 404, "state_not_kept"),
    (Overloaded, 429, "overloaded"),
    (ShuttingDown, 503, "shutting_down"),
    (TimedOut, 503, "timed_out"),
    (SessionConflict, 409, "conversation_locked"),
    (SessionExists, 409, "name_taken"),
    (LimitExceeded, 413, "too_large"),
    (TurnTooLong, 400, "context_length_exceeded"),
    (StoreUnavailable, 503, "store_unavailable"),
    (ValueError, 400, "invalid_value"),
    (TemplateError, 400, "invalid_value"),  # a chat template that refuses a system prompt, for example
    (FloatingPointError, 500, "memory_not_finite"),
)


def as_api_error(error: BaseException) -> ApiError:
    """What to tell a client about an exception; of what nobody expected, nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SessionNotFound) and not isinstance(error, StateNotKept):
        return ApiError(404, NOT_FOUND, "not_found")
    if isinstance(error, StoreUnavailable):  # the reason names the database
        return ApiError(503, "the session store cannot be reached: try again later", "store_unavailable")
    if isinstance(error, TooManySessions):
        return ApiError(413, f"{error}. {_MAKE_ROOM}", "too_many_sessions")
    for kind, status, code in _KNOWN:
        if isinstance(error, kind):
            return ApiError(status, str(error), code)
    return ApiError(500, "something went wrong here; the log says what", "internal_error")

"""What can go wrong with a store. Whatever it is, nothing was written then."""

from __future__ import annotations


class StoreError(Exception):
    """The base of all of these."""


class SessionNotFound(StoreError):
    """No such session or snapshot, or it is somebody else's: the two cannot be told apart."""


class StateNotKept(SessionNotFound):
    """The turn is known, but no state to go on from is kept after it, or not any more."""


class SessionExists(StoreError):
    """The name is taken."""


class SessionConflict(StoreError):
    """Somebody else wrote to the session in the meantime."""


class LimitExceeded(StoreError):
    """More than `Limits` allow."""


class TooManySessions(LimitExceeded):
    """The owner has as many sessions as allowed. None is removed to make room."""


class StoreUnavailable(StoreError):
    """The database does not answer, is locked or full. Trying again later may work."""

"""Messages recognised without being kept: digests keyed by the session, so that those of two sessions do not compare."""

from __future__ import annotations

from hashlib import blake2b

DIGEST_BYTES = 16


def user_digest(salt: bytes, user: str) -> bytes:
    """Of a user's message; white space around it does not count, as clients trim it."""
    return blake2b(user.strip().encode(), key=salt, digest_size=DIGEST_BYTES).digest()


def turn_digest(salt: bytes, user: str, reply: str | None) -> bytes:
    """Of a message with its reply; no reply is not an empty one."""
    return _digest(salt, user_digest(salt, user), b"" if reply is None else b"\0" + reply.strip().encode())


def told_digest(salt: bytes, user: bytes) -> bytes:
    """`turn_digest` of a message without a reply, from its `user_digest`."""
    return _digest(salt, user, b"")


def _digest(salt: bytes, user: bytes, reply: bytes) -> bytes:
    return blake2b(user + reply, key=salt, digest_size=DIGEST_BYTES).digest()

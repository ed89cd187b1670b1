"""Messages recognised without being kept: digests keyed by the session, so that those of two sessions do not compare."""

from __future__ import annotations

from hashlib import blake2b

DIGEST_BYTES = 16


def user_digest(salt: bytes, user: str) -> bytes:
    """Of a user's message; white space around it does not count, as clients trim it."""
    return blake2b(user.strip().encode(), key=salt, digest_size=DIGEST_BYTES).digest()


def turn_digest(salt: bytes, user: str, reply: str | None) -> bytes:
    """Of a message with its reply; no reply is not an empty one."""
    digest = blake2b(user_digest(salt, user), key=salt, digest_size=DIGEST_BYTES)
    digest.update(b"" if reply is None else b"\0" + reply.strip().encode())
    return digest.digest()

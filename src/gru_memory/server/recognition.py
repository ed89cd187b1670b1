"""Clients that send their history again: which part of it memory has taken in already, and where to go on from."""

from __future__ import annotations

from collections.abc import Sequence

from ..store import TurnRecord
from ..store.digests import turn_digest, user_digest
from ..store.sessions import path_to

Turn = tuple[str, "str | None"]


def where_to_go_on(
    records: Sequence[TurnRecord], head: str | None, salt: bytes, history: Sequence[Turn], message: str, linear: bool
) -> tuple[str | None, list[Turn]]:
    """The snapshot to start from (None: an empty memory), and the turns to take in before the new message.

    - A message that is sent again, after the same history, takes the place of the turn it began ("regenerate").
    - Otherwise, in a chat of its own the conversation goes on from the turn that the longest known beginning of the history
      ends with, wherever that is in the session's tree: so an edited message begins a branch. A history that is a
      stretch of the session, its beginning cut off, is recognised too.
    - A `linear` session, one memory for several chats, always goes on from its head; turns it knows are left out.
    - A history of which nothing is known is taken in after the head.

    Args:
        records: every turn of the session.
        head: where the session is.
        salt: of the session's digests.
        history: the turns the client sent, oldest first.
        message: the new one.
        linear: whether the session is one memory for several chats.
    """
    digests = [turn_digest(salt, *turn) for turn in history]
    chain = path_to(records, head)
    if chain and chain[-1].user_digest == user_digest(salt, message):
        before = chain[:-1]
        same = len(before) >= len(digests) and _ends_with(before, digests)
        parent = chain[-1].parent
        if same and (digests or not before) and (parent is None or _has_state(records, parent)):
            return parent, []
    if not history:
        return head, []
    if linear:
        known = {record.turn_digest for record in chain}
        return head, [turn for turn, digest in zip(history, digests, strict=True) if digest not in known]
    best, start = 0, head
    for record in records:
        if not record.has_state:
            continue
        path = path_to(records, record.id)
        for length in range(min(len(path), len(digests)), best - 1, -1):
            # the newest of equals wins, and the head before all others
            better = length > best or (length == best and start != head)
            if length and better and _ends_with(path, digests[:length]):
                best, start = length, record.id
                break
        if record.id == head and _ends_with(path, digests[:best]):
            start = head
    return start, list(history[best:])


def _ends_with(path: Sequence[TurnRecord], digests: Sequence[bytes]) -> bool:
    if not digests:
        return True
    if len(digests) > len(path) or path[-1].turn_digest != digests[-1]:
        return False
    return [record.turn_digest for record in path[len(path) - len(digests) :]] == list(digests)


def _has_state(records: Sequence[TurnRecord], snapshot_id: str) -> bool:
    return any(record.id == snapshot_id and record.has_state for record in records)

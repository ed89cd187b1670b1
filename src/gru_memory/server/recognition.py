"""Clients that send their history again: which part of it memory has taken in already, and where to go on from."""

from __future__ import annotations

from collections.abc import Sequence

from ..store import TurnRecord
from ..store.digests import told_digest, turn_digest, user_digest
from ..store.queries import path_to

Turn = tuple[str, "str | None"]


def where_to_go_on(
    records: Sequence[TurnRecord], head: str | None, salt: bytes, history: Sequence[Turn], message: str, linear: bool
) -> tuple[str | None, list[Turn]]:
    """The snapshot to start from (None: an empty memory), and the turns to take in before the new message.

    - A message that is sent again, after the same history, takes the place of the turn it began ("regenerate").
    - Otherwise, in a chat of its own the conversation goes on from the turn that the longest known beginning of the history
      ends with, wherever that is in the session's tree: so an edited message begins a branch. A history that is a
      stretch of the session, its beginning cut off, is recognised too.
    - A turn without a reply may be missing in the history: memory was told it, and the chat does not know.
    - Where the turn to go on from has no state, the turns since the last one that has are taken in again.
    - What was edited by hand stays edited: nothing goes on from before the last edit that led to the head. There the
      conversation goes on from its head instead, with what is not known of the history, and the message said once more.
    - A `linear` session, one memory for several chats, always goes on from its head, and so does a history whose
      beginning is not known; turns that led to the head are left out. A message without a history begins a chat there, and
      takes the place of nothing.

    Args:
        records: every turn of the session, in the order of writing.
        head: where the session is.
        salt: of the session's digests.
        history: the turns the client sent, oldest first.
        message: the new one.
        linear: whether the session is one memory for several chats.
    """
    digests = [turn_digest(salt, *turn) for turn in history]
    texts = dict(zip(digests, history, strict=True))
    chain, known = path_to(records, head), _known(records, salt, digests)
    path, length = None, 0
    if chain and chain[-1].user_digest == user_digest(salt, message) and (digests or not linear):
        before = chain[:-1]
        # A message that was said once more after an edit of its own turn stands after that.
        known_to = before[:-1] if _is_said_once_more(chain[-1], before[-1:]) else before
        same = known[known_to[-1].id] >> len(digests) & 1 if known_to else not digests and chain[0].parent is None
        if same and (digests or all(_is_told(record, salt) for record in before)):
            path, length = before, len(digests)
    if path is None and records and not linear:
        # the newest of equals wins, one with a state before the others, and the head before all
        best = max(records, key=lambda r: (known[r.id].bit_length(), r.id == head, r.has_state, r.number))
        if length := known[best.id].bit_length() - 1:
            path = path_to(records, best.id)
    edited = max((place for place, record in enumerate(chain, start=1) if record.is_edit), default=0)
    if path is not None and len(path) < edited and path == chain[: len(path)]:
        path = None
    if path is not None:
        stated = max((place for place, record in enumerate(path, start=1) if record.has_state), default=0)
        if stated or not path or path[0].parent is None:  # else its beginning is not in the store any more
            again = [texts.get(record.turn_digest, (record.user, record.reply)) for record in path[stated:]]
            start = path[stated - 1].id if stated else None
            return start, [*(turn for turn in again if turn[0] is not None), *history[length:]]
    led_here = {record.turn_digest for record in chain}
    return head, [turn for turn, digest in zip(history, digests, strict=True) if digest not in led_here]


def _known(records: Sequence[TurnRecord], salt: bytes, digests: Sequence[bytes]) -> dict[str, int]:
    """For every turn: bit n says whether the path to it ends with the first n turns of the history."""
    places: dict[bytes, int] = {}
    for place, digest in enumerate(digests, start=1):
        places[digest] = places.get(digest, 0) | 1 << place
    known: dict[str, int] = {}
    by_id = {record.id: record for record in records}
    for record in records:
        before, parent = known.get(record.parent, 1), by_id.get(record.parent)
        if parent is not None and _is_said_once_more(record, [parent]):
            before |= known.get(parent.parent, 1)
        known[record.id] = 1 | before << 1 & places.get(record.turn_digest, 0) | before * _is_told(record, salt)
    return known


def _is_said_once_more(record: TurnRecord, before: Sequence[TurnRecord]) -> bool:
    """Whether a turn repeats the message of the one before it, after which memory was edited by hand."""
    return any(turn.is_edit and not record.is_edit and turn.user_digest == record.user_digest for turn in before)


def _is_told(record: TurnRecord, salt: bytes) -> bool:
    """Whether the turn has no reply; by its digests, as its text may not be kept."""
    return record.turn_digest == told_digest(salt, record.user_digest)

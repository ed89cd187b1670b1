"""What evaluations of conversations share: the parts of a session, states along it, and questions asked of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..data.sessions import Session, Turn
from ..state import AS_KEPT, MemoryState
from .batched import BatchReader, Pair


def told(session: Session) -> list[Pair]:
    """The turns that tell or correct."""
    return [(turn.user, turn.assistant) for turn in session.turns if turn.kind in ("tell", "correct")]


def talked(session: Session) -> list[Pair]:
    """The turns about other things."""
    return [(turn.user, turn.assistant) for turn in session.turns if turn.kind == "talk"]


def asked(session: Session, at_most: int | None = None) -> list[Turn]:
    """The questions, in their order."""
    return [turn for turn in session.turns if turn.kind == "ask"][:at_most]


def as_kept(states: MemoryState) -> MemoryState:
    """States after being stored and read back: what a conversation that goes on another day starts from."""
    return MemoryState.from_bytes(states.to_bytes(AS_KEPT)).to(states.tokens.device)


def kept_bytes(states: MemoryState) -> int:
    """Bytes of one conversation as it is stored."""
    return len(states.select(0).to_bytes(AS_KEPT))


def read_along(
    reader: BatchReader, states: MemoryState, talk: Sequence[Sequence[Pair]], stops: Sequence[int]
) -> Iterator[tuple[int, MemoryState]]:
    """Read the same number of turns into every row, and give the states after each of the `stops` (numbers of turns)."""
    done = 0
    for stop in sorted(set(stops)):
        while done < stop:
            states = reader.read(states, [turns[done] for turns in talk])
            done += 1
        yield stop, states


def ask_all(
    reader: BatchReader,
    states: MemoryState,
    rows: Sequence[int],
    questions: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Greedy replies to questions, each asked on its own of the row it names; `states` do not change."""
    replies: list[str] = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        found, _ = reader.ask(states.select(list(rows[part])), questions[part], max_new_tokens=max_new_tokens)
        replies += found
    return replies

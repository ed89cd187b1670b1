"""A memory that repeats everything it was told, word for word: evaluations are checked against what they must then find."""

from __future__ import annotations

from gru_memory.evaluation.batched import BatchReader
from gru_memory.state import MemoryState


def repeat_what_was_told(monkeypatch) -> dict[tuple, list[str]]:
    """Let `BatchReader.ask` reply with the user messages that its row's state has read. Returns them by state."""
    told: dict[tuple, list[str]] = {}
    read = BatchReader.read

    def spy(self, states, turns):
        result = read(self, states, turns)
        for row, (user, _) in enumerate(turns):
            told[key(result.select(row))] = [*told.get(key(states.select(row)), []), user]
        return result

    def ask(self, states, questions, **generation):
        return [" ".join(told.get(key(states.select(row)), [])) for row in range(len(questions))], states

    monkeypatch.setattr(BatchReader, "read", spy)
    monkeypatch.setattr(BatchReader, "ask", ask)
    return told


def key(state: MemoryState) -> tuple:
    """A state of one conversation, as it is kept."""
    return tuple(round(x, 3) for x in state.sites["top"]["slots"].half().flatten().tolist())

"""Isolation: conversations that share a batch answer as each does alone, and never with what another one was told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.facts import FactGenerator
from ..drawing import PALETTE, panels, save
from ..limits import at_least
from ..state import MemoryState
from .asking import ask_all, asked, talked, told
from .batched import BatchReader
from .outcome import Evaluation, Figure, Outcome, Progress, labels_of
from .scoring import contains


@dataclass(frozen=True)
class IsolationConfig:
    """Who shares a batch."""

    facts: int = field(default=3, metadata={"help": "facts told in a session"})
    between: int = field(default=4, metadata={"help": "unrelated turns between telling and asking"})
    rows: tuple[int, ...] = field(default=(2, 8), metadata={"help": "conversations in a batch"})
    seed: int = field(default=1234, metadata={"help": "of the sessions"})
    max_new_tokens: int = field(default=24, metadata={"help": "longest reply, in tokens"})

    def __post_init__(self) -> None:
        at_least(self, 1, "facts", "max_new_tokens")
        at_least(self, 0, "between")
        at_least(self, 2, "rows")


@torch.no_grad()
def evaluate_isolation(
    model: Any, tokenizer: Any, config: IsolationConfig, progress: Progress | None = None
) -> Outcome:
    """Tell and ask every session alone, then in batches of several sizes in which conversations differ in length.

    A reply *leaks* if a value stands in it that another row was told, and its own was not; sums and products are
    grouped otherwise in a batch, so states agree to rounding.
    """
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    generator = FactGenerator(config.seed, values="test")
    # Row i has i turns of talk less, so that rows end, and hold, at different places.
    sessions = [generator.session(config.facts, max(0, config.between - i % 3)) for i in range(max(config.rows))]
    turns = [told(session) + talked(session) for session in sessions]
    questions = [[turn.user for turn in asked(session)] for session in sessions]
    values = [[turn.value for turn in asked(session)] for session in sessions]
    reader = BatchReader(model, tokenizer)
    tell("batches", 0, len(config.rows) + 1)
    states = [reader.read_all(reader.start(1), [one]) for one in turns]
    alone = [
        ask_all(reader, state, [0] * len(asks), asks, 1, config.max_new_tokens)
        for state, asks in zip(states, questions, strict=True)
    ]
    rows = [_row(1, alone, alone, values, 0.0)]
    for done, count in enumerate(config.rows, start=1):
        tell("batches", done, len(config.rows) + 1)
        together = reader.read_all(reader.start(count), turns[:count])
        replies: list[list[str]] = [[] for _ in range(count)]
        for number in range(config.facts):  # one question of every row at a time: all rows are in every batch
            asks = [questions[row][number] for row in range(count)]
            for row, reply in enumerate(ask_all(reader, together, range(count), asks, count, config.max_new_tokens)):
                replies[row].append(reply)
        apart = max(_distance(together.select(row), states[row]) for row in range(count))
        rows.append(_row(count, replies, alone[:count], values[:count], apart))
    tell("batches", len(config.rows) + 1, len(config.rows) + 1)
    return Outcome(
        config, rows, time.perf_counter() - began, {"alone": alone, "questions": questions, "values": values}
    )


def _row(
    count: int, replies: Sequence[list[str]], alone: Sequence[list[str]], values: Sequence[list[str]], apart: float
) -> dict[str, Any]:
    every = [(row, at) for row, found in enumerate(replies) for at in range(len(found))]
    leaks = [any(contains(replies[row][at], value) for value in _of_others(values, row)) for row, at in every]
    return {
        "batch": count,
        "right": sum(contains(replies[row][at], values[row][at]) for row, at in every) / len(every),
        "same": sum(replies[row][at] == alone[row][at] for row, at in every) / len(every),
        "leaks": sum(leaks) / len(every),
        "apart": apart,
        "questions": len(every),
    }


def _of_others(values: Sequence[list[str]], row: int) -> list[str]:
    own = {value.lower() for value in values[row]}
    return [v for other, found in enumerate(values) if other != row for v in found if v.lower() not in own]


def _distance(one: MemoryState, other: MemoryState) -> float:
    """Largest difference of any number in the slots."""
    pairs = [(kept["slots"], other.sites[name]["slots"]) for name, kept in one.sites.items() if "slots" in kept]
    return max(float((a - b).abs().max()) for a, b in pairs)


def plot_isolation(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Replies that are right, that are the same as alone, and that leak, by the size of the batch."""
    figure, (axes,) = panels(1, width=7, height=4)
    batches = labels_of(runs, "batch")
    bars = (("right", "right"), ("same", "same as alone"), ("leaks", "another row's value"))
    for at, (key, name) in enumerate(bars):
        shares = [[100 * row[key] for run in runs for row in run["rows"] if row["batch"] == batch] for batch in batches]
        places = [place + (at - 1) * 0.27 for place in range(len(batches))]
        axes.bar(places, [sum(s) / len(s) for s in shares], 0.25, color=PALETTE[(0, 2, 5)[at]], label=name)
    axes.set_xticks(range(len(batches)), ["alone" if batch == 1 else f"batch of {batch}" for batch in batches])
    axes.set(ylim=(0, 103), ylabel="replies (%)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    axes.set_title(title, loc="left", fontweight="bold")
    save(figure, path)


ISOLATION = Evaluation(
    name="isolation",
    about="Conversations that share a batch, against each alone.",
    config=IsolationConfig,
    run=evaluate_isolation,
    labels={"batch": "rows in the batch"},
    figures={
        "right": Figure("recalled", "share"),
        "same": Figure("same reply as alone", "share"),
        "leaks": Figure("another row's value", "share"),
        "apart": Figure("largest difference of H", "number"),
        "questions": Figure("questions", "count"),
    },
    plot=plot_isolation,
)

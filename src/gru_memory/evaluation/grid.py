"""Recall over a grid: how many facts, how many turns ago."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.facts import FactGenerator
from ..drawing import MARKERS, PALETTE, panels, save
from ..limits import at_least
from .asking import as_kept, ask_all, asked, read_along, talked, told
from .batched import BatchReader
from .outcome import Evaluation, Figure, Outcome, Progress, curve, labels_of
from .scoring import contains, wilson_interval


@dataclass(frozen=True)
class GridConfig:
    """Rows and columns of the grid."""

    facts: tuple[int, ...] = field(default=(1, 3, 5, 10, 20), metadata={"help": "facts told in a session"})
    turns: tuple[int, ...] = field(default=(0, 10, 50, 100), metadata={"help": "unrelated turns before asking"})
    sessions: int = field(default=8, metadata={"help": "sessions; each has its own facts and memory"})
    questions: int = field(default=5, metadata={"help": "facts asked for in a session, at most"})
    seed: int = field(default=1234, metadata={"help": "of the sessions"})
    max_new_tokens: int = field(default=24, metadata={"help": "longest reply, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "sessions, or questions, at once"})

    def __post_init__(self) -> None:
        at_least(self, 1, "facts", "sessions", "questions", "max_new_tokens", "batch_size")
        at_least(self, 0, "turns")


@torch.no_grad()
def evaluate_grid(model: Any, tokenizer: Any, config: GridConfig, progress: Progress | None = None) -> Outcome:
    """For every number of facts: tell them, read on, and at every stop ask for the same ones of what would be kept then."""
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    reader, rows, replies = BatchReader(model, tokenizer), [], []
    total = len(config.facts) * len(config.turns)
    for number, facts in enumerate(config.facts):
        generator = FactGenerator(config.seed, values="test")
        sessions = [generator.session(facts, max(config.turns)) for _ in range(config.sessions)]
        flags: dict[int, list[bool]] = {}
        for start in range(0, len(sessions), config.batch_size):
            part = sessions[start : start + config.batch_size]
            states = reader.read_all(reader.start(len(part)), [told(session) for session in part])
            asks = [(row, turn) for row, session in enumerate(part) for turn in asked(session, config.questions)]
            for turns, now in read_along(reader, states, [talked(session) for session in part], config.turns):
                tell("cells", number * len(config.turns) + len(flags), total)
                found = ask_all(
                    reader, as_kept(now), [row for row, _ in asks], [turn.user for _, turn in asks],
                    config.batch_size, config.max_new_tokens,
                )  # fmt: skip
                for (row, turn), reply in zip(asks, found, strict=True):
                    flags.setdefault(turns, []).append(contains(reply, turn.value))
                    about = {"facts": facts, "turns": turns, "session": start + row}
                    replies.append({**about, "question": turn.user, "value": turn.value, "reply": reply})
        for turns, right in flags.items():
            low, high = wilson_interval(sum(right), len(right))
            shares = {"recall": sum(right) / len(right), "low": low, "high": high}
            rows.append({"facts": facts, "turns": turns, **shares, "questions": len(right)})
    tell("cells", total, total)
    return Outcome(config, rows, time.perf_counter() - began, {"replies": replies})


def plot_grid(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """The grid in colours with its figures, and as curves against turns."""
    figure, (left, right) = panels(2, width=5.6, height=4.4)
    facts, turns = labels_of(runs, "facts"), sorted(labels_of(runs, "turns"))
    cells = [curve(runs, "turns", "recall", facts=count)[1] for count in facts]
    left.grid(False)
    image = left.imshow([[100 * x for x in row] for row in cells], vmin=0, vmax=100, cmap="cividis", aspect="auto")
    for y, row in enumerate(cells):
        for x, share in enumerate(row):
            left.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color="white" if share < 0.6 else "black")
    left.set_xticks(range(len(turns)), turns)
    left.set_yticks(range(len(facts)), facts)
    left.set(xlabel="unrelated turns since the facts were told", ylabel="facts told")
    figure.colorbar(image, ax=left, label="replies that contain the value (%)")
    for number, count in enumerate(facts):
        x, mean, low, high = curve(runs, "turns", "recall", facts=count)
        style = {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}
        right.plot(x, [100 * y for y in mean], label=f"{count} fact{'s' if count > 1 else ''}", **style)
        right.fill_between(
            x, [100 * y for y in low], [100 * y for y in high], color=style["color"], alpha=0.15, linewidth=0
        )
    right.set(
        xlabel="unrelated turns since the facts were told", ylabel="replies that contain the value (%)", ylim=(-3, 103)
    )
    right.legend(fontsize=8, frameon=False)
    left.set_title(title, loc="left", fontweight="bold")
    save(figure, path)


GRID = Evaluation(
    name="grid",
    about="Recall by the number of facts told and of turns since.",
    config=GridConfig,
    run=evaluate_grid,
    labels={"facts": "facts", "turns": "turns between"},
    figures={
        "recall": Figure("recalled", "share"),
        "low": Figure("95% from", "share"),
        "high": Figure("to", "share"),
        "questions": Figure("questions", "count"),
    },
    plot=plot_grid,
    interval=("recall", "questions", "low", "high"),
)

"""Drift: how large the state grows over a long text, and what that does to the loss, with and without decay and bound."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..drawing import MARKERS, PALETTE, panels, save
from ..limits import at_least
from ..state import MemoryState
from .outcome import Evaluation, Figure, Outcome, Progress, curve, labels_of
from .texts import book_paths, stream, window_of
from .variants import accumulating, memory_sites, same_blocks, with_decay

MEMORY, KEEPING = "memory", "memory, no decay"
ADDING, ADDING_KEEPING = "naive accumulator", "naive accumulator, no decay"


@dataclass(frozen=True)
class DriftConfig:
    """How much is read."""

    books: str | None = field(default=None, metadata={"help": "folder of plain-text books (.txt)"})
    tokens: int = field(default=100_000, metadata={"help": "tokens of books, one after the other"})
    window: int = field(default=512, metadata={"help": "tokens that attention sees; a window is a turn"})
    points: int = field(default=10, metadata={"help": "stretches of equal length that figures are given of"})
    seed: int = field(default=1234, metadata={"help": "of the order of the books"})

    def __post_init__(self) -> None:
        at_least(self, 1, "points")
        at_least(self, 2, "tokens", "window")
        book_paths(self.books)


@dataclass
class _Course:
    """One variant on its way: its state, and what was measured in every window."""

    change: Callable[[], contextlib.AbstractContextManager]
    state: MemoryState
    size: list[float | None] = field(default_factory=list)
    largest: list[float | None] = field(default_factory=list)
    loss: list[float | None] = field(default_factory=list)
    burst: bool = False  # a number of it became infinite: there is no going on


@torch.no_grad()
def evaluate_drift(model: Any, tokenizer: Any, config: DriftConfig, progress: Progress | None = None) -> Outcome:
    """Read books window by window with four memories: as it is, without decay, and both without the bound of convex writes.

    The memory's write is a mixture, H~ + z (C - H~), so no number of its state can leave [-1, 1]; the naive accumulator adds,
    H~ + z C, at the same addresses, with the same strengths and contents. Every window costs five forward passes, of which the
    blocks run in the first alone where the memory is at the top.
    """
    memory_sites(model)
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    ids, names = stream(config.books, tokenizer, config.tokens, config.seed)
    pieces = [piece for piece in ids.to(model.device).split(window_of(model, config.window)) if len(piece) > 1]
    courses = {name: _Course(change, model.initial_memory_state(1)) for name, change in _variants(model).items()}
    base: list[float] = []
    for number, piece in enumerate(pieces):
        tell("windows", number, len(pieces))
        with same_blocks(model):
            with model.disable_memory():
                base.append(_loss(model(input_ids=piece[None], use_cache=False).logits, piece))
            for course in courses.values():
                _step(model, course, piece)
    tell("windows", len(pieces), len(pieces))

    ends = [sum(len(piece) for piece in pieces[: i + 1]) for i in range(len(pieces))]
    groups = torch.tensor_split(torch.arange(len(pieces)), min(config.points, len(pieces)))
    rows = []
    for name, course in courses.items():
        for group in (group.tolist() for group in groups):
            loss = _mean([course.loss[i] for i in group])
            rows.append(
                {
                    "memory": name,
                    "tokens": ends[group[-1]],
                    "size": _mean([course.size[i] for i in group]),
                    "largest": None if course.largest[group[-1]] is None else max(course.largest[i] for i in group),
                    "loss": loss,
                    "added": None if loss is None else loss - _mean([base[i] for i in group]),
                }
            )
    curves = {name: {"size": course.size, "loss": course.loss} for name, course in courses.items()}
    details = {"books": names, "ends": ends, "base_loss": base, "windows": curves}
    return Outcome(config, rows, time.perf_counter() - began, details)


def _variants(model: Any) -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    @contextlib.contextmanager
    def both():
        with with_decay(model, 1.0), accumulating(model):
            yield

    return {
        MEMORY: contextlib.nullcontext,
        KEEPING: lambda: with_decay(model, 1.0),
        ADDING: lambda: accumulating(model),
        ADDING_KEEPING: both,
    }


def _step(model: Any, course: _Course, piece: Tensor) -> None:
    """Read one window with one memory."""
    if not course.burst:
        with course.change():
            output = model(input_ids=piece[None], memory_state=course.state, use_cache=False)
        loss = _loss(output.logits, piece)
        course.state = output.memory_state
        course.burst = not (course.state.is_finite() and math.isfinite(loss))
    if course.burst:
        for figures in (course.size, course.largest, course.loss):
            figures.append(None)
        return
    slots = torch.cat([kept["slots"].flatten() for kept in course.state.sites.values() if "slots" in kept]).double()
    course.size.append(slots.pow(2).mean().sqrt().item())
    course.largest.append(slots.abs().max().item())
    course.loss.append(loss)


def _loss(logits: Tensor, piece: Tensor) -> float:
    """Nats a token; logits (1, T, V), piece (T,)."""
    return F.cross_entropy(logits[0, :-1].float(), piece[1:]).item()


def _mean(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else math.fsum(values) / len(values)


def plot_drift(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Size of the state, its largest number, and what the memory adds to the base model's loss, against tokens read."""
    figure, axes = panels(3, width=4.6, height=4.2)
    wanted = ("size", "largest", "added")
    for number, name in enumerate(labels_of(runs, "memory")):
        keeps = name in (KEEPING, ADDING_KEEPING)  # lines that may lie on each other
        style = {"color": PALETTE[number], "marker": MARKERS[number], "linestyle": "--" if keeps else "-"}
        size = {"markersize": 8, "markerfacecolor": "none"} if keeps else {"markersize": 4}
        for place, what in zip(axes, wanted, strict=True):
            x, mean, low, high = curve(runs, "tokens", what, memory=name)
            place.plot(x, mean, label=name, **style, **size)
            place.fill_between(x, low, high, color=PALETTE[number], alpha=0.15, linewidth=0)
    names = (
        "root mean square of the slots' numbers",
        "largest of the slots' numbers",
        "loss above the base model's (nats a token)",
    )
    for place, name in zip(axes, names, strict=True):
        place.set(xlabel="tokens of books read", ylabel=name)
    for place in axes[:2]:
        place.set_ylim(bottom=0)
    axes[1].axhline(1, color="0.3", linestyle=":", linewidth=1.2)
    axes[1].annotate(
        "bound of the memory",
        (0.99, 1),
        (0, 8),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
    )
    axes[2].axhline(0, color="0.3", linestyle=":", linewidth=1.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    axes[0].set_title(title, loc="left", fontweight="bold")
    save(figure, path)


DRIFT = Evaluation(
    name="drift",
    about="Size of the state and loss over a long text, against an accumulator that adds what it writes.",
    config=DriftConfig,
    run=evaluate_drift,
    labels={"memory": "memory", "tokens": "tokens read"},
    figures={
        "size": Figure("size of H (rms)", "number"),
        "largest": Figure("largest number", "number"),
        "loss": Figure("loss (nats)", "nats"),
        "added": Figure("above base", "change"),
    },
    plot=plot_drift,
)

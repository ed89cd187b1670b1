"""Fading: how long what was told can be recalled, and how much of its trace is left, against the law lambda^n."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..data.facts import FactGenerator
from ..drawing import MARKERS, PALETTE, panels, save
from ..limits import at_least
from ..state import MemoryState
from .asking import as_kept, ask_all, asked, read_along, talked, told
from .batched import BatchReader
from .outcome import Evaluation, Figure, Outcome, Progress, curve, labels_of
from .scoring import contains
from .variants import half_life, memory_sites, with_decay


@dataclass(frozen=True)
class FadingConfig:
    """Which decays, and when is looked."""

    decays: tuple[float, ...] = field(
        default=(0.9, 0.97, 0.99, 0.998), metadata={"help": "kept at a tick of the clock"}
    )
    turns: tuple[int, ...] = field(default=(0, 2, 5, 10, 20, 50), metadata={"help": "unrelated turns before asking"})
    facts: int = field(default=3, metadata={"help": "facts told in a session"})
    sessions: int = field(default=8, metadata={"help": "sessions; each has its own facts and memory"})
    seed: int = field(default=1234, metadata={"help": "of the sessions"})
    max_new_tokens: int = field(default=24, metadata={"help": "longest reply, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "sessions, or questions, at once"})

    def __post_init__(self) -> None:
        at_least(self, 1, "facts", "sessions", "max_new_tokens", "batch_size")
        at_least(self, 0, "turns", "decays")
        if any(not 0 < decay <= 1 for decay in self.decays):
            raise ValueError(f"decays are {self.decays}: each must be above 0 and at most 1")


@torch.no_grad()
def evaluate_fading(model: Any, tokenizer: Any, config: FadingConfig, progress: Progress | None = None) -> Outcome:
    """Tell facts, then read unrelated turns under every decay; now and then ask, and measure the trace.

    The trace of what was told is what would be missing from the slots had they been empty when the talk began, along the
    content they had then: exactly the part of it that is left where the recurrence is linear (`mingru` at the top). What a
    tick keeps of it is the law; the talk also writes over it.
    """
    memory_sites(model)
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    generator = FactGenerator(config.seed, values="test")
    sessions = [generator.session(config.facts, max(config.turns)) for _ in range(config.sessions)]
    reader, rows, replies = BatchReader(model, tokenizer), [], []
    for number, decay in enumerate(config.decays):
        tell("decays", number, len(config.decays))
        with with_decay(model, decay):
            gathered: dict[int, dict[str, list[float]]] = {}
            for start in range(0, len(sessions), config.batch_size):
                batch = sessions[start : start + config.batch_size]
                _follow(reader, batch, config, decay, gathered, replies)
        for turns, found in gathered.items():
            means = {name: sum(values) / len(values) for name, values in found.items()}
            rows.append({"decay": decay, "turns": turns, **means, "questions": len(found["recall"])})
    tell("decays", len(config.decays), len(config.decays))
    details = {
        "decay_every": sorted({site.decay_every for site in memory_sites(model).values()}),
        "half_life_ticks": {str(decay): half_life(decay) for decay in config.decays},
        "replies": replies,
    }
    return Outcome(config, rows, time.perf_counter() - began, details)


def _follow(
    reader: BatchReader,
    sessions: Sequence[Any],
    config: FadingConfig,
    decay: float,
    gathered: dict[int, dict[str, list[float]]],
    replies: list[dict[str, Any]],
) -> None:
    """One batch of sessions under one decay; adds to `gathered` and `replies`."""
    count = len(sessions)
    begun = reader.read_all(reader.start(count), [told(session) for session in sessions])
    both = MemoryState.cat([begun, emptied(begun)])  # the same talk is read into both halves
    talk = [talked(session) for session in sessions] * 2
    questions = [(row, turn) for row, session in enumerate(sessions) for turn in asked(session)]
    for turns, states in read_along(reader, both, talk, config.turns):
        with_trace, without = states.select(list(range(count))), states.select(list(range(count, 2 * count)))
        ticks = ticks_between(reader.model, begun, with_trace)  # (B,)
        at = gathered.setdefault(turns, {name: [] for name in ("recall", "strength", "silent", "law")})
        at["strength"] += trace_left(begun, with_trace, without).tolist()
        silent = MemoryState.cat([begun.select(row).decay(float(n)) for row, n in enumerate(ticks)])
        at["silent"] += trace_left(begun, silent, None).tolist()
        at["law"] += [decay ** float(n) for n in ticks]
        answers = ask_all(
            reader, as_kept(with_trace), [row for row, _ in questions], [turn.user for _, turn in questions],
            config.batch_size, config.max_new_tokens,
        )  # fmt: skip
        for (_, turn), answer in zip(questions, answers, strict=True):
            at["recall"].append(float(contains(answer, turn.value)))
            replies.append(
                {"decay": decay, "turns": turns, "question": turn.user, "value": turn.value, "reply": answer}
            )


def emptied(states: MemoryState) -> MemoryState:
    """The same conversations with nothing in any slot."""
    sites = {
        name: {**kept, "slots": torch.zeros_like(kept["slots"])} if "slots" in kept else kept
        for name, kept in states.sites.items()
    }
    return replace(states, sites=sites)


def trace_left(begun: MemoryState, now: MemoryState, without: MemoryState | None) -> Tensor:
    """(B,) how much of the slots of `begun` is left: <now - without, begun> / <begun, begun>, over all sites."""
    part, whole = 0.0, 0.0
    for name, kept in begun.sites.items():
        if "slots" in kept:
            first = kept["slots"].double().flatten(1)
            left = now.sites[name]["slots"].double().flatten(1)
            if without is not None:
                left = left - without.sites[name]["slots"].double().flatten(1)
            part, whole = part + (left * first).sum(1), whole + (first * first).sum(1)
    return part / whole.clamp_min(1e-12)


def ticks_between(model: Any, before: MemoryState, after: MemoryState) -> Tensor:
    """(B,) ticks of the clock from one state to a later one of the same conversations."""
    every = next(iter(memory_sites(model).values())).decay_every
    return after.tokens - before.tokens if every == "token" else after.turns - before.turns


def plot_fading(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Recall, and strength of the trace with the law drawn over it, against turns."""
    figure, (left, right) = panels(2, width=5.6, height=4.4)
    clock = "/".join(runs[0]["details"]["decay_every"])
    for number, decay in enumerate(labels_of(runs, "decay")):
        colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        x, mean, low, high = curve(runs, "turns", "recall", decay=decay)
        ticks = runs[0]["details"]["half_life_ticks"][str(decay)]
        name = f"{decay:g} a {clock} (half-life {ticks:.3g})" if decay < 1 else "1 (no decay)"
        left.plot(x, [100 * y for y in mean], color=colour, marker=marker, label=name)
        left.fill_between(x, [100 * y for y in low], [100 * y for y in high], color=colour, alpha=0.15, linewidth=0)
        x, law, *_ = curve(runs, "turns", "law", decay=decay)
        if clock == "turn":
            x = [step * max(x) / 200 for step in range(201)]
            law = [decay**turns for turns in x]
        right.plot(x, law, color=colour, linewidth=1.2)
        x, silent, *_ = curve(runs, "turns", "silent", decay=decay)
        right.plot(x, silent, color=colour, marker=marker, markerfacecolor="none", linestyle="none", markersize=8)
        x, mean, *_ = curve(runs, "turns", "strength", decay=decay)
        right.plot(x, mean, color=colour, marker=marker, linestyle="none", markersize=5)
    left.set(
        xlabel="unrelated turns since the facts were told", ylabel="replies that contain the value (%)", ylim=(-3, 103)
    )
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    decays = {"title": "kept at a tick", "ncols": 4, "fontsize": 8, "title_fontsize": 8, "frameon": False}
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", **decays)
    right.set(
        xlabel="unrelated turns since the facts were told", ylabel="share of the trace that is left", ylim=(-0.03, 1.03)
    )
    right.plot([], [], color="0.3", label=r"$\lambda^n$")
    right.plot(
        [], [], color="0.3", marker="o", markerfacecolor="none", linestyle="none", markersize=8, label="time alone"
    )
    right.plot([], [], color="0.3", marker="o", linestyle="none", markersize=5, label="with the talk read")
    right.legend(fontsize=8, frameon=False)
    left.set_title(title, loc="left", fontweight="bold")
    save(figure, path)


FADING = Evaluation(
    name="fading",
    about="Recall and strength of the trace against turns, for several decays; lambda^n is the law of the clock.",
    config=FadingConfig,
    run=evaluate_fading,
    labels={"decay": "kept at a tick", "turns": "turns between"},
    figures={
        "recall": Figure("recalled", "share"),
        "law": Figure("lambda^n", "share"),
        "silent": Figure("trace, time alone", "share"),
        "strength": Figure("trace, with the talk", "share"),
        "questions": Figure("questions", "count"),
    },
    plot=plot_fading,
)

"""Figures: recall as bars, writes as a heat map. Needs matplotlib (the `plots` extra)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from .drawing import figure_class as _figure_class
from .drawing import save as _save
from .evaluation.recall import RecallResult
from .inspection import Trace

COLOURS = {"memory": "#0072B2", "full_history": "#E69F00", "floor": "#999999"}
NAMES = {
    "memory": "memory, none of it in the context",
    "full_history": "base model, everything in the context",
    "floor": "base model, question alone",
}
MAX_TOKENS = 90  # columns of a heat map that can still be read
MAX_SLOTS = 256
LEAST_WRITTEN = 0.02  # share of a slot that one token has to be written to, for the slot to be shown


def plot_recall(results: Sequence[RecallResult], path: str | Path, title: str = "Recall") -> None:
    """Horizontal bars of right answers, one group a row of the table, with 95% Wilson intervals."""
    figure_class = _figure_class()
    if not results:
        raise ValueError("there is no result to plot")
    methods = [name for name in COLOURS if any(getattr(result, name) is not None for result in results)]
    height = 0.8 / len(methods)
    figure = figure_class(figsize=(9, 1.6 + 0.22 * len(results) * (len(methods) + 0.6)), layout="constrained")
    axes = figure.add_subplot()
    for number, method in enumerate(methods):
        rates = [(row, getattr(result, method)) for row, result in enumerate(results)]
        rates = [(row + (number - (len(methods) - 1) / 2) * height, rate) for row, rate in rates if rate is not None]
        places = [place for place, _ in rates]
        shares = [100 * rate.share for _, rate in rates]
        whiskers = [
            [max(0.0, 100 * (rate.share - rate.low)) for _, rate in rates],
            [max(0.0, 100 * (rate.high - rate.share)) for _, rate in rates],
        ]
        axes.barh(places, shares, height * 0.92, color=COLOURS[method], label=NAMES[method])
        axes.errorbar(shares, places, xerr=whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        for place, rate in rates:
            axes.text(100 * rate.high + 1, place, f"{100 * rate.share:.0f}%", va="center", fontsize=8)
    axes.set_yticks(range(len(results)), [_wrapped(result) for result in results])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlim(0, 109)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("replies that contain the value asked for (%), with 95% intervals")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(methods), frameon=False, fontsize=9)
    _save(figure, path)


def plot_writes(trace: Trace, path: str | Path, turns: Collection[int] | None = None) -> None:
    """Heat map of write strength times address: tokens across, slots that are written to (grouped by head) down.

    Args:
        trace: from `inspection.trace`.
        path: the PNG (or any format that matplotlib knows by its suffix).
        turns: numbers of the turns to show (-1: the system prompt); None for all. The first 90 tokens are shown, and as
            many heads as have 256 slots.
    """
    figure_class = _figure_class()
    shown = [i for i, turn in enumerate(trace.turns) if turns is None or turn in turns]
    if not shown:
        raise ValueError(f"the trace has no token in turns {turns}: it has {sorted(set(trace.turns))}")
    shown = shown[:MAX_TOKENS]
    all_heads, slots = trace.address.shape[1:]
    heads = min(all_heads, max(1, MAX_SLOTS // slots))
    writes = (trace.strength[shown].unsqueeze(-1) * trace.address[shown])[:, :heads]  # (T, N, S)
    used = writes.amax(dim=0) > LEAST_WRITTEN  # (N, S)
    rows = [writes[:, head, used[head]].T for head in range(heads)]
    image = torch.cat(rows) if any(map(len, rows)) else writes.new_zeros(1, len(shown))
    borders = [0, *torch.tensor([len(part) for part in rows]).cumsum(0).tolist()]
    size = (2 + 0.19 * len(shown), 2.4 + max(3.0, 0.045 * len(image)))
    figure = figure_class(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(image.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(shown)), [_token_label(trace.tokens[i]) for i in shown], rotation=90, fontsize=8)
    middles = [(first + last - 1) / 2 for first, last in zip(borders, borders[1:])]
    axes.set_yticks(middles, [f"head {head}" for head in range(heads)] if all_heads > 1 else [""])
    axes.tick_params(length=0)
    for border in borders[1:-1]:
        axes.axhline(border - 0.5, color="0.75", linewidth=0.6)
    starts = [n for n, i in enumerate(shown) if n == 0 or trace.turns[i] != trace.turns[shown[n - 1]]]
    for n in starts:
        if n:
            axes.axvline(n - 0.5, color=COLOURS["full_history"], linewidth=1.5)
        axes.annotate(
            _turn_label(trace.turns[shown[n]]), (n - 0.4, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", fontsize=9,
        )  # fmt: skip
    each = f"{slots} slots a head" if all_heads > 1 else f"{slots} slots"
    axes.set_ylabel(f"those of {each} that are written to")
    of = "" if heads == all_heads else f" ({heads} of {all_heads} heads)"
    axes.set_title(f"Where each token is written{of}", loc="left", fontweight="bold", pad=20)
    figure.colorbar(drawn, ax=axes, label="strength × address", fraction=0.03, pad=0.01)
    _save(figure, path)


def _wrapped(result: RecallResult) -> str:
    first, second, *rest = result.config.label.split(", ")
    return f"{first}, {second}\n{', '.join(rest)}"


def _turn_label(number: int) -> str:
    return "system prompt" if number < 0 else f"turn {number + 1}"


def _token_label(text: str) -> str:
    shown = text.replace("\n", "\\n").replace("$", r"\$").strip(" ")
    return shown if shown else "␣"

"""The rows of a benchmark as a picture. Needs matplotlib (the `plots` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..plots import COLOURS, _figure_class, _save
from .measure import Row, ratio
from .report import AGAINST, against

TITLES = {
    "scan": "recurrence",
    "growth": "training pass of the recurrence",
    "decode": "decoding",
    "prefill": "taking in a prompt",
    "training": "a step of training",
    "conversation": "a turn",
    "gpt2": "decoding, GPT-2",
    "floor": "what the machine allows",
    "gpu": "recurrence on a GPU",
}


def plot_rows(rows: Sequence[Row], path: str | Path) -> None:
    """One panel a benchmark: bars of time in times of its base case, or lines against a size."""
    names = [name for name in TITLES if any(row.benchmark == name for row in rows)]
    if not names:
        raise ValueError("there is nothing to plot: run a benchmark first")
    counts = {name: len(_bars(name, rows)) for name in names}
    heights = [max(2.4, 0.9 + 0.24 * counts[name]) for name in names]
    figure = _figure_class()(figsize=(10, sum(heights)), layout="constrained")
    panels = figure.subplots(len(names), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, name in zip(panels, names):
        part = [row for row in rows if row.benchmark == name]
        if name == "conversation":
            _lines(axes, part, "turn")
        elif name == "growth":
            _growth(axes, part)
        else:
            _draw_bars(axes, name, rows)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _bars(name: str, rows: Sequence[Row]) -> list[tuple[str, float, float, float]]:
    found = []
    for row in rows:
        base = against(row, rows) if row.benchmark == name and not row.left_out else None
        if base is not None and base is not row:
            setting = ", ".join(
                f"{value}" if isinstance(value, str) else f"{key} {value}" for key, value in row.setting.items()
            )
            found.append((f"{row.case}  ({setting})", *ratio(row, base)))
    return found


def _draw_bars(axes, name: str, rows: Sequence[Row]) -> None:
    bars = _bars(name, rows)
    places = range(len(bars))
    middles = [middle for _, middle, _, _ in bars]
    whiskers = [[max(0.0, m - low) for _, m, low, _ in bars], [max(0.0, high - m) for _, m, _, high in bars]]
    axes.barh(places, middles, 0.7, color=COLOURS["memory"])
    axes.errorbar(middles, places, xerr=whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    axes.set_yticks(places, [label for label, *_ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    if max(middles, default=1) > 5 or min(middles, default=1) < 0.2:
        axes.set_xscale("log")
    for place, (_, middle, _, high) in zip(places, bars):
        axes.annotate(f"{middle:.3g}", (high, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.margins(x=0.12, y=0.01)
    axes.set_title(f"{TITLES[name]}: time in times of {_against(name)}", loc="left", fontsize=10, fontweight="bold")


def _lines(axes, rows: Sequence[Row], size: str) -> None:
    for case in dict.fromkeys(row.case for row in rows):
        part = [row for row in rows if row.case == case and not row.left_out]
        axes.plot([row.setting[size] for row in part], [row.median for row in part], marker="o", label=case)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(size)
    axes.set_ylabel("seconds")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{TITLES[rows[0].benchmark]}: seconds", loc="left", fontsize=10, fontweight="bold")


def _growth(axes, rows: Sequence[Row]) -> None:
    for cell, style in (("gru", "-"), ("mingru", "--")):
        for axis in dict.fromkeys(row.setting["axis"] for row in rows):
            part = [row for row in rows if row.case == cell and row.setting["axis"] == axis]
            first = part[0] if part else None
            if first is not None:
                grown = [row.setting[axis] / first.setting[axis] for row in part]
                axes.plot(
                    grown, [row.median / first.median for row in part], style, marker="o", label=f"{cell}, {axis}"
                )
    axes.plot([1, 64], [1, 64], color="grey", linewidth=0.8, label="in proportion")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("size, in times of the smallest")
    axes.set_ylabel("time, likewise")
    axes.legend(frameon=False, fontsize=8, ncols=3)
    axes.set_title(f"{TITLES['growth']}: growth", loc="left", fontsize=10, fontweight="bold")


def _against(name: str) -> str:
    cases = AGAINST[name]
    return " or ".join(f"“{case}”" for case in ((cases,) if isinstance(cases, str) else cases))

"""The rows of a benchmark as a picture. Needs matplotlib (the `plots` extra)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..drawing import MARKERS, PALETTE, figure_class, save
from .measure import Row, ratio
from .report import AGAINST, against

TITLES = {
    "scan": "recurrence",
    "growth": "training pass of the recurrence",
    "decode": "decoding",
    "prefill": "taking in a prompt",
    "training": "a step of training",
    "conversation": "a turn",
    "prefix": "a batch of turns",
    "gpt2": "decoding, GPT-2",
    "floor": "what the machine allows",
    "gpu": "recurrence on a GPU",
}


def _median(row: Row) -> float:
    return row.median


def plot_rows(rows: Sequence[Row], path: str | Path) -> None:
    """A band a benchmark: bars in times of its base case, or lines of time and of bytes against a size."""
    names = [name for name in TITLES if any(row.benchmark == name for row in rows)]
    if not names:
        raise ValueError("there is nothing to plot: run a benchmark first")
    bands: list[tuple[float, str, list[Callable[[Any], None]]]] = []
    for name in names:
        part = [row for row in rows if row.benchmark == name]
        if name == "conversation":
            bytes_kept = partial(_lines, rows=part, size="turn", what="bytes kept", of=lambda row: row.kept_bytes)
            bands.append((3.2, TITLES[name], [partial(_lines, rows=part, size="turn", what="seconds"), bytes_kept]))
        elif name == "growth":
            memory = partial(_growth, rows=part, what="peak memory", of=lambda row: row.peak_bytes)
            bands.append((3.6, f"{TITLES[name]}: growth", [partial(_growth, rows=part, what="time"), memory]))
        else:
            bars = _bars(name, rows)
            title = f"{TITLES[name]}: time in times of {_against(name)}"
            bands.append((max(1.6, 0.9 + 0.2 * len(bars)), title, [partial(_draw_bars, bars=bars)]))
        if name == "prefill":
            peaks = _bars(name, rows, of=lambda row: row.peak_bytes)
            title = f"{TITLES[name]}: peak memory in times of {_against(name)}"
            bands.append((max(1.6, 0.9 + 0.2 * len(peaks)), title, [partial(_draw_bars, bars=peaks)]))
    heights = [height for height, _, _ in bands]
    figure = figure_class()(figsize=(11, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(bands), 1, squeeze=False, height_ratios=heights)[:, 0]
    for band, (_, title, draws) in zip(parts, bands):
        band.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        for axes, draw in zip(band.subplots(1, len(draws), squeeze=False)[0], draws):
            draw(axes)
            axes.xaxis.label.set_fontsize(9)
            axes.yaxis.label.set_fontsize(9)
            axes.spines[["top", "right"]].set_visible(False)
            if len(draws) > 1:
                axes.tick_params(labelsize=8)
        if len(draws) > 1:  # the lines of both are the same
            handles, labels = axes.get_legend_handles_labels()
            band.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, handlelength=3)
    save(figure, path)


def _bars(
    name: str, rows: Sequence[Row], of: Callable[[Row], float | None] | None = None
) -> list[tuple[str, float, float, float]]:
    """(label, ratio, its lowest, its highest) of each case to the one it is shown in times of: of time, or of the bytes `of`."""
    found = []
    for row in rows:
        base = against(row, rows) if row.benchmark == name and not row.left_out else None
        if base is None or base is row:
            continue
        setting = ", ".join(f"{value}" if isinstance(value, str) else f"{key} {value}"
                            for key, value in row.setting.items() if not (name == "gpu" and key == "device"))  # fmt: skip
        if of is None:
            found.append((f"{row.case}  ({setting})", *ratio(row, base)))
        elif of(row) and of(base):
            found.append((f"{row.case}  ({setting}, {of(row) / 1e6:,.1f} MB)", *[of(row) / of(base)] * 3))
    return found


def _draw_bars(axes, bars: Sequence[tuple[str, float, float, float]]) -> None:
    places = range(len(bars))
    middles = [middle for _, middle, _, _ in bars]
    whiskers = [[max(0.0, m - low) for _, m, low, _ in bars], [max(0.0, high - m) for _, m, _, high in bars]]
    axes.barh(places, middles, 0.7, color=PALETTE[0])
    axes.errorbar(middles, places, xerr=whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    axes.set_yticks(places, [label for label, *_ in bars], fontsize=7)
    axes.tick_params(axis="x", labelsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    if max(middles, default=1) > 5 or min(middles, default=1) < 0.2:
        axes.set_xscale("log")
    for place, (_, middle, _, high) in zip(places, bars):
        axes.annotate(
            f"{middle:.3g}", (high, place), (4, 0), textcoords="offset points", va="center", fontsize=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    axes.margins(x=0.12, y=0.01)


def _lines(axes, rows: Sequence[Row], size: str, what: str, of: Callable[[Row], float | None] = _median) -> None:
    for number, case in enumerate(dict.fromkeys(row.case for row in rows)):
        part = [row for row in rows if row.case == case and not row.left_out and of(row)]
        axes.plot(
            [row.setting[size] for row in part], [of(row) for row in part], marker=MARKERS[number], color=PALETTE[number],
            label=case,
        )  # fmt: skip
    sizes = sorted({row.setting[size] for row in rows})
    axes.set_xscale("log")
    if of is _median:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{value:,}" for value in sizes])
    axes.minorticks_off()
    axes.set_xlabel(size)
    axes.set_ylabel(what)


def _growth(axes, rows: Sequence[Row], what: str, of: Callable[[Row], float | None] = _median) -> None:
    axes.plot([1, 64], [1, 64], color="grey", linewidth=0.8, label="in proportion")
    for cell, style in (("gru", "-"), ("mingru", "--")):
        for number, axis in enumerate(dict.fromkeys(row.setting["axis"] for row in rows)):
            part = [row for row in rows if row.case == cell and row.setting["axis"] == axis and of(row)]
            if part:
                grown = [row.setting[axis] / part[0].setting[axis] for row in part]
                axes.plot(
                    grown, [of(row) / of(part[0]) for row in part], style, marker=MARKERS[number], markersize=4,
                    color=PALETTE[number], label=f"{cell}, {axis}",
                )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("size, in times of the smallest")
    axes.set_ylabel(f"{what}, likewise")


def _against(name: str) -> str:
    cases = AGAINST[name]
    return " or ".join(f"“{case}”" for case in ((cases,) if isinstance(cases, str) else cases))

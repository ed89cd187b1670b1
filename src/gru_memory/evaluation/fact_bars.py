"""Bars of shares of replies by the number of facts that were told before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..drawing import panels, save
from .outcome import labels_of
from .scoring import wilson_interval


def plot_by_facts(
    runs: Sequence[dict[str, Any]], bars: dict[str, tuple[str, str]], ylabel: str, path: Any, title: str
) -> None:
    """Three bars for every number of facts, over the questions of all runs, with 95% Wilson intervals.

    bars: figure of a row, which is a share of its `questions` -> name and colour.
    """
    figure, (axes,) = panels(1, width=7.5, height=4.2)
    facts = labels_of(runs, "facts")
    for at, (key, (name, colour)) in enumerate(bars.items()):
        for place, told in enumerate(facts):
            rows = [row for run in runs for row in run["rows"] if row["facts"] == told]
            total = sum(row["questions"] for row in rows)
            hits = round(sum(row[key] * row["questions"] for row in rows))
            low, high = wilson_interval(hits, total)
            x, share = place + (at - 1) * 0.27, hits / total
            axes.bar(x, 100 * share, 0.25, color=colour, label=name if place == 0 else None)
            whiskers = [[100 * max(0.0, share - low)], [100 * max(0.0, high - share)]]
            axes.errorbar([x], [100 * share], yerr=whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    axes.set_xticks(range(len(facts)), ["nothing told" if n == 0 else f"{n} facts told" for n in facts])
    axes.set(ylim=(0, 105), ylabel=ylabel)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    axes.set_title(title, loc="left", fontweight="bold")
    save(figure, path)

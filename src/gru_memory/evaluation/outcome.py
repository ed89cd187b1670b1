"""One form for every evaluation: what it takes, what it gives, how its table reads and how it is drawn.

An evaluation is a file of its own that ends in an `Evaluation`; `catalogue.py` lists them all. The command line makes a
command of each, with an option for every field of its settings; the page of results reads what the commands wrote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import Enum
from typing import Any

from .scoring import wilson_interval

Progress = Callable[[str, int, int], None]  # (what is being done, done, in all)
Row = dict[str, Any]  # labels and figures of one line of a table


@dataclass(frozen=True)
class Figure:
    """A column of numbers: its heading, and how one of them is written.

    With `shown` False it is in the JSON alone; with `measured` False it is somebody else's and has no spread over our runs.
    """

    title: str
    form: str = "number"  # or one of FORMS
    shown: bool = True
    measured: bool = True

    def text(self, value: float | None) -> str:
        return "" if value is None else FORMS[self.form](value)


FORMS: dict[str, Callable[[float], str]] = {
    "share": lambda x: f"{100 * x:.1f}%",
    "nats": lambda x: f"{x:.4f}",
    "change": lambda x: f"{x:+.4f}",
    "points": lambda x: f"{100 * x:+.1f}",
    "number": lambda x: f"{x:.3g}",
    "count": lambda x: f"{x:,.0f}",
    "seconds": lambda x: f"{x:.2f} s",
    "bytes": lambda x: f"{x / 1000:,.1f} KB" if x < 1e6 else f"{x / 1e6:,.1f} MB",
}


@dataclass
class Outcome:
    """What one run of an evaluation found, with one seed.

    Attributes:
        config: the settings, a dataclass or a dict.
        rows: lines of the table, each with the labels and the figures of its `Evaluation`.
        seconds: what it took.
        details: further findings (every reply, curves, matrices), as JSON knows them.
    """

    config: Any
    rows: list[Row]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        config = asdict(self.config) if is_dataclass(self.config) else self.config
        return {"config": config, "seconds": round(self.seconds, 1), "rows": self.rows, "details": self.details}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """How the rows of an evaluation read as a table.

    Attributes:
        name: of its command, its JSON file and its picture.
        about: what it answers, one sentence.
        labels: keys of a row that say what the line is about, with their headings.
        figures: keys of a row that were measured.
        suffix: of its picture.
        interval: keys of a share, of how many it is a share of, and of the ends of its 95% Wilson interval: over several runs
            that is the interval of all their questions together.
    """

    name: str
    about: str
    labels: dict[str, str]
    figures: dict[str, Figure]
    suffix: str = ".png"
    interval: tuple[str, str, str, str] | None = None


class Needs(Enum):
    """What an evaluation is given: a model with a trained memory, a base model to train memories for, or no model at all."""

    MEMORY, MODEL, NOTHING = "memory", "model", "nothing"


@dataclass(frozen=True, kw_only=True)
class Evaluation(Columns):
    """An evaluation as the command line and the page of results know it.

    Attributes:
        config: a frozen dataclass whose fields carry their help, one of them `seed`.
        run: (model, tokenizer, config, progress) -> Outcome; model and tokenizer are None where it needs nothing.
        plot: (results as JSON, one a seed; path; title) -> None.
        needs: what it is given.
    """

    config: type
    run: Callable[[Any, Any, Any, Progress | None], Outcome]
    plot: Callable[[Sequence[dict[str, Any]], Any, str], None]
    needs: Needs = Needs.MEMORY


@dataclass(frozen=True)
class Spread:
    """A figure over runs with different seeds."""

    mean: float
    deviation: float | None  # standard deviation between the runs; None for a single one
    runs: int  # that have it
    missing: int = 0  # runs that do not

    @classmethod
    def of(cls, values: Sequence[float], missing: int = 0) -> Spread:
        mean, count = math.fsum(values) / len(values), len(values)
        if count == 1:
            return cls(mean, None, 1, missing)
        return cls(mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (count - 1)), count, missing)


def spread(runs: Sequence[dict[str, Any]], evaluation: Columns) -> list[tuple[Row, dict[str, Spread | None]]]:
    """Lines of a table over all runs: labels, and for every figure its spread (None where no run has it)."""
    gathered: dict[tuple, list[Row]] = {}
    for row in (row for run in runs for row in run["rows"]):
        gathered.setdefault(tuple(row.get(label) for label in evaluation.labels), []).append(row)
    lines = []
    for labels, rows in gathered.items():
        values = {name: [row[name] for row in rows if row.get(name) is not None] for name in evaluation.figures}
        spreads = {name: Spread.of(found, len(rows) - len(found)) if found else None for name, found in values.items()}
        if evaluation.interval:
            spreads |= _pooled(rows, *evaluation.interval)
        lines.append((dict(zip(evaluation.labels, labels, strict=True)), spreads))
    return lines


def _pooled(rows: Sequence[Row], share: str, count: str, low: str, high: str) -> dict[str, Spread]:
    """The ends of the interval of what all runs asked."""
    right, asked = sum(round(row[share] * row[count]) for row in rows), sum(row[count] for row in rows)
    return {end: Spread(x, None, len(rows)) for end, x in zip((low, high), wilson_interval(right, asked), strict=True)}


def table(runs: Sequence[dict[str, Any]], evaluation: Columns) -> tuple[list[str], list[list[str]]]:
    """Headings and cells as text; with several runs figures read "mean ± standard deviation"."""
    lines = spread(runs, evaluation)
    shown = [name for name, figure in evaluation.figures.items() if figure.shown]
    used = [name for name in shown if any(spreads[name] for _, spreads in lines)]
    headings = [*evaluation.labels.values(), *(evaluation.figures[name].title for name in used)]
    cells = []
    for labels, spreads in lines:
        texts = [
            "" if value is None else f"{value:,}" if isinstance(value, int) else str(value) for value in labels.values()
        ]
        cells.append([*texts, *(_with_spread(evaluation.figures[name], spreads[name]) for name in used)])
    return headings, cells


def curve(
    runs: Sequence[dict[str, Any]], x: str, y: str, **wanted: Any
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Points for a plot: x, and mean, least and greatest y over the runs, of the rows that have the `wanted` labels."""
    points: dict[float, list[float]] = {}
    for row in (row for run in runs for row in run["rows"]):
        if row.get(y) is not None and all(row.get(name) == value for name, value in wanted.items()):
            points.setdefault(row[x], []).append(row[y])
    order = sorted(points)
    means = [math.fsum(points[at]) / len(points[at]) for at in order]
    return order, means, [min(points[at]) for at in order], [max(points[at]) for at in order]


def labels_of(runs: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """The different values of a label, in the order of the rows."""
    return list(dict.fromkeys(row[name] for run in runs for row in run["rows"]))


def _with_spread(figure: Figure, found: Spread | None) -> str:
    if found is None:
        return ""
    some = f" ({found.runs} of {found.runs + found.missing} runs)" if found.missing else ""
    if found.deviation is None or not figure.measured or (found.deviation == 0 and figure.form in ("count", "bytes")):
        return figure.text(found.mean) + some
    deviation = figure.text(found.deviation).lstrip("+").removesuffix("%").removesuffix(" s")
    return f"{figure.text(found.mean)} ± {deviation}{some}"

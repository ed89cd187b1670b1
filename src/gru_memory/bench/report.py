"""What the rows say: ratios against the case that each benchmark measures by, targets, exponents, JSON."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..evaluation.report import environment
from ..whole_files import write_whole
from .measure import Plan, Row, ratio

# The case that the others of a benchmark, or of a setting of it, are shown in times of.
AGAINST: dict[str, str | tuple[str, ...]] = {
    "scan": "loop around nn.GRUCell",
    "decode": "no memory",
    "prefill": "no memory",
    "gpt2": "no memory",
    "training": "top site, cached, mingru",
    "conversation": "memory",
    "prefix": "prefix fed",
    "floor": "floor",
    "gpu": ("gru, reference", "places, step by step", "no memory"),
}


@dataclass(frozen=True)
class Target:
    """Time (or bytes kept) of `case` in times of `against` is to be at most `limit`, under one setting."""

    what: str
    benchmark: str
    setting: Mapping[str, Any]
    case: str
    against: str
    limit: float
    against_setting: Mapping[str, Any] | None = None
    of_bytes: bool = False


_REAL = {"model": "SmolLM2-135M"}  # a quick round decides nothing
_ON_GPU = {"batch": 8, "tokens": 2048, "pass": "forward"}


def _scan(what: str, backward: bool, case: str, against: str, limit: float) -> Target:
    setting = {"batch": 1, "tokens": 512, "pass": "forward + backward" if backward else "forward"}
    return Target(f"{what}, {setting['pass']}", "scan", setting, case, against, limit)


TARGETS = (
    *(
        Target(f"decode, {case}", "decode", {**_REAL, "batch": 1}, case, "no memory", limit)
        for case, limit in (
            ("top site, gru", 1 / 0.98),
            ("three sites, gru", 1 / 0.95),
            ("top site, mingru", 1 / 0.98),
            ("three sites, mingru", 1 / 0.95),
        )
    ),
    *(
        Target(f"prefill of 512 tokens, {case}", "prefill", {**_REAL, "batch": 1, "tokens": 512}, case, "no memory", limit)
        for case, limit in (
            ("top site, gru", 1.03),
            ("three sites, gru", 1.08),
            ("top site, mingru", 1.02),
            ("three sites, mingru", 1.05),
        )
    ),
    _scan("gru against a loop around nn.GRUCell", False, "gru, compiled", "loop around nn.GRUCell", 1 / 5),
    _scan("gru against a loop around nn.GRUCell", True, "gru, compiled", "loop around nn.GRUCell", 1 / 6),
    _scan("mingru against its step-by-step form", False, "mingru, compiled", "mingru, reference", 1 / 4),
    _scan("mingru against its step-by-step form", True, "mingru, compiled", "mingru, reference", 1 / 8),
    _scan("whole site against titans NeuralMemory", True, "whole site, gru", "titans NeuralMemory", 1 / 100),
    Target("training step, gru against mingru", "training", _REAL, "top site, cached, gru", "top site, cached, mingru", 1.5),
    *(
        Target(
            f"turn 200 against turn 2, with memory, {'bytes' if of_bytes else 'time'}", "conversation", {**_REAL, "turn": 200},
            "memory", "memory", 1.05, {**_REAL, "turn": 2}, of_bytes,
        )
        for of_bytes in (False, True)
    ),
    Target("training step, cached, against LoRA r=8", "training", _REAL, "top site, cached, gru", "LoRA r=8", 1 / 50),
    Target("GPU, gru in Triton against step by step", "gpu", _ON_GPU, "gru, triton", "gru, reference", 1 / 50),
    Target("GPU, gru in Triton against cuDNN nn.GRU of equal state", "gpu", _ON_GPU, "gru, triton", "nn.GRU, equal state", 1),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A target and what was measured: the median ratio of the rounds, and the lowest and highest of them."""

    target: Target
    ratio: float
    low: float
    high: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.target.limit


def judge(rows: Iterable[Row]) -> list[Outcome]:
    """The targets that these rows can decide."""
    rows = list(rows)
    outcomes = []
    for target in TARGETS:
        row = _find(rows, target.benchmark, target.setting, target.case)
        other = _find(rows, target.benchmark, target.against_setting or target.setting, target.against)
        if row is None or other is None:
            continue
        if not target.of_bytes:
            outcomes.append(Outcome(target, *ratio(row, other)))
        elif row.kept_bytes is not None and other.kept_bytes:
            outcomes.append(Outcome(target, *[row.kept_bytes / other.kept_bytes] * 3))
    return outcomes


def against(row: Row, rows: Iterable[Row]) -> Row | None:
    """The row that `row` is shown in times of: the same setting in the case of `AGAINST`."""
    cases, rows = AGAINST.get(row.benchmark, ()), list(rows)
    found = (_find(rows, row.benchmark, row.setting, case) for case in ((cases,) if isinstance(cases, str) else cases))
    return next((one for one in found if one is not None), None)


def _find(rows: Iterable[Row], benchmark: str, setting: Mapping[str, Any], case: str) -> Row | None:
    for row in rows:
        fits = row.benchmark == benchmark and row.case == case and setting.items() <= row.setting.items()
        if fits and not row.left_out:
            return row
    return None


def exponents(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[float, float | None]]:
    """(cell, axis) -> exponents of time and of peak memory in that size, by least squares over the logarithms."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.benchmark == "growth":
            groups.setdefault((row.case, row.setting["axis"]), []).append(row)
    found = {}
    for (cell, axis), group in groups.items():
        sizes = [row.setting[axis] for row in group]
        if len(set(sizes)) < 2:  # no line through one point
            continue
        peaks = [row.peak_bytes for row in group]
        memory = _slope(sizes, peaks) if all(peaks) else None
        found[cell, axis] = (_slope(sizes, [row.median for row in group]), memory)
    return found


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


def write_rows(path: str | Path, command: str, plan: Plan, rows: Sequence[Row]) -> None:
    """Write {runs, targets, growth, rows}, whole or not at all; `runs` has command, plan, environment and date by benchmark.

    A file that is there keeps what it has of other benchmarks. Targets compare within one benchmark, so within one run.
    """
    path = Path(path)
    run = {
        "command": command,
        "plan": asdict(plan),
        "environment": _environment(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    runs = dict.fromkeys((row.benchmark for row in rows), run)
    before, kept = _read(path)
    rows = [*(row for row in kept if row.benchmark not in runs), *rows]
    runs = {name: about for name, about in before.items() if name not in runs} | runs
    targets = [
        {"what": o.target.what, "limit": o.target.limit, "ratio": o.ratio, "low": o.low, "high": o.high, "met": o.met}
        for o in judge(rows)
    ]
    values = {
        "runs": runs,
        "targets": targets,
        "growth": [
            {"cell": cell, "size": axis, "time_exponent": time, "peak_memory_exponent": memory}
            for (cell, axis), (time, memory) in exponents(rows).items()
        ],
        "rows": [row.to_json() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(values, indent=1) + "\n").encode())


def _read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Runs and rows of a file; nothing of one that is not there or that is no such file."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        rows = [row for row in read_rows(path) if row.benchmark in runs]
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return {}, []
    return runs, rows


def _environment() -> dict[str, Any]:
    """The machine, and the versions of everything that is measured."""
    values = environment()
    for package in ("numpy", "numba", "triton", "titans-pytorch", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            values["versions"][package] = version(package)
    values["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return values


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file that `write_rows` wrote."""
    return [Row.from_json(row) for row in json.loads(Path(path).read_text(encoding="utf-8"))["rows"]]

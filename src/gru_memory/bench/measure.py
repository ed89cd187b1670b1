"""Timing things side by side: every case in turn, round after round, so that whatever slows the machine slows all."""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import torch

CLOCKS = {
    "wall": time.perf_counter,
    # Time this process spent on a processor, over all its threads: for machines that do something else as well. With
    # more than one thread it counts their waiting too.
    "cpu": time.process_time,
}
MIN_SECONDS = 0.02  # a shorter case is repeated within a round
LONG_SECONDS = 10.0
DECODING = ("decode", "gpt2")  # benchmarks of tokens a second


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    rounds: int = field(default=5, metadata={"help": "interleaved runs of every case; figures are their medians"})
    clock: str = field(
        default="wall",
        metadata={"help": "'wall', or 'cpu': processor time, for one thread on a machine that is busy otherwise"},
    )
    quick: bool = field(default=False, metadata={"help": "small sizes only: shows that everything runs"})
    where: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "NAME=VALUE of a column, such as tokens=512: measure such settings only (several of one name: any of them)"
        },
    )
    patience: float = field(
        default=20.0,
        metadata={"help": "seconds: a peer is left out of the sizes at which one call of it would take longer"},
    )

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}: it must be at least 1")
        if self.clock not in CLOCKS:
            raise ValueError(f"clock is {self.clock!r}: choose one of {tuple(CLOCKS)}")
        if not self.patience >= 0:  # NaN is not
            raise ValueError(f"patience is {self.patience}: it must be at least 0")
        if wrong := [part for part in self.where if not re.fullmatch(r"[^=]+=.+", part)]:
            raise ValueError(f"where is {wrong}: write NAME=VALUE, such as tokens=512")

    def wants(self, **setting: Any) -> bool:
        """Whether this setting is to be measured. Names that it does not have decide nothing, values of one name are choices."""
        asked: dict[str, set[str]] = {}
        for part in self.where:
            name, value = part.split("=", 1)
            asked.setdefault(name, set()).add(value)
        return all(name not in setting or str(setting[name]) in values for name, values in asked.items())


@dataclass
class Row:
    """One case under one setting."""

    benchmark: str
    setting: dict[str, Any]
    case: str
    seconds: list[float]  # one a round
    units: int = 1  # tokens, steps or turns in each of `seconds`
    peak_bytes: int | None = None  # of tensors that it made, the most at a time
    kept_bytes: int | None = None  # what has to be kept for going on
    left_out: str | None = None  # why nothing was measured, where nothing was

    @property
    def median(self) -> float:
        """NaN where nothing was measured."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding, all rows of the batch together."""
        return self.units / self.median if self.benchmark in DECODING and self.seconds else None

    def to_json(self) -> dict[str, Any]:
        values = {**asdict(self), "median": self.median if self.seconds else None, "spread": self.spread}
        return values | ({"tokens_per_second": self.tokens_per_second} if self.benchmark in DECODING else {})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Row:
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})


def ratio(row: Row, other: Row) -> tuple[float, float, float]:
    """`row` in times of `other`: the median over the rounds of the ratio within a round, its lowest, its highest."""
    shares = [a / b for a, b in zip(row.seconds, other.seconds)]
    return statistics.median(shares), min(shares), max(shares)


def side_by_side(
    cases: Mapping[str, Callable[[], object]], plan: Plan, min_seconds: float | None = None, turns: int = 1,
    peers: Collection[str] = (),
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds a call of each case, one a round. Each runs twice beforehand (a long one once): code is compiled, caches warm.

    In a round every case gets `turns` turns, and what counts is the median of them: where cases differ by little, many
    short turns say more than a few long ones. Of `peers`, those whose first call outlasts the plan's patience get no seconds.
    """
    clock = CLOCKS[plan.clock]
    if min_seconds is None:
        min_seconds = 0.0 if plan.quick else MIN_SECONDS
    found: dict[str, list[float]] = {name: [] for name in cases}
    cases, repeats = dict(cases), {}
    for name, case in list(cases.items()):
        began = time.perf_counter()
        case()
        wait_for_device()
        if name in peers and time.perf_counter() - began > plan.patience:
            del cases[name]
            continue
        if time.perf_counter() - began < LONG_SECONDS:
            began = time.perf_counter()
            case()
            wait_for_device()
        repeats[name] = max(1, round(min_seconds / max(time.perf_counter() - began, 1e-7)))
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(plan.rounds):
            taken: dict[str, list[float]] = {name: [] for name in cases}
            for _ in range(turns):
                for name, case in cases.items():
                    wait_for_device()
                    began = clock()
                    for _ in range(repeats[name]):
                        case()
                    wait_for_device()
                    taken[name].append((clock() - began) / repeats[name])
            for name, seconds in taken.items():
                found[name].append(statistics.median(seconds))
    finally:
        if was_on:
            gc.enable()
    return found


def left_out(seconds: Sequence[float], plan: Plan) -> str | None:
    """What a row says of a case to which `side_by_side` gave no seconds."""
    return None if seconds else f"longer than {plan.patience:g} s"


def peak_bytes(case: Callable[[], object]) -> int:
    """How much the tensors that `case` makes take at most at a time, by torch's own record of what it allocates on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        case()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""All benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .conversations import bench_conversation, bench_prefix
from .floor import bench_floor
from .gpu import bench_gpu
from .measure import Plan, Row
from .models import bench_decode, bench_gpt2, bench_prefill
from .scans import bench_growth, bench_scan
from .training import bench_training

BENCHMARKS: dict[str, Callable[[Plan], list[Row]]] = {
    "scan": bench_scan,
    "growth": bench_growth,
    "decode": bench_decode,
    "prefill": bench_prefill,
    "training": bench_training,
    "conversation": bench_conversation,
    "prefix": bench_prefix,
    "gpt2": bench_gpt2,
    "floor": bench_floor,
    "gpu": bench_gpu,
}


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is not in `BENCHMARKS`."""
    for name in names:
        if name not in BENCHMARKS:
            raise ValueError(f"there is no benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")


def why_nothing(name: str, plan: Plan) -> str:
    """Why a benchmark gave no rows, and what to do."""
    if name == "gpu" and not torch.cuda.is_available():
        return "gpu: torch finds no GPU here; run it on a machine with one (--quick shows anywhere that it runs)"
    return (
        f"{name}: none of its settings is {' and '.join(plan.where)}; take values of its columns, or leave out --where"
    )


def run_benchmarks(
    names: Sequence[str], plan: Plan, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, list[Row]]:
    """Rows by benchmark, in the order of the names.

    Raises:
        ValueError: a name that is not in `BENCHMARKS`.
    """
    check_names(names)
    found = {}
    for done, name in enumerate(names):
        if progress:
            progress(name, done, len(names))
        found[name] = BENCHMARKS[name](plan)
        if progress:
            progress(name, done + 1, len(names))
    return found

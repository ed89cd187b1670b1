"""Speed: the memory against its peers, everything that is compared in one run and in turn."""

from .measure import Plan, Row, ratio, side_by_side
from .report import TARGETS, Outcome, judge, read_rows, write_rows
from .suite import BENCHMARKS, run_benchmarks

__all__ = [
    "BENCHMARKS",
    "TARGETS",
    "Outcome",
    "Plan",
    "Row",
    "judge",
    "ratio",
    "read_rows",
    "run_benchmarks",
    "side_by_side",
    "write_rows",
]

"""Speed: the memory against its peers, everything that is compared in one run and in turn."""

from .measure import Plan, Row, ratio, side_by_side
from .report import TARGETS, Outcome, judge, read_rows, write_rows
from .suite import BENCHMARKS, check_names, run_benchmarks, why_nothing

__all__ = [
    "BENCHMARKS",
    "TARGETS",
    "Outcome",
    "Plan",
    "Row",
    "check_names",
    "judge",
    "ratio",
    "read_rows",
    "run_benchmarks",
    "side_by_side",
    "why_nothing",
    "write_rows",
]

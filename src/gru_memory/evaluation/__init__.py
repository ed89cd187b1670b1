"""Does the memory recall, and what does it cost? Every number the documents give comes from here."""

from .batched import BatchReader
from .harm import HarmConfig, HarmResult, evaluate_harm
from .recall import RecallConfig, RecallResult, evaluate_recall, standard_suite
from .scoring import Rate, contains, wilson_interval

__all__ = [
    "BatchReader",
    "HarmConfig",
    "HarmResult",
    "Rate",
    "RecallConfig",
    "RecallResult",
    "contains",
    "evaluate_harm",
    "evaluate_recall",
    "standard_suite",
    "wilson_interval",
]

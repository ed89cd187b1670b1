"""Sessions of told, corrected and asked facts, made from seeds: training and test data of the memory."""

from .facts import Fact, FactGenerator, FactPool, FactTurns
from .sessions import Session, Turn, read_jsonl, write_jsonl

__all__ = ["Fact", "FactGenerator", "FactPool", "FactTurns", "Session", "Turn", "read_jsonl", "write_jsonl"]

"""Words of the compatibility matrix: a row is a family of models, a feature is a check, a cell is both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from families import CONFIGS
from tiny import base_model, memory_model, tolerance_of
from transformers import PreTrainedModel

# Exact arithmetic shows small mistakes, but some models compute in float32 whatever their weights are in.
SINGLE = {
    "gemma2": "its attention's softmax is in float32, where the mask of a float64 model is minus infinity",
    "gemma3_text": "the scale of its embeddings is float32, and loading keeps it so",
    "mixtral": "its experts' product takes no float64",
}
PARTLY_SINGLE = {"gpt_neo": "attention in float32", "gptj": "attention in float32"}


@dataclass(frozen=True)
class Row:
    """A family of models, or a variant of one."""

    name: str

    @property
    def family(self) -> str:
        return self.name.split(",")[0]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.family in SINGLE else torch.float64

    @property
    def tolerance(self) -> float:
        if self.family in SINGLE:
            return 1e-3
        return 2e-5 if self.family in PARTLY_SINGLE else 1e-9

    def base(self) -> PreTrainedModel:
        return base_model(self.name).to(self.dtype)

    def fresh(self, **config) -> PreTrainedModel:
        """A model with an open memory at three sites, for a check that changes it."""
        return memory_model(self.name, **{"cell": "mingru", "decay_every": "turn", **config}).to(self.dtype)

    def model(self) -> PreTrainedModel:
        """The same for checks that leave its weights alone."""
        model = _shared(self)
        model.memory_state = None
        return model


@functools.cache
def _shared(row: Row) -> PreTrainedModel:
    return row.fresh()


@dataclass(frozen=True)
class Refusal:
    """A cell that is an error: what the message holds, and why, in the words of the document."""

    message: str
    reason: str


@dataclass(frozen=True)
class Feature:
    """A column: `check(row)` raises AssertionError where the feature does not work.

    Args:
        name: head of the column.
        says: what is checked, for the document.
        check: on one row; for a refused row it must raise a ValueError with the refusal's message.
        refused: by row or family.
        slow: a minute or more over all rows.
    """

    name: str
    says: str
    check: Callable[[Row], None]
    refused: dict[str, Refusal] = field(default_factory=dict)
    slow: bool = False

    def refusal(self, row: Row) -> Refusal | None:
        return self.refused.get(row.name) or self.refused.get(row.family)


def run_cell(row: Row, feature: Feature) -> None:
    """Raise AssertionError unless the cell is what the document says."""
    refusal = feature.refusal(row)
    with tolerance_of(row.tolerance):
        if refusal is None:
            feature.check(row)
            return
        try:
            feature.check(row)
        except ValueError as error:
            assert refusal.message in str(error), error
            return
    raise AssertionError(f"{row.name} x {feature.name} is not refused")


ROWS = [Row(name) for name in CONFIGS]

"""After training: how sure a memory has to be before it speaks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..memory import GRUMemoryWithDecay
from .objective import compute_loss
from .rows import Batch

_SHIFTS = tuple(step / 2 for step in range(-2, 11))  # of the bias of trust


@torch.no_grad()
def calibrate_trust(memory: GRUMemoryWithDecay, head: Tensor, batches: Iterable[Batch]) -> float:
    """Shift the bias of trust to where most replies come out whole, answers as well as those that say that nothing was told.

    What a memory was trained on it finds with ease, so it learns to doubt too much: questions in new words, about new
    things, agree less with what was told, and are still right. `batches` hold such questions and some about things never
    told. The smallest shift of those that do best is taken.

    Returns:
        the share of replies, over all batches, that are then right to the last token under teacher forcing.
    """
    batches, start = list(batches), memory.trust[2].item()
    if not batches:
        raise ValueError("there is nothing to calibrate trust by: give at least one batch")
    scores = {}
    for shift in sorted(_SHIFTS, key=abs):
        memory.trust[2] = start + shift
        scores[shift] = sum(_right(memory, head, batch) for batch in batches) / len(batches)
    best = max(scores, key=scores.__getitem__)  # the first of equals
    memory.trust[2] = start + best
    return scores[best]


def _right(memory: GRUMemoryWithDecay, head: Tensor, batch: Batch) -> float:
    return compute_loss(memory, head, batch, torch.Generator().manual_seed(0)).right_answers

"""After training: how sure a memory has to be before it speaks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..memory import GRUMemoryWithDecay
from .objective import logits_of, read, shares_of_right
from .rows import Batch

_SHIFTS = tuple(step / 2 for step in range(-2, 11))  # of the bias of trust


@torch.no_grad()
def calibrate_trust(memory: GRUMemoryWithDecay, head: Tensor, batches: Iterable[Batch]) -> float:
    """Shift the bias of trust to where most replies come out whole, answers as well as those that say that nothing was told.

    What a memory was trained on it finds with ease, so it learns to doubt too much: questions in new words, about new
    things, long after, agree less with what was told, and are still right. `batches` hold such questions and some about
    things never told. The smallest shift of those that do best is taken.

    Returns:
        the share of replies, over all batches, that are then right to the last token under teacher forcing.
    """
    start, weight = memory.trust[2].item(), head.to(torch.bfloat16)
    right = dict.fromkeys(sorted(_SHIFTS, key=abs), 0.0)
    count = 0
    for batch in batches:
        asked = batch.labels >= 0
        prepared, reads = read(memory, head, batch)
        own, reads = batch.inputs(memory, head)[0][asked], reads[asked]
        parts = [
            None if part is None else part[asked]
            for part in (prepared.read_gate, prepared.persistent, prepared.signature)
        ]
        for shift in right:
            memory.trust[2] = start + shift
            correct = logits_of(own + memory.recalled(reads, *parts), weight).argmax(-1) == batch.labels[asked]
            right[shift] += shares_of_right(batch, asked, correct)[0]
        count += 1
    if not count:
        raise ValueError("there is nothing to calibrate trust by: give at least one batch")
    best = max(right, key=right.__getitem__)  # the first of equals
    memory.trust[2] = start + best
    return right[best] / count

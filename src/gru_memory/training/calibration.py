"""After training: how sure a memory has to be before it speaks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..memory import GRUMemoryWithDecay
from .objective import logits_of, read, shares_of_right
from .rows import Batch

_SHIFTS = tuple(step / 2 for step in range(-2, 11))  # of the bias of trust
_UNTOLD = 0.1  # of an answer: what a right reply to a question about something never told counts for


@torch.no_grad()
def calibrate_trust(memory: GRUMemoryWithDecay, head: Tensor, batches: Iterable[Batch]) -> float:
    """Shift the bias of trust to where most answers come out whole; replies that say that nothing was told count for a tenth.

    What a memory was trained on it finds with ease, so it learns to doubt too much: questions in new words, about new
    things, long after, agree less with what was told, and are still right. `batches` hold such questions and some about
    things never told. The smallest shift of those that do best is taken.

    Returns:
        the share of answers, over all batches, that are then right to the last token under teacher forcing, plus a tenth of
        that share of the other replies.
    """
    start, weight = memory.trust[2].item(), head.to(torch.bfloat16)
    right = dict.fromkeys(sorted(_SHIFTS, key=abs), 0.0)
    count = 0
    for batch in batches:
        asked = batch.labels >= 0
        told = asked & ~batch.unknown
        prepared, reads = read(memory, head, batch)
        own, reads = batch.inputs(memory, head)[0][asked], reads[asked]
        parts = [
            None if part is None else part[asked]
            for part in (prepared.read_gate, prepared.persistent, prepared.signature)
        ]
        for shift in right:
            memory.trust[2] = start + shift
            correct = logits_of(own + memory.recalled(reads, *parts), weight).argmax(-1) == batch.labels[asked]
            right[shift] += shares_of_right(batch, told, correct[told[asked]])[0]
            right[shift] += _UNTOLD * shares_of_right(batch, asked & ~told, correct[~told[asked]])[0]
        count += 1
    if not count:
        raise ValueError("there is nothing to calibrate trust by: give at least one batch")
    best = max(right, key=right.__getitem__)  # the first of equals
    memory.trust[2] = start + best
    return right[best] / count

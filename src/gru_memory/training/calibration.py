"""After training: how sure a memory has to be before it speaks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from ..memory import GRUMemoryWithDecay
from .objective import in_mode, logits_of, read, shares_of_right
from .rows import Batch

_TRUST = tuple(map(float, range(-1, 8)))  # shifts of the bias of trust
_GATES = (0.0, 1.0)  # and of those of the read gates
_UNTOLD = 0.1  # of an answer: what a right reply to a question about something never told counts for
_BASE = 0.5  # answers that a nat of KL to the base model is worth, where memory has to leave it alone
_BASE_POSITIONS = 256  # of a batch, on which that is measured


@torch.no_grad()
def calibrate(memory: GRUMemoryWithDecay, head: Tensor, batches: Iterable[Batch]) -> float:
    """Shift the biases of trust and of the read gates to where most answers come out whole, at what that costs elsewhere.

    What a memory was trained on it finds with ease, so it learns to doubt too much: questions in new words, about new
    things, long after, agree less with what was told, and are still right. `batches` hold such questions, some about
    things never told, and talk that memory has nothing to add to. A pair of shifts scores the share of answers that are right
    to the last token under teacher forcing, plus a tenth of that share of replies that say that nothing was told, minus half
    the mean KL to the base model in talk, in nats. The smallest shifts of those that do best are taken.

    Returns:
        that score.
    """
    weight = head.to(torch.bfloat16)
    trust, gates = memory.trust[2].item(), memory.read_gate.bias.clone()
    pairs = sorted(product(_GATES, _TRUST), key=lambda shifts: (abs(shifts[0]), abs(shifts[1])))
    scores, count = dict.fromkeys(pairs, 0.0), 0
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        asked = batch.labels >= 0
        told = asked & ~batch.unknown
        talk = batch.base.nonzero()
        talk = talk[torch.randperm(len(talk), generator=generator)[:_BASE_POSITIONS]].unbind(1)
        with in_mode(memory, training=False):
            prepared, reads = read(memory, head, batch)
        own = batch.inputs(memory, head)[0]

        def spoken(
            where: Tensor | tuple[Tensor, ...], gate: Tensor, own: Tensor = own, reads: Tensor = reads, parts=prepared
        ) -> Tensor:
            others = (None if part is None else part[where] for part in (parts.persistent, parts.signature))
            return logits_of(own[where] + memory.recalled(reads[where], gate[where], *others), weight)

        base = F.log_softmax(logits_of(own[talk], weight), dim=-1)
        for shift in dict.fromkeys(gate for gate, _ in pairs):
            opened = _opened(prepared.read_gate, memory.gate, shift)
            for further in _TRUST:
                memory.trust[2] = trust + further
                correct = spoken(asked, opened).argmax(-1) == batch.labels[asked]
                score = shares_of_right(batch, told, correct[told[asked]])[0]
                score += _UNTOLD * shares_of_right(batch, asked & ~told, correct[~told[asked]])[0]
                if len(base):
                    now = F.log_softmax(spoken(talk, opened), dim=-1)
                    score -= _BASE * F.kl_div(now, base, log_target=True, reduction="batchmean").item()
                scores[shift, further] += score
        count += 1
    memory.trust[2] = trust
    if not count:
        raise ValueError("there is nothing to calibrate by: give at least one batch")
    best = max(scores, key=scores.__getitem__)  # the first of equals
    memory.read_gate.bias.copy_(gates + best[0])
    memory.trust[2] = trust + best[1]
    return scores[best] / count


def _opened(gates: Tensor, most: Tensor, shift: float) -> Tensor:
    """Read gates, sigmoids times `most`, as they would be with so much added to what the sigmoid is of."""
    if not shift or not most.item():
        return gates
    share = gates / most
    return most * share * math.exp(shift) / (1 - share + share * math.exp(shift))

"""What a memory is trained for: the right next tokens in answers, and silence everywhere else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..memory import GRUMemoryWithDecay
from ..scan import ScanInputs
from .rows import Batch


@dataclass
class LossReport:
    """Loss to minimise and what it is made of; `correct` and `right_answers` are counts under teacher forcing."""

    loss: Tensor
    answer_loss: float
    base_kl: float
    address_loss: float
    write_loss: float
    correct: float
    right_answers: float


def recall(memory: GRUMemoryWithDecay, head: Tensor, batch: Batch) -> tuple[Tensor, ScanInputs]:
    """Final hidden states with what the memory recalls added (R, T, D), and where it wrote and read."""
    own, extra = batch.features[..., : memory.hidden_size], batch.features[..., memory.hidden_size :]
    with torch.autocast(own.device.type, torch.bfloat16):  # the projections; the recurrence stays in float32
        return memory.run(
            own,
            F.embedding(batch.tokens, head),
            memory.initial_state(len(own)),
            batch.mask,
            batch.turn_starts,
            extra if memory.key_size else None,
        )[::2]


def address_loss(inputs: ScanInputs, batch: Batch) -> Tensor:
    """The memory's own objective: a question reads where its answer was written, and nowhere else.

    With w(t, u) = mean over heads of sum_s r_{t,s} z_{u,s}, what position t reads of the place where token u was
    written, the loss is -log of the share of w(t, .) that falls on the right token, over all tokens before t. Other
    values of the same fact do not count: a correction is meant to be written over what it corrects.
    """
    row, position = batch.asked.nonzero().unbind(1)
    if not len(row):
        return inputs.query.new_zeros(())
    read = inputs.query[row, position].flatten(1)  # (M, N*S)
    written = inputs.write.flatten(2)[row]  # (M, T, N*S)
    shared = torch.einsum("mk,mtk->mt", read, written)  # (M, T)
    time = torch.arange(shared.shape[1], device=shared.device)

    def same(what: Tensor) -> Tensor:
        return what[row] == what[row, position].unsqueeze(1)

    told = batch.told[row]
    outdated = (told > 0) & same(batch.fact) & ~same(batch.value)
    counted = (time < position.unsqueeze(1)) & ~outdated
    right = counted & (told == batch.asked[row, position].unsqueeze(1))
    share = (shared * right).sum(1) / (shared * counted).sum(1).clamp_min(1e-9)
    share = share[right.any(dim=1)]
    return -torch.log(share.clamp_min(1e-9)).mean() if len(share) else share.sum()


def write_loss(inputs: ScanInputs, batch: Batch) -> Tensor:
    """What was told is written, the rest is not: cross-entropy of the write strengths, both kinds weighing the same.

    Every stray write wears away what its slots hold, so silence matters as much as writing.
    """
    strength = inputs.write.sum(dim=-1).clamp(1e-6, 1 - 1e-6)  # b (R, T, N); addresses sum to 1
    told = batch.told > 0
    if not told.any():
        return strength.new_zeros(())
    return -(strength[told].log().mean() + torch.log1p(-strength[batch.mask & ~told]).mean())


def compute_loss(
    memory: GRUMemoryWithDecay,
    head: Tensor,
    batch: Batch,
    generator: torch.Generator,
    base_weight: float = 1.0,
    address_weight: float = 1.0,
    write_weight: float = 1.0,
    base_positions: int = 512,
    negatives: int = 6144,
) -> LossReport:
    """Cross-entropy on answers, plus `base_weight` times KL(base || memory) on turns that must stay as they were, plus
    `address_weight` times `address_loss` and `write_weight` times `write_loss`.

    The first two are taken over a sampled vocabulary: every token of the batch and `negatives` random others, fresh
    each step. The full softmax would be most of the arithmetic.
    """
    states, inputs = recall(memory, head, batch)
    vocabulary, labels = _sample_vocabulary(batch, len(head), negatives, generator)
    weight = head[vocabulary]  # (C, D)
    taught = batch.labels >= 0
    logits = _logits(states[taught], weight)
    answer_loss = F.cross_entropy(logits, labels[taught])
    correct = logits.argmax(-1) == labels[taught]

    where = batch.base.nonzero()
    where = where[torch.randperm(len(where), generator=generator)[:base_positions]].unbind(1)
    base_kl = states.new_zeros(())
    if len(where[0]):
        base = F.log_softmax(_logits(batch.features[..., : memory.hidden_size][where], weight), dim=-1)
        base_kl = F.kl_div(
            F.log_softmax(_logits(states[where], weight), dim=-1), base, log_target=True, reduction="batchmean"
        )
    addressing, writing = address_loss(inputs, batch), write_loss(inputs, batch)
    return LossReport(
        answer_loss + base_weight * base_kl + address_weight * addressing + write_weight * writing,
        answer_loss.item(),
        base_kl.item(),
        addressing.item(),
        writing.item(),
        correct.float().mean().item(),
        _share_of_right_answers(taught, correct),
    )


def _share_of_right_answers(taught: Tensor, correct: Tensor) -> float:
    """Share of replies in which every token is right: those that greedy decoding would write letter by letter."""
    row, position = taught.nonzero().unbind(1)
    starts = torch.ones_like(row, dtype=torch.bool)
    starts[1:] = (row[1:] != row[:-1]) | (position[1:] != position[:-1] + 1)
    reply = starts.long().cumsum(0) - 1
    wrong = torch.zeros(int(starts.sum()), device=correct.device).index_add(0, reply, (~correct).float())
    return (wrong == 0).float().mean().item()


def _logits(states: Tensor, weight: Tensor) -> Tensor:
    """bfloat16 products (float32 sums) where the processor has them; the softmax stays in float32."""
    return (states.to(torch.bfloat16) @ weight.to(torch.bfloat16).t()).float()


def _sample_vocabulary(batch: Batch, size: int, negatives: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids (C,) and the batch's labels renumbered into them."""
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[batch.tokens[batch.mask]] = True
    chosen[batch.labels[batch.labels >= 0]] = True
    chosen[torch.randint(size, (negatives,), generator=generator)] = True
    number = chosen.long().cumsum(0) - 1
    return chosen.nonzero().squeeze(1), torch.where(batch.labels >= 0, number[batch.labels.clamp_min(0)], -100)

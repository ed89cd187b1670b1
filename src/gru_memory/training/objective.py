"""What a memory is trained for: the right next tokens in answers, and silence everywhere else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..memory import GRUMemoryWithDecay
from .rows import Batch


@dataclass
class LossReport:
    """Loss to minimise and what it is made of; `correct` and `right_answers` are counts under teacher forcing."""

    loss: Tensor
    answer_loss: float
    base_kl: float
    correct: float
    right_answers: float


def recall(memory: GRUMemoryWithDecay, head: Tensor, batch: Batch) -> Tensor:
    """Final hidden states with what the memory recalls added. head (V, D) -> (R, T, D)."""
    own, extra = batch.features[..., : memory.hidden_size], batch.features[..., memory.hidden_size :]
    with torch.autocast(own.device.type, torch.bfloat16):  # the projections; the recurrence stays in float32
        states, _ = memory(
            own,
            token_embeds=F.embedding(batch.tokens, head),
            mask=batch.mask,
            turn_starts=batch.turn_starts,
            key_states=extra if memory.key_size else None,
        )
    return states


def compute_loss(
    memory: GRUMemoryWithDecay,
    head: Tensor,
    batch: Batch,
    generator: torch.Generator,
    base_weight: float = 1.0,
    base_positions: int = 512,
    negatives: int = 6144,
) -> LossReport:
    """Cross-entropy on answers plus `base_weight` times KL(base || memory) on turns that must stay as they were.

    Both are taken over a sampled vocabulary: every token of the batch and `negatives` random others, fresh each step.
    The full softmax would be most of the arithmetic of a step.
    """
    states = recall(memory, head, batch)
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
        base_kl = F.kl_div(F.log_softmax(_logits(states[where], weight), dim=-1), base, log_target=True, reduction="batchmean")
    return LossReport(
        answer_loss + base_weight * base_kl,
        answer_loss.item(),
        base_kl.item(),
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

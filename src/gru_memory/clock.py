"""Which tokens of a call the memory sees, where turns begin among them, and when its clock ticks: from masks and positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .state import MemoryState


def is_2d(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def last_columns(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """The part of a (B, past + T) mask that is about these T tokens, as (B, T) bool; all True without a mask."""
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if not is_2d(mask):
        raise ValueError(
            "this mask does not say which tokens are padding: pass an attention_mask of (batch, tokens), or together with "
            "yours a memory_mask with one column for each token fed, False where it is padding"
        )
    if mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(f"the mask is {tuple(mask.shape)}, the input {(batch, length)}: one column a token is needed")
    return mask[:, -length:].to(device).bool()


def up_to_fed(memory_mask: Tensor, past_length: int | Tensor | None, length: int) -> Tensor:
    """The columns of a (B, columns) memory_mask up to the T tokens fed: it may be theirs alone, or that of a whole prompt.

    Raises:
        ValueError: it ends before these tokens, or there is no cache (`past_length` is None) that tells where they are in it.
    """
    width = memory_mask.shape[1]
    if width == length:
        return memory_mask
    if past_length is None or width < past_length + length:
        raise ValueError(
            f"memory_mask has {width} column(s) for {length} token(s) fed: give one for each of them"
            + ("" if past_length is None else f", or also for the {int(past_length)} in the cache before them")
        )
    return memory_mask[:, : past_length + length]


def turn_starts_of(
    position_ids: Tensor | None, valid: Tensor, past_length: int | Tensor, attention_mask: Tensor | None
) -> Tensor:
    """(B, T) bool, True at position 0 of each turn: where positions restart, or at the first token without a past."""
    if position_ids is not None:
        return (position_ids.expand(valid.shape).to(valid.device) == 0) & valid
    whole_past = attention_mask is None or attention_mask.shape[1] == valid.shape[1]  # none of it is padding
    if whole_past and isinstance(past_length, int) and past_length:
        return torch.zeros_like(valid)
    first = valid & (valid.long().cumsum(dim=1) == 1)
    if isinstance(past_length, int) and not past_length:
        return first
    if whole_past:
        return first & torch.as_tensor(past_length == 0, device=first.device)
    seen = attention_mask[:, : -valid.shape[1]].to(valid.device).bool().any(dim=1)  # (B,) the past may be all padding
    return first & ~seen.unsqueeze(1)


def counted(state: MemoryState, starts: Tensor, visible: Tensor) -> tuple[Tensor, MemoryState]:
    """Where the clock ticks along (B, T) positions, and `state` with its counters after them; its sites stay."""
    ticks, pending = _ticks(starts, visible, state.pending)
    if visible.shape[1] == 1:
        tokens, turns = state.tokens + visible[:, 0], state.turns + ticks[:, 0]
    else:
        tokens, turns = state.tokens + visible.sum(dim=1), state.turns + ticks.sum(dim=1)
    return ticks, replace(state, tokens=tokens, turns=turns, pending=pending)


def _ticks(starts: Tensor, visible: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
    """The first visible token at or after each start ticks the clock; `pending` carries a start that found none yet.

    starts, visible (B, T), pending (B,) -> ticks (B, T), pending (B,).
    """
    if visible.shape[1] == 1:  # decoding: nothing to add up
        begun = starts | pending.unsqueeze(1)
        return visible & begun, (begun > visible).squeeze(1)
    begun = starts.long().cumsum(dim=1) + pending.long().unsqueeze(1)  # turns begun up to here
    seen = torch.where(visible, begun, 0).cummax(dim=1).values  # turns of which a token was seen
    before = F.pad(seen[:, :-1], (1, 0))
    return visible & (begun > before), begun[:, -1] > seen[:, -1]

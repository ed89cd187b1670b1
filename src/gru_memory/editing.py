"""Changing by hand what a memory holds: telling it something, and making it forget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .conversation import Conversation
from .inspection import trace
from .state import MemoryState


def remember(conversation: Conversation, text: str) -> None:
    """Tell the memory something, as a user's turn to which nobody replies."""
    conversation.read(text)


def forget_slot(state: MemoryState, head: int, slot: int, site: str = "top") -> MemoryState:
    """The state with one slot of one head emptied, in every row.

    Raises:
        ValueError: there is no such site or slot.
    """
    if site not in state.sites or "slots" not in state.sites[site]:
        raise ValueError(f"this state has no slots at site {site!r}: it has the sites {sorted(state.sites)}")
    heads, slots = state.sites[site]["slots"].shape[1:3]
    if not (0 <= head < heads and 0 <= slot < slots):
        raise ValueError(f"there is no slot {slot} of head {head}: heads are 0 to {heads - 1}, slots 0 to {slots - 1}")
    keep = torch.ones(heads, slots)
    keep[head, slot] = 0
    return _scaled(state, keep, site)


@torch.no_grad()
def forget(
    model: Any, tokenizer: Any, state: MemoryState, text: str, reply: str | None = None, system: str | None = None
) -> MemoryState:
    """The state without what a turn wrote: slots lose the share that the turn, read anew, would take of them.

    A turn writes to the same slots whenever it is read, so this empties those places. What else lies there fades by the
    same share; what was told in other words lies elsewhere and stays.

    Args:
        model: a causal LM with memory.
        tokenizer: its tokenizer.
        state: of one conversation.
        text: the user's message, word for word as it was told.
        reply: what was answered, if that is to go too.
        system: the system prompt of the conversation.
    """
    for site in state.sites:
        seen = trace(model, tokenizer, [(text, reply)], None, system, site)
        turn = torch.tensor([number == 0 for number in seen.turns])
        state = _scaled(state, (1 - seen.left[turn].sum(dim=0)).clamp(0, 1), site)  # (N, S)
    return state


def _scaled(state: MemoryState, keep: torch.Tensor, site: str) -> MemoryState:
    """Slots times `keep` (N, S)."""
    slots = state.sites[site]["slots"]  # (B, N, S, d)
    kept = {**state.sites[site], "slots": slots * keep.to(slots).unsqueeze(-1)}
    return replace(state, sites={**state.sites, site: kept})


@torch.no_grad()
def kept_share(
    model: Any,
    tokenizer: Any,
    state: MemoryState,
    text: str,
    reply: str | None = None,
    system: str | None = None,
    site: str = "top",
) -> float:
    """How much of what a turn wrote is still in the state, from 0 (nothing) to 1 (as if it had just been read).

    The turn is read into an empty memory; of every slot it wrote to, the part of the present content counts that points
    the same way, weighted by how much the turn wrote there.
    """
    alone = trace(model, tokenizer, [(text, reply)], None, system, site)
    written = alone.left[torch.tensor([number == 0 for number in alone.turns])].sum(dim=0).double()  # (N, S)
    fresh = alone.state.sites[site]["slots"][0].double().cpu()  # (N, S, d)
    now = state.sites[site]["slots"][0].double().cpu()
    share = ((now * fresh).sum(-1) / (fresh * fresh).sum(-1).clamp_min(1e-12)).clamp(0, 1)
    return float((written * share).sum() / written.sum().clamp_min(1e-12))

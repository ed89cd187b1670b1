"""Changing by hand what a memory holds: telling it something, and making it forget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import normalize

from .conversation import Conversation
from .inspection import _site, require_one, trace
from .placement import head_weight
from .state import HOLDS_THE_SAME, MemoryState

_LEAST_WRITTEN = 0.01  # share of a slot below which a turn is not said to have written there


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
    emptied = state.sites[site]["slots"].clone()  # (B, N, S, d)
    emptied[:, head, slot] = 0
    return replace(state, sites={**state.sites, site: {**state.sites[site], "slots": emptied}})


@torch.no_grad()
def forget(
    model: Any, tokenizer: Any, state: MemoryState, text: str, reply: str | None = None, system: str | None = None
) -> MemoryState:
    """The state without what a turn wrote: slots lose the part of their content that points the way of what it writes.

    A turn writes the same under the same keys whenever it is read, so it is read anew into an empty memory, and every slot
    that holds what it writes is projected onto what is left of it without that direction. What else lies there keeps the rest; what
    was told in other words was written under other keys and stays.

    Args:
        model: a causal LM with memory.
        tokenizer: its tokenizer.
        state: of one conversation.
        text: the user's message, word for word as it was told.
        reply: what was answered, if that is to go too.
        system: the system prompt of the conversation.

    Raises:
        ValueError: the text is empty, the state belongs to another memory, or a site is a module of somebody's own.
        RuntimeError: the memory is disabled here.
    """
    for site in state.sites:
        _site(model, site, state)
    for site in state.sites:
        alone = trace(model, tokenizer, [(text, reply)], None, system, site)
        turn = torch.tensor([number == 0 for number in alone.turns])
        written = alone.left[turn].sum(dim=0) > _LEAST_WRITTEN  # (N, S)
        slots = state.sites[site]["slots"]  # (B, N, S, d)
        fresh = alone.state.sites[site]["slots"].to(slots) * written.to(slots).unsqueeze(-1)  # (1, N, S, d)
        if state.addressing == "content":
            fresh = _likest(fresh.expand_as(slots), slots)
        share = ((slots * fresh).sum(-1) / (fresh * fresh).sum(-1).clamp_min(1e-12)).clamp_min(0)
        kept = {**state.sites[site], "slots": (slots - share.unsqueeze(-1) * fresh).clamp(-1, 1)}
        state = replace(state, sites={**state.sites, site: kept})
    return state


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

    Raises:
        ValueError: the text is empty, or the state belongs to another memory or holds several conversations.
        RuntimeError: the memory is disabled here.
    """
    _site(model, site, state)
    require_one(state)
    alone = trace(model, tokenizer, [(text, reply)], None, system, site)
    written = alone.left[torch.tensor([number == 0 for number in alone.turns])].sum(dim=0).double()  # (N, S)
    fresh = alone.state.sites[site]["slots"][0].double().cpu()  # (N, S, d)
    now = state.sites[site]["slots"][0].double().cpu()
    if state.addressing == "content":
        now = _likest(now[None], fresh[None])[0]
    share = ((now * fresh).sum(-1) / (fresh * fresh).sum(-1).clamp_min(1e-12)).clamp(0, 1)
    return float((written * share).sum() / written.sum().clamp_min(1e-12))


def _likest(slots: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """For each of the slots `wanted` (B, N, S, d) the one of `slots` that holds the same, or nothing if none does."""
    same, place = same_slots(slots, wanted)
    return slots.gather(2, place.unsqueeze(-1).expand_as(wanted)) * same.unsqueeze(-1)


def same_slots(slots: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of the slots `wanted` (B, N, S, d), whether some of `slots` holds the same, and the likest of them: (B, N, S)."""
    likeness = normalize(wanted, dim=-1) @ normalize(slots, dim=-1).transpose(2, 3)  # (B, N, S wanted, S)
    best, place = likeness.max(dim=3)
    return best > HOLDS_THE_SAME, place


@dataclass(frozen=True)
class Difference:
    """How one state differs from another, in words: (token, score) pairs, most first. Scores are sums of logits."""

    gained: list[tuple[str, float]]
    lost: list[tuple[str, float]]


@torch.no_grad()
def diff(
    model: Any, tokenizer: Any, before: MemoryState, after: MemoryState, top: int = 10, site: str = "top"
) -> Difference:
    """The tokens that `after` holds more of than `before`, and those it holds less of; states of one conversation each.

    A token is written to one place in every head, so for each token the heads vote: the change of the slot that speaks
    most for it, summed over the heads. Scores are per unit of what the heads can say of that token, so that rare,
    long embeddings do not win by their length.

    Raises:
        ValueError: a state belongs to another memory or holds several conversations, or `top` is negative.
    """
    if top < 0:
        raise ValueError(f"top is {top}: it must be at least 0")
    module = _site(model, site, before, after)
    for state in (before, after):
        require_one(state)
    head = head_weight(model.get_output_embeddings())  # (V, E)
    held, was = (state.sites[site]["slots"][0, ..., : module.value_size].to(head.device) for state in (after, before))
    change = held - was  # (N, S, d)
    every = (head @ module.output.weight.to(head)).float()  # (V, N d): what each number of a slot says of each token
    every = (every - every.mean(0)).unflatten(1, (module.num_heads, module.value_size))
    gained = lost = lengths = 0.0
    for number in range(module.num_heads):
        says = every[:, number]  # (V, d)
        scores = change[number].float() @ says.T  # (S, V)
        gained, lost = gained + scores.amax(0), lost - scores.amin(0)
        lengths = lengths + says.pow(2).sum(1)
    lengths = lengths.sqrt().clamp_min(1e-6)
    return Difference(*(_most(scores / lengths, tokenizer, top) for scores in (gained, lost)))


def _most(scores: torch.Tensor, tokenizer: Any, top: int) -> list[tuple[str, float]]:
    values, ids = scores.topk(min(top, len(scores)))
    return [(tokenizer.decode([token]), value) for token, value in zip(ids.tolist(), values.tolist(), strict=True)]

"""What a memory holds, in words, and how it came there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .evaluation.batched import BatchReader, Pair
from .memory import GRUMemoryWithDecay
from .placement import head_weight
from .rendering import TurnRenderer
from .state import MemoryState


@dataclass(frozen=True)
class SlotWords:
    """What one slot of one head says when it is read on its own."""

    head: int
    slot: int
    norm: float  # of the slot; an empty one has 0
    words: list[tuple[str, float]]  # tokens, and how far a full read lifts their logits above the mean


@dataclass(frozen=True)
class Trace:
    """What a site did at every token it took in. T tokens, N heads, S slots a head; the batch axis is gone.

    Attributes:
        tokens: text of each token.
        turns: (T,) number of the turn each token is in, from 0; -1 for a system prompt before the first.
        strength: (T, N) how strongly it was written.
        address: (T, N, S) where it was written; sums to 1 over the slots.
        read_address: (T, N, S) where was read for the token after it; sums to 1 over the slots.
        left: (T, N, S) weight its content still has in each slot at the end. With the `mingru` cell a slot is exactly
            this weighted sum of contents; with the `gru` cell, contents also carry what was there before.
        recalled: (T, D) what the memory added to the hidden state.
        state: the state at the end.
    """

    tokens: list[str]
    turns: list[int]
    strength: Tensor
    address: Tensor
    read_address: Tensor
    left: Tensor
    recalled: Tensor
    state: MemoryState


@dataclass(frozen=True)
class StoredToken:
    """One token of a trace, as the memory holds it."""

    position: int
    turn: int  # -1: the system prompt
    text: str
    strength: float  # how strongly it was written, mean over the heads
    left: float  # what is left of it at the end, in slots' worth, summed over the heads
    slots: list[int]  # the slot each head wrote it to


@torch.no_grad()
def slot_words(
    model: Any,
    tokenizer: Any,
    state: MemoryState,
    row: int = 0,
    top: int = 3,
    site: str = "top",
    among: Sequence[int] = (),
    strongest: int | None = None,
) -> list[SlotWords]:
    """The tokens each slot would make likelier, by the path a read takes: output projection, then the LM head.

    A token's content is spread over the heads, which add up, so one slot alone may name it only roughly: with many narrow
    heads only `among` the tokens that were said. `recalled_words` sums the heads. Exact for site "top", behind which comes
    nothing but the LM head; deeper sites only lean that way.

    Args:
        model: a causal LM with memory.
        tokenizer: its tokenizer.
        state: of one or more conversations.
        row: which of them.
        top: tokens for each slot.
        site: which memory.
        among: ids of the tokens to choose from, `said_tokens` for example; the whole vocabulary, if there are none.
        strongest: only so many slots, those of the largest norms first, without empty ones; None is all of them in order.
    """
    module = _site(model, site)
    slots = state.select(row).sites[site]["slots"][0].to(module.output.weight.dtype)  # (N, S, d)
    out = module.output.weight.unflatten(1, (module.num_heads, module.value_size))  # (D, N, d)
    norms = slots.float().norm(dim=-1).flatten()  # (N S,)
    chosen = range(len(norms))
    if strongest is not None:
        order = norms.argsort(descending=True, stable=True)[:strongest]
        chosen = order[norms[order] > 0].tolist()
    spoken = module.gate * torch.einsum("nsd,knd->nsk", slots[..., : module.value_size], out)  # (N, S, D)
    found = _nearest(model, tokenizer, spoken.flatten(0, 1)[list(chosen)], top, among)
    return [
        SlotWords(i // module.num_slots, i % module.num_slots, float(norms[i]), words)
        for i, words in zip(chosen, found, strict=True)
    ]


def said_tokens(tokenizer: Any, turns: Sequence[tuple[str | None, str | None]]) -> list[int]:
    """Ids of the tokens that (user message, reply or None) pairs are made of, but special ones. Pairs without text have none."""
    renderer, special = TurnRenderer(tokenizer), set(tokenizer.all_special_ids)
    found = {token for user, reply in turns if user for token in renderer.turn(user, reply).ids}
    return sorted(found - special)


@torch.no_grad()
def trace(
    model: Any,
    tokenizer: Any,
    turns: Sequence[Pair],
    state: MemoryState | None = None,
    system: str | None = None,
    site: str = "top",
) -> Trace:
    """Read turns as `Conversation` does and record what a site computes.

    Args:
        model: a causal LM with memory.
        tokenizer: its tokenizer.
        turns: (user message, reply or None) pairs.
        state: of one conversation, to start from; None for an empty memory.
        system: system prompt; None leaves the default of the chat template.
        site: which memory to watch.
    """
    if not turns:
        raise ValueError("there is nothing to trace: give at least one turn")
    module = _site(model, site)
    reader = BatchReader(model, tokenizer, system)
    state = reader.start(1) if state is None else state
    if state.batch_size != 1:
        raise ValueError(f"the state holds {state.batch_size} conversations: pass one, state.select(row)")
    parts: list[dict[str, Tensor]] = []
    tokens: list[str] = []
    numbers: list[int] = []

    def record(module: GRUMemoryWithDecay, args: tuple, kwargs: dict, output: tuple) -> None:
        kwargs = {"key_states": None, **kwargs}
        inputs = module.prepare(args[0], **kwargs).inputs  # what the site has just computed, once more
        kept = kwargs["mask"][0]
        parts.append(
            {
                "address": inputs.address[0, kept],
                "write": inputs.write[0, kept],
                "keep": inputs.keep[0, kept],
                "read_address": inputs.query[0, kept],
                "recalled": (output[0] - args[0])[0, kept],
            }
        )

    hook = module.register_forward_hook(record, with_kwargs=True)
    try:
        for number, (user, reply) in enumerate(turns):
            seen = int(state.tokens)
            state = reader.read(state, [(user, reply)])
            turn = reader.renderer.turn(user, reply).ids
            ids = reader.renderer.prefix_ids + turn
            ids = ids[len(ids) - (int(state.tokens) - seen) :]
            prompt = len(ids) - len(turn)
            tokens += [tokenizer.decode([token]) for token in ids]
            numbers += [-1] * prompt + [number] * len(turn)
    finally:
        hook.remove()

    whole = {name: torch.cat([part[name] for part in parts]).float().cpu() for name in parts[0]}
    write, keep = whole.pop("write"), whole.pop("keep")
    passed = torch.log(
        (keep * (1 - write)).double().clamp_min(1e-30)
    )  # what a token leaves of what was there before it
    after = passed.flip(0).cumsum(0).flip(0) - passed  # the product over all later tokens
    strength = write.sum(-1)  # the address sums to 1
    return Trace(tokens, numbers, strength, left=write * after.exp().float(), state=state, **whole)


def stored_tokens(trace: Trace, top: int = 10, by: str = "strength") -> list[StoredToken]:
    """The tokens written most strongly, or those of which most is left at the end (`by="left"`), most first."""
    if by not in ("strength", "left"):
        raise ValueError(f"by is {by!r}: choose 'strength' or 'left'")
    strength, left = trace.strength.mean(dim=-1), trace.left.sum(dim=(1, 2))
    order = (strength if by == "strength" else left).argsort(descending=True, stable=True)[:top].tolist()
    return [
        StoredToken(
            position=i,
            turn=trace.turns[i],
            text=trace.tokens[i],
            strength=float(strength[i]),
            left=float(left[i]),
            slots=trace.address[i].argmax(dim=-1).tolist(),
        )
        for i in order
    ]


def slot_tokens(trace: Trace, head: int, slot: int, top: int = 3) -> list[tuple[str, float]]:
    """The tokens a slot is made of at the end, with their weights (see `Trace.left`)."""
    weights, positions = trace.left[:, head, slot].topk(min(top, len(trace.tokens)))
    return [(trace.tokens[i], weight) for i, weight in zip(positions.tolist(), weights.tolist(), strict=True)]


@torch.no_grad()
def words_at(
    model: Any, tokenizer: Any, state: MemoryState, address: Tensor, top: int = 3, site: str = "top"
) -> list[list[tuple[str, float]]]:
    """What reads at given addresses (M, N, S) say, all heads together, of a state of one conversation.

    With the address at which a token was written this is what the memory holds there now.
    """
    module = _site(model, site)
    slots = state.select(0).sites[site]["slots"][0]  # (N, S, d)
    read = torch.einsum("mns,nsd->mnd", address.to(slots), slots[..., : module.value_size]).flatten(1)
    spoken = module.gate * module.output(read.to(module.output.weight.dtype))  # (M, D)
    return _nearest(model, tokenizer, spoken, top)


def places_of(tokens: Sequence[str], value: str) -> list[int]:
    """Numbers of the tokens that a value was written with, the first time it stands in the text; [] if it does not."""
    text, ends = "", []
    for token in tokens:
        text += token
        ends.append(len(text))
    start = text.lower().find(value.lower())
    if start < 0 or len(text.lower()) != len(text):
        return []
    starts = [0, *ends[:-1]]
    return [
        i for i, (first, end) in enumerate(zip(starts, ends, strict=True)) if first < start + len(value) and start < end
    ]


@torch.no_grad()
def recalled_words(
    model: Any, tokenizer: Any, trace: Trace, position: int = -1, top: int = 5
) -> list[tuple[str, float]]:
    """What all heads together recalled at one token: the tokens whose logits it lifts most, above the mean."""
    return _nearest(model, tokenizer, trace.recalled[position][None], top)[0]


def _site(model: Any, name: str) -> GRUMemoryWithDecay:
    sites = model.memory_sites() if hasattr(model, "memory_sites") else {}
    if name not in sites:
        raise ValueError(f"this model has no memory at site {name!r}: it has {sorted(sites)}")
    if not isinstance(sites[name], GRUMemoryWithDecay):
        raise ValueError(f"site {name!r} is a {type(sites[name]).__name__}: only GRUMemoryWithDecay can be inspected")
    return sites[name]


def _nearest(
    model: Any, tokenizer: Any, vectors: Tensor, top: int, among: Sequence[int] = ()
) -> list[list[tuple[str, float]]]:
    """For each of (M, D) vectors the tokens whose logits it raises most; logits count from their mean over all tokens."""
    head = head_weight(model)  # (V, D)
    vectors, mean = vectors.to(head), head.mean(0)
    known = torch.tensor(among, device=head.device) if among else torch.arange(len(head), device=head.device)
    logits = vectors @ (head[known] if among else head).T - (vectors @ mean)[:, None]  # a shift of all changes nothing
    scores, places = logits.float().topk(min(top, len(known)), dim=-1)
    rows = zip(known[places].tolist(), scores.tolist(), strict=True)
    return [[(tokenizer.decode([token]), score) for token, score in zip(*row, strict=True)] for row in rows]

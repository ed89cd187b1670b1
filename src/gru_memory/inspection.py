"""What a memory holds, in words, and how it came there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .evaluation.batched import BatchReader, Pair
from .memory import GRUMemoryWithDecay
from .placement import head_weight
from .rendering import TurnRenderer, require_text
from .state import MemoryState

_AT_ONCE = 8192  # tokens of the vocabulary that are compared with slots


@dataclass(frozen=True)
class SlotWords:
    """What one slot of one head holds, in words."""

    head: int
    slot: int
    norm: float  # of the slot; an empty one has 0
    words: list[tuple[str, float]]  # tokens, the likest first, and the cosine of what each is written as with the slot


@dataclass(frozen=True)
class Trace:
    """What a site did at every token it took in. T tokens, N heads, S slots a head; the batch axis is gone.

    Attributes:
        tokens: text of each token.
        turns: (T,) number of the turn each token is in, from 0; -1 for a system prompt before the first.
        strength: (T, N) how strongly it was written.
        address: (T, N, S) where it was written; sums to 1 over the slots.
        read_address: (T, N, S) where was read for the token after it; sums to 1 over the slots.
        keep: (T, N, S) what each slot kept of what it held before the token was written: less than 1 where the clock ticked,
            and with `addressing="content"` where the token took the place of what was told before.
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
    keep: Tensor
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
    """The tokens that each slot looks as if it had been written with.

    A token is written as a few numbers a head, which follow from its output embedding (and, a little, from the hidden
    state, which is left out here); the token whose numbers point where the slot does is what the slot holds. One that holds
    several mixes them. What a read says is another matter, as all heads add up: see `recalled_words`.

    Args:
        model: a causal LM with memory.
        tokenizer: its tokenizer.
        state: of one or more conversations.
        row: which of them.
        top: tokens for each slot.
        site: which memory.
        among: ids of the tokens to choose from, `said_tokens` for example; the whole vocabulary, if there are none.
        strongest: only so many slots, those of the largest norms first, without empty ones; None is all of them in order.

    Raises:
        ValueError: there is no such site, or the state belongs to another memory.
    """
    module = _site(model, site, state)
    slots = state.select(row).sites[site]["slots"][0].flatten(0, 1)  # (N S, d)
    norms, slots = slots.float().norm(dim=-1), slots[:, : module.value_size]
    chosen = torch.arange(len(norms), device=norms.device)
    if strongest is not None:
        chosen = norms.argsort(descending=True, stable=True)[:strongest]
        chosen = chosen[norms[chosen] > 0]
    found = _likest(model, tokenizer, module, slots[chosen], chosen // module.num_slots, top, among)
    return [
        SlotWords(i // module.num_slots, i % module.num_slots, float(norms[i]), words if norms[i] > 0 else [])
        for i, words in zip(chosen.tolist(), found, strict=True)
    ]


def _likest(
    model: Any, tokenizer: Any, module: GRUMemoryWithDecay, slots: Tensor, heads: Tensor, top: int, among: Sequence[int]
) -> list[list[tuple[str, float]]]:
    """For each of the slots (M, v) of heads (M,) the tokens that are written most alike, with their cosines."""
    head = head_weight(model.get_output_embeddings())  # (V, E)
    known = torch.tensor(among, device=head.device) if among else torch.arange(len(head), device=head.device)
    aims, heads = normalize(slots.to(head.device, torch.float32), dim=-1), heads.to(head.device)
    scores, ids = aims[:, :0], known[:0].expand(len(aims), 0)  # (M, up to `top`)
    for part in known.split(_AT_ONCE):
        content = module.content_of(head[part].to(module.gate.device))  # (P, N, v)
        content = normalize(content.to(head.device, torch.float32), dim=-1)
        likeness = aims.new_empty(len(aims), len(part))
        for number in heads.unique().tolist():
            likeness[heads == number] = aims[heads == number] @ content[:, number].T
        scores, ids = torch.cat([scores, likeness], 1), torch.cat([ids, part.expand(len(aims), -1)], 1)
        scores, places = scores.topk(min(top, scores.shape[1]), dim=-1)
        ids = ids.gather(1, places)
    rows = zip(ids.tolist(), scores.tolist(), strict=True)
    return [[(tokenizer.decode([token]), score) for token, score in zip(*row, strict=True)] for row in rows]


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

    Raises:
        ValueError: no turn, one without text, a state of several conversations or of another memory, or no such site.
        RuntimeError: the memory is disabled here, so that there is nothing to record.
    """
    if not turns:
        raise ValueError("there is nothing to trace: give at least one turn")
    for user, _ in turns:
        require_text(user)
    module = _site(model, site)
    if model.memory_disabled:
        raise RuntimeError("the memory is disabled here, so it takes nothing in: leave `disable_memory()`")
    reader = BatchReader(model, tokenizer, system)
    state = reader.start(1) if state is None else state
    require_one(state)
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
    write, keep = whole.pop("write"), whole["keep"]
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

    Raises:
        ValueError: there is no such site, or the state belongs to another memory or holds several conversations.
    """
    module = _site(model, site, state)
    require_one(state)
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


def require_one(state: MemoryState) -> None:
    """Raise ValueError unless the state is of one conversation."""
    if state.batch_size != 1:
        raise ValueError(f"the state holds {state.batch_size} conversations: pass one, state.select(row)")


def _site(model: Any, name: str, *states: MemoryState) -> GRUMemoryWithDecay:
    """A site of the active memory, to which the states have to belong: those of another one would mean nothing to it."""
    sites = model.memory_sites() if hasattr(model, "memory_sites") else {}
    if name not in sites:
        raise ValueError(f"this model has no memory at site {name!r}: it has {sorted(sites)}")
    if not isinstance(sites[name], GRUMemoryWithDecay):
        raise ValueError(f"site {name!r} is a {type(sites[name]).__name__}: only GRUMemoryWithDecay can be inspected")
    for state in states:
        model.check_memory_state(state, getattr(state, "batch_size", 0), whose=True)
    return sites[name]


def _nearest(model: Any, tokenizer: Any, vectors: Tensor, top: int) -> list[list[tuple[str, float]]]:
    """For each of (M, D) vectors the tokens whose logits it raises most; logits count from their mean."""
    head = head_weight(model.get_output_embeddings())  # (V, D)
    vectors = vectors.to(head)
    logits = vectors @ head.T - (vectors @ head.mean(0))[:, None]  # a shift of all logits changes nothing
    scores, ids = logits.float().topk(min(top, len(head)), dim=-1)
    rows = zip(ids.tolist(), scores.tolist(), strict=True)
    return [[(tokenizer.decode([token]), score) for token, score in zip(*row, strict=True)] for row in rows]

"""What turns cost: the 200th with a memory and with its history, and a batch of them with the system prompt fed or kept."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..backbones import blocks_of
from ..models import add_memory
from ..prefix import cache_of, kept_prefix, turn_begun
from ..state import MemoryState
from ..training.request import conversation_memory
from .measure import Plan, Row, left_out, side_by_side
from .models import model_name, shorten, smollm2, with_memory

MEMORY, KEPT, FED_AGAIN = "memory", "history, keys and values kept", "history, fed again"
USER, REPLY = 24, 12  # tokens of a message and of its reply
PREFIX = 21  # of SmolLM2's system prompt
FED, PREFIX_KEPT = "prefix fed", "prefix kept"


def bench_conversation(plan: Plan) -> list[Row]:
    """Turns 1, 2, 10, 50 and 200: each message taken in at once, each reply decoded token by token."""
    turns = (1, 2, 4) if plan.quick else (1, 2, 10, 50, 200)
    model = smollm2(plan)
    remembering = with_memory(model, ("top",), "gru")
    messages = torch.randint(10, 90, (1, turns[-1] * (USER + REPLY)), generator=torch.Generator().manual_seed(0))
    rows, cases, kept = [], {}, {}
    for turn in turns:
        if not plan.wants(turn=turn):
            continue
        for name, (case, size) in _turn(model, remembering, messages, turn, plan).items():
            cases[name, turn], kept[name, turn] = case, size
    found = side_by_side(cases, plan, peers=[key for key in cases if key[0] == FED_AGAIN])
    for (name, turn), seconds in found.items():
        rows.append(
            Row(
                "conversation",
                {"model": model_name(plan), "turn": turn},
                name,
                seconds,
                kept_bytes=kept[name, turn],
                left_out=left_out(seconds, plan),
            )  # fmt: skip
        )
    return rows


@torch.no_grad()
def _turn(model: PreTrainedModel, remembering: PreTrainedModel, ids: Tensor, turn: int, plan: Plan) -> dict[str, tuple]:
    """The turn in each of the three ways, and the bytes each had to keep to get there."""
    past, now = ids[:, : (turn - 1) * (USER + REPLY)], ids[:, (turn - 1) * (USER + REPLY) : turn * (USER + REPLY)]
    state = remembering.initial_memory_state(1)
    for part in past.split(USER + REPLY, dim=1) if past.shape[1] and plan.wants(case=MEMORY) else ():
        state = remembering(part, memory_state=state, use_cache=False, logits_to_keep=1).memory_state

    cache = DynamicCache(config=model.config)
    for part in past.split(512, dim=1) if past.shape[1] and plan.wants(case=KEPT) else ():
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    size = sum(t.numel() * t.element_size() for t in tensors)

    def with_state() -> None:
        fresh = DynamicCache(config=remembering.config)
        remembering(now[:, :USER], past_key_values=fresh, use_cache=True, memory_state=state, logits_to_keep=1)
        _decode(remembering, now[:, USER:], fresh)

    def with_cache() -> None:
        model(now[:, :USER], past_key_values=cache, use_cache=True, logits_to_keep=1)
        _decode(model, now[:, USER:], cache)
        shorten(cache, past.shape[1])

    def fed_again() -> None:
        fresh = DynamicCache(config=model.config)
        whole = torch.cat([past, now[:, :USER]], dim=1)
        model(whole, past_key_values=fresh, use_cache=True, logits_to_keep=1)
        _decode(model, now[:, USER:], fresh)

    found = {
        MEMORY: (torch.no_grad()(with_state), state.num_bytes),
        KEPT: (torch.no_grad()(with_cache), size),
        FED_AGAIN: (torch.no_grad()(fed_again), past.numel() * past.element_size()),  # its token ids
    }
    return {name: case for name, case in found.items() if plan.wants(case=name)}


def _decode(model: PreTrainedModel, reply: Tensor, cache: DynamicCache) -> None:
    for token in reply.split(1, dim=1):
        model(token, past_key_values=cache, use_cache=True)


def bench_prefix(plan: Plan) -> list[Row]:
    """Conversations that all take a message in, in one pass, as the server does: the system prompt fed again, or its keys kept."""
    model, rows = smollm2(plan), []
    remembering = add_memory(model, conversation_memory(len(blocks_of(model)), gate_init=0.1)).eval()
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(10, 90, (PREFIX,), generator=generator)
    for batch in (1, 2) if plan.quick else (1, 8, 32):
        if not plan.wants(batch=batch):
            continue
        messages = torch.randint(10, 90, (batch, USER), generator=generator)
        whole = torch.cat([prefix.expand(batch, -1), messages], dim=1)
        mask, seen = torch.ones_like(whole), torch.arange(PREFIX + USER).expand(batch, -1) >= PREFIX
        states = remembering.initial_memory_state(batch)

        def fed(whole: Tensor = whole, mask: Tensor = mask, seen: Tensor = seen, states: MemoryState = states) -> None:
            remembering(
                whole, attention_mask=mask, memory_mask=seen, memory_state=states, use_cache=True, logits_to_keep=1
            )

        def kept(new: Tensor = messages, mask: Tensor = mask, states: MemoryState = states) -> None:
            cache, _ = cache_of(remembering, [kept_prefix(remembering, prefix.tolist())] * len(new))
            remembering(
                new, attention_mask=mask, past_key_values=cache, memory_state=turn_begun(states), use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip

        setting = {"model": model_name(plan), "batch": batch}
        for name, seconds in side_by_side(
            {FED: torch.no_grad()(fed), PREFIX_KEPT: torch.no_grad()(kept)}, plan
        ).items():
            rows.append(Row("prefix", setting, name, seconds))
    return rows

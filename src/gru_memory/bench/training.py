"""One step of training: a memory on cached hidden states, beside the model, at three sites, and LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..backbones import blocks_of
from ..memory import GRUMemoryWithDecay
from ..models import add_memory
from ..training.objective import compute_loss
from ..training.request import conversation_memory
from ..training.rows import Batch
from .measure import Plan, Row, side_by_side
from .models import CONVERSATION, SITES, model_name, sharing_weights, smollm2, with_memory
from .peers import with_lora


def bench_training(plan: Plan) -> list[Row]:
    """Forward, backward and one step of AdamW on the same number of tokens.

    With cached hidden states a step is that of `gru-memory train`: its losses, over a sampled vocabulary. The others
    run the model and its cross-entropy over the whole vocabulary, in float32. The cached step multiplies matrices in bfloat16
    (autocast), and so does a second line of LoRA. `conversation_memory` is given three blocks' hidden states
    besides, and finds the places of all tokens by their content.
    """
    batch, length = (2, 32) if plan.quick else (4, 128)
    setting = {"model": model_name(plan), "batch": batch, "tokens": length}
    if not plan.wants(**setting):
        return []
    model = smollm2(plan)
    ids = torch.randint(10, 90, (batch, length), generator=torch.Generator().manual_seed(0))
    cases: dict[str, Callable[[], object]] = {}
    head = model.get_output_embeddings().weight.detach()
    for cell in ("gru", "mingru"):
        memory = GRUMemoryWithDecay(
            head.shape[1], cell=cell, decay_every="turn", gate_init=1.0, embed_size=head.shape[1]
        )
        cases[f"top site, cached, {cell}"] = _cached_step(memory, head, ids)
    shape = conversation_memory(len(blocks_of(model)), gate_init=1.0)
    memory = add_memory(sharing_weights(model), shape).memory_sites()["top"]
    cases[f"top site, cached, {CONVERSATION}"] = _cached_step(memory.train(), head, ids)
    for cell in ("gru", "mingru"):
        top = with_memory(model, ("top",), cell)
        top.freeze_base()
        cases[f"top site, {cell}"] = _step(top, ids, top.memory_parameters())
    for cell in ("gru", "mingru"):
        three = with_memory(model, SITES["three sites"], cell)
        three.freeze_base()
        cases[f"three sites, {cell}"] = _step(three, ids, three.memory_parameters())
    # Last: peft changes the model it is given in place.
    lora = with_lora(model)
    if lora is not None:
        parameters = [p for p in lora.parameters() if p.requires_grad]
        cases["LoRA r=8"] = _step(lora, ids, parameters)
        cases["LoRA r=8, bfloat16"] = _step(lora, ids, parameters, autocast=True)
    found = side_by_side(cases, plan)  # LoRA is what a target is about, so it is waited for
    return [Row("training", setting, name, seconds, ids.numel()) for name, seconds in found.items()]


def _step(
    model: PreTrainedModel, ids: Tensor, parameters: Iterable[nn.Parameter], autocast: bool = False
) -> Callable[[], object]:
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()

    return step


def _cached_step(memory: GRUMemoryWithDecay, head: Tensor, ids: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(memory.parameters(), lr=1e-5, fused=True)
    batch = _batch(ids, head.shape[1] + memory.key_size)

    def step() -> None:
        loss = compute_loss(memory, head, batch, torch.Generator().manual_seed(0)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def _batch(ids: Tensor, width: int) -> Batch:
    """Rows in which every eighth token was told and every other eighth is asked for."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(ids.shape[1]).expand_as(ids)
    number = place // 8 + 1
    told, asked = torch.where(place % 8 == 0, number, 0), torch.where(place % 8 == 4, number, 0)
    known = {
        "features": torch.randn(*ids.shape, width, generator=generator),
        "tokens": ids,
        "mask": torch.ones_like(ids, dtype=torch.bool),
        "turn_starts": place % 16 == 0,
        "labels": torch.where(asked > 0, ids, -100),
        "base": place % 8 == 2,
        "told": told,
        "asked": asked,
        "fact": told,
        "value": told,
        "asked_fact": asked,
        "asked_value": asked,
    }
    return Batch(**{f.name: known.get(f.name, torch.zeros_like(ids)) for f in fields(Batch)})

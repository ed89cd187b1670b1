"""Models with a memory against the same models without: decoding, taking in a prompt, and GPT-2 at its real sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from ..backbones import blocks_of
from ..config import MemoryConfig
from ..embedded import load_model
from ..models import add_memory
from ..training.request import conversation_memory
from .measure import Plan, Row, peak_bytes, side_by_side

CONVERSATION = "conversation_memory"  # the shape that ships: many small slots, at the top
SITES = {"top site": ("top",), "three sites": ("input", "middle", "top")}
CONTEXT = 64  # tokens before the first that is decoded


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules and hooks of its own on the very same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def with_memory(model: PreTrainedModel, sites: tuple[str, ...], cell: str) -> PreTrainedModel:
    """The model, its weights shared, with a memory of the default shape that speaks up."""
    config = MemoryConfig(sites=sites, cell=cell, decay_every="turn", gate_init=0.1)
    return add_memory(sharing_weights(model), config).eval()


def variants(model: PreTrainedModel, cells: tuple[str, ...] = ("gru", "mingru")) -> dict[str, PreTrainedModel]:
    """The model without a memory, with one at one and at three sites, and with one of the shape that conversations use."""
    found = {"no memory": model}
    for cell in cells:
        for name, sites in SITES.items():
            found[f"{name}, {cell}"] = with_memory(model, sites, cell)
    shape = conversation_memory(len(blocks_of(model)), gate_init=0.1)
    found[CONVERSATION] = add_memory(sharing_weights(model), shape).eval()
    return found


def smollm2(plan: Plan) -> PreTrainedModel:
    """The embedded model, or for a quick round a tiny one with random weights. See `model_name`."""
    if plan.quick:
        return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=2, n_positions=512)).eval()
    return load_model()[0].eval()


def model_name(plan: Plan) -> str:
    return "tiny" if plan.quick else "SmolLM2-135M"


def bench_decode(plan: Plan) -> list[Row]:
    """Tokens decoded one by one behind a short prompt, greedily, each from the logits of the one before."""
    models, rows = variants(smollm2(plan)), []
    for batch in (1, 8):
        if plan.wants(batch=batch):
            rows += _decode("decode", {"model": model_name(plan), "batch": batch}, models, batch, plan)
    return rows


def bench_gpt2(plan: Plan) -> list[Row]:
    """Decoding with GPT-2 at the sizes of `gpt2` and `gpt2-xl` (random weights: no arithmetic depends on them)."""
    sizes = {"gpt2": ({}, torch.float32), "gpt2-xl": ({"n_embd": 1600, "n_layer": 48, "n_head": 25}, torch.bfloat16)}
    if plan.quick:
        sizes = {"tiny": ({"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 100}, torch.bfloat16)}
    rows = []
    for name, (shape, dtype) in sizes.items():
        if not plan.wants(model=name):
            continue
        with torch.device("meta"):
            model = GPT2LMHeadModel(GPT2Config(**shape)).to(dtype)
        model = model.to_empty(device="cpu").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.02, 0.02)
        for buffer_name, buffer in model.named_buffers():
            raise RuntimeError(f"{buffer_name} of {buffer.shape} has no numbers: give it some")
        model.tie_weights()
        setting = {"model": name, "dtype": str(dtype).removeprefix("torch."), "batch": 1}
        rows += _decode("gpt2", setting, variants(model, ("gru",)), 1, plan)
    return rows


def _decode(benchmark: str, setting: dict, models: dict[str, PreTrainedModel], batch: int, plan: Plan) -> list[Row]:
    tokens = 2
    prompt = torch.randint(10, 90, (batch, CONTEXT), generator=torch.Generator().manual_seed(0))
    cases = {name: decoding(model, prompt, tokens) for name, model in models.items()}
    found = side_by_side(cases, plan, turns=1 if plan.quick else 8)
    return [Row(benchmark, setting, name, seconds, batch * tokens) for name, seconds in found.items()]


@torch.no_grad()
def decoding(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> Callable[[], object]:
    cache = DynamicCache(config=model.config)
    first = model(prompt, past_key_values=cache, use_cache=True)
    state = getattr(first, "memory_state", None)
    given = {} if state is None else {"memory_state": state}

    @torch.no_grad()
    def run() -> object:
        output = first
        for step in range(tokens):
            chosen = output.logits[:, -1:].argmax(-1)
            extra = given if step == 0 else {}
            output = model(chosen, past_key_values=cache, use_cache=True, **extra)
        shorten(cache, prompt.shape[1])
        return output

    return run


def shorten(cache: DynamicCache, length: int) -> None:
    """Cut keys and values to the first `length` tokens (`crop` means another number in other versions)."""
    for layer in cache.layers:
        if isinstance(layer.keys, torch.Tensor):
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def bench_prefill(plan: Plan) -> list[Row]:
    """A prompt taken in at once: logits of its last token, keys and values, and the memory of it.

    Eight rows at a time take seconds a call, so there the shape that ships alone is compared with the model.
    """
    models, rows = variants(smollm2(plan)), []
    sizes = ((1, 32), (8, 8)) if plan.quick else ((1, 128), (1, 512), (1, 2048), (8, 128), (8, 512))
    for batch, length in sizes:
        setting = {"model": model_name(plan), "batch": batch, "tokens": length}
        if not plan.wants(**setting):
            continue
        prompt = torch.randint(10, 90, (batch, length), generator=torch.Generator().manual_seed(0))
        names = models if batch == 1 else ("no memory", CONVERSATION)
        cases = {name: prefilling(models[name], prompt) for name in names}
        found = side_by_side(cases, plan, turns=1 if plan.quick else max(1, 1024 // (batch * length)))
        for name, case in cases.items():
            rows.append(Row("prefill", setting, name, found[name], batch * length, peak_bytes(case)))
    return rows


def prefilling(model: PreTrainedModel, prompt: torch.Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return model(prompt, use_cache=True, logits_to_keep=1)

    return run

"""What is checked of training, saving and loading on every family."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from cells import Feature, Row
from decoding import some_state
from peft import LoraConfig, PeftModel, get_peft_model
from test_invariants_learning import (
    test_gradients_flow_through_the_state,
    test_only_the_memory_learns,
)
from tiny import assert_close, assert_same_gradients, gradients, loss_of, random_ids
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from gru_memory import AutoModelWithGRUMemory, MemoryState, add_memory, backbones


def learning(row: Row) -> None:
    model = row.model()
    test_only_the_memory_learns(model)
    test_gradients_flow_through_the_state(model)
    model.zero_grad()


def checkpointing(row: Row) -> None:
    """Recomputed blocks give the gradients of blocks that were not. Only the top site before transformers 5.23."""
    old = "__call__" in GradientCheckpointingLayer.__dict__
    sites = ("top",) if old else ("input", "middle", "top")
    model, ids = row.fresh(sites=sites).train(), random_ids()
    start = some_state(model).detach()
    wanted = gradients(model, loss_of(model(ids, memory_state=start, use_cache=False).logits))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    if old and backbones.before_head_of(model) is backbones.blocks_of(model)[-1]:  # the top site is hooked to a block
        with pytest.raises(RuntimeError, match="5.23"):
            model(ids, use_cache=False)
        return
    got = gradients(model, loss_of(model(ids, memory_state=start, use_cache=False).logits))
    assert_same_gradients(got, wanted, row.tolerance)


def saving(row: Row) -> None:
    """The whole model, the memory alone, and a state."""
    model, ids = row.model(), random_ids()
    start = some_state(model)
    wanted = model(ids, memory_state=start, use_cache=False).logits
    with tempfile.TemporaryDirectory() as folder:
        whole, memory, state = (Path(folder, name) for name in ("whole", "memory", "state"))
        model.save_pretrained(whole)
        model.save_memory(memory)
        start.save(state)
        start = MemoryState.load(state, model.memory_fingerprint())
        loaded = AutoModelWithGRUMemory.from_pretrained(whole, dtype=row.dtype)
        plain = AutoModelForCausalLM.from_pretrained(whole, dtype=row.dtype).eval()
        other = add_memory(row.base())
        other.load_memory(memory)
    assert type(loaded) is type(model)
    for again in (loaded, other):
        assert torch.equal(again(ids, memory_state=start, use_cache=False).logits, wanted)
        assert again.memory_fingerprint() == model.memory_fingerprint()
    with model.disable_memory():
        assert torch.equal(plain(ids).logits, model(ids).logits)


def trainer(row: Row) -> None:
    """Two steps of transformers' own Trainer, in float32, and an evaluation."""
    model = row.fresh().float()
    model.freeze_base()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(4, 10)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to=[],
            disable_tqdm=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        run = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        run.remove_callback(PrinterCallback)
        run.train()
        assert math.isfinite(run.evaluate()["eval_loss"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("gru_memory."), name
    assert model.memory_state is None


def autocast(row: Row) -> None:
    """A step in bfloat16 over a model in float32: the recurrence, the weights and their gradients stay in float32."""
    model, ids = row.fresh().float().train(), random_ids()
    model.freeze_base()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    assert {kept["slots"].dtype for kept in output.memory_state.sites.values()} == {torch.float32}
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == {name for name, _ in model.named_parameters() if name.startswith("gru_memory.")}
    assert all(gradient.dtype == torch.float32 and torch.isfinite(gradient).all() for gradient in got.values())
    wanted = gradients(model, model(ids, labels=ids, use_cache=False).loss)
    apart = sum((got[name] - wanted[name]).pow(2).sum() for name in got) / sum(g.pow(2).sum() for g in wanted.values())
    assert 1e-6 < apart < 0.01  # it was in bfloat16, and went the same way


def lora(row: Row) -> None:
    """Both learn in one step, are saved apart and come back on a base model."""
    settings = LoraConfig(
        r=2, target_modules="all-linear", exclude_modules=r".*gru_memory.*", init_lora_weights=False, task_type="CAUSAL_LM"
    )  # fmt: skip
    model, ids = row.fresh(), random_ids()
    adapted = get_peft_model(model, settings)
    for parameter in model.memory_parameters():
        parameter.requires_grad_(True)
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.optim.SGD(adapted.parameters(), lr=0.1).step()
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name or "gru_memory" in name), name
    adapted.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        wanted = adapted(input_ids=ids, use_cache=False).logits
        adapted.save_pretrained(Path(folder, "adapter"))
        model.save_memory(Path(folder, "memory"))
        other = add_memory(row.base())
        other.load_memory(Path(folder, "memory"))
        other = PeftModel.from_pretrained(other, Path(folder, "adapter"))
        assert_close(other(input_ids=ids, use_cache=False).logits, wanted)
        model.reset(len(ids))
        adapted.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
        with model.disable_memory():
            assert (adapted(input_ids=ids).logits - wanted).abs().max() > 1e-3


FEATURES = [
    Feature("gradients", "Only the memory gets gradients, and they reach back through the state.", learning),
    Feature(
        "checkpointing",
        'Gradient checkpointing gives the same gradients (before transformers 5.23 for `sites=("top",)` only).',
        checkpointing,
    ),
    Feature(
        "autocast",
        "A step under bf16 autocast goes the way of one without; weights, gradients and slots stay in float32.",
        autocast,
    ),
    Feature(
        "LoRA",
        "An adapter of peft and the memory learn in one step, are saved into two folders and loaded again.",
        lora,
    ),
    Feature("Trainer", "Steps of `transformers.Trainer` change the memory and nothing else; it evaluates.", trainer),
    Feature("saving", "The whole model, the memory alone and a state, saved and loaded: the same logits.", saving),
]

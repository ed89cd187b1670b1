"""A memory beside a LoRA on one model: both learn, both are saved, each into a folder of its own, both come back."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from talking import talking_model, talking_tokenizer
from test_trainer import sessions, train
from tiny import one_thread  # noqa: F401 (a fixture)
from transformers import LlamaForCausalLM

from gru_memory import AutoModelWithGRUMemory
from gru_memory.base_identity import weights_digest
from gru_memory.training.checkpoints import MemoryCheckpoints, find_memory_model
from gru_memory.training.collator import SessionCollator

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def fresh():
    return talking_model("llama", sites=("middle", "top"), key_layers=(0,)).float()


def both(seed=0, **lora):
    """A model with memory inside a `PeftModel`, everything but the base learning."""
    model = fresh()
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**{**LORA, **lora}))
    for parameter in model.memory_parameters():
        parameter.requires_grad_(True)
    return adapted


def batch():
    return SessionCollator(talking_tokenizer("llama"))(sessions(4))


def says(model):
    with torch.no_grad():
        return model.eval()(**batch(), use_cache=False).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of the base model alone."""
    folder = tmp_path_factory.mktemp("base")
    model = fresh()
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if not name.startswith("gru_memory")})
    del plain.config.gru_memory
    plain.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    model = both()
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses, _ = train(tmp_path_factory.mktemp("trained"), model, steps=6)
    return model, before, losses


def test_both_learn_and_the_base_does_not(trained):
    model, before, losses = trained
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        learns = "gru_memory" in name or "lora_" in name
        assert torch.equal(p, before[name]) != learns, name


@pytest.mark.parametrize("first", ["memory", "adapter"])
def test_both_are_saved_apart_and_come_back_together(trained, base, tmp_path, first):
    model = trained[0]
    model.save_pretrained(tmp_path / "lora")
    model.get_base_model().save_memory(tmp_path / "memory")
    assert all("lora_" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert not (tmp_path / "memory" / "adapter_config.json").exists()
    wanted = says(model)
    if first == "memory":
        loaded = AutoModelWithGRUMemory.from_pretrained(base, memory=tmp_path / "memory")
        memory_alone = says(loaded)
        loaded = PeftModel.from_pretrained(loaded, tmp_path / "lora")
    else:
        loaded = PeftModel.from_pretrained(fresh(), tmp_path / "lora")
        loaded.get_base_model().load_memory(tmp_path / "memory")
        with loaded.disable_adapter():
            memory_alone = says(loaded)
    torch.testing.assert_close(says(loaded), wanted)
    assert (memory_alone - wanted).abs().max() > 1e-3  # the adapter had its part
    with loaded.get_base_model().disable_memory():
        assert (says(loaded) - wanted).abs().max() > 1e-3  # and so had the memory


def test_a_conversation_goes_on_with_both(trained):
    model, ids = trained[0].eval(), batch()["input_ids"][:1, :12]
    inner = model.get_base_model()
    inner.reset()
    model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert inner.memory_state.tokens.item() == 16
    inner.memory_state = None


def test_adapters_do_not_change_whose_memory_it_is():
    """The digest is of the base weights, whatever peft has added."""
    wanted = weights_digest(fresh())
    assert weights_digest(both().get_base_model()) == wanted
    assert weights_digest(both(target_modules=["embed_tokens", "o_proj"]).get_base_model()) == wanted
    assert weights_digest(both(modules_to_save=["lm_head"]).get_base_model()) == wanted
    other = fresh()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.neg_()
    assert weights_digest(other) != wanted


def test_adapters_inside_the_memory_are_refused_when_it_is_saved(tmp_path):
    model = both(target_modules="all-linear")
    with pytest.raises(ValueError, match="exclude_modules"):
        model.get_base_model().save_memory(tmp_path / "memory")
    assert not (tmp_path / "memory").exists()
    model = both(target_modules="all-linear", exclude_modules=r".*gru_memory.*")
    model.get_base_model().save_memory(tmp_path / "memory")


def test_a_run_of_both_is_resumed_with_its_curve(tmp_path):
    straight, _ = train(tmp_path, both(), callbacks=[MemoryCheckpoints()], save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "checkpoint-3"
    assert json.loads((checkpoint / "memory" / "memory_config.json").read_text())["sites"] == ["middle", "top"]
    model = both(seed=5)
    with torch.no_grad():
        for parameter in model.get_base_model().memory_parameters():
            parameter.add_(1.0)
    again, _ = train(tmp_path, model, callbacks=[MemoryCheckpoints()], resume=str(checkpoint))
    assert again == pytest.approx(straight, rel=1e-6)
    (checkpoint / "memory").rename(checkpoint / "elsewhere")
    with pytest.raises(FileNotFoundError, match="checkpoint-3"):
        train(tmp_path, both(), callbacks=[MemoryCheckpoints()], resume=str(checkpoint))


def test_the_best_of_both_is_kept(tmp_path):
    """The first step is the best one here: the loss is to be as large as can be."""
    saved = {}

    class Watched(MemoryCheckpoints):
        def on_save(self, args, state, control, model, **kwargs):
            super().on_save(args, state, control, model, **kwargs)
            saved[state.global_step] = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}

    model = both()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    train(
        tmp_path, model, steps=3, callbacks=[Watched()], save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        trainer_settings={"eval_dataset": sessions(2)}, **best,
    )  # fmt: skip
    assert all(torch.equal(p, saved[1][name]) for name, p in model.named_parameters() if name in saved[1])
    assert not any(torch.equal(p, saved[3][name]) for name, p in model.named_parameters() if name in saved[3])


def test_models_without_memory_are_named():
    with pytest.raises(ValueError, match="Linear has no memory"):
        find_memory_model(torch.nn.Linear(1, 1))

"""Files that are refused: for another base model, damaged, foreign, or too large to be a memory."""

import copy
import pickle

import pytest
import torch
from memory_files import (
    config_with,
    of_two_families,  # noqa: F401 (a fixture)
    unchanged,
)
from safetensors.torch import load_file, save_file
from tiny import (
    base_model,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
)
from transformers import LlamaConfig, LlamaForCausalLM

import gru_memory.saving
from gru_memory import AutoModelWithGRUMemory, add_memory
from gru_memory.base_identity import weights_digest
from gru_memory.config import FORMAT_VERSION

# Other base models


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_the_digest_of_a_model_is_the_same_in_every_precision(family, dtype):
    model = base_model(family)
    assert weights_digest(copy.deepcopy(model).to(dtype)) == weights_digest(model)
    assert weights_digest(base_model(family, seed=5)) != weights_digest(model)
    assert weights_digest(memory_model(family)) == weights_digest(model)  # a memory is no part of its base
    assert weights_digest(base_model(family).to("meta")) is None


def test_the_digest_sees_small_changes_anywhere(family):
    """As of a fine-tune: 1% of the size of the weights, in one of the blocks alone."""
    model = base_model(family)
    wanted, generator = weights_digest(model), torch.Generator().manual_seed(0)
    for number, block in enumerate(model.transformer.h if family == "gpt2" else model.model.layers):
        kept = copy.deepcopy(block.state_dict())
        with torch.no_grad():
            for weight in block.parameters():
                if weight.dim() > 1:
                    weight += 0.01 * weight.std() * torch.randn(weight.shape, generator=generator)
        assert weights_digest(model) != wanted, number
        block.load_state_dict(kept)
    assert weights_digest(model) == wanted


def test_other_weights_under_a_memory_are_refused_unless_asked_for(family, tmp_path):
    model = memory_model(family)
    model.config._name_or_path = "ann/base"
    model.save_memory(tmp_path)
    other = add_memory(base_model(family, seed=9)).double()
    with unchanged(other), pytest.raises(ValueError, match=r"(?s)other weights.*'ann/base'.*check_base=False"):
        other.load_memory(tmp_path)
    other.load_memory(tmp_path, check_base=False)
    assert other.memory_fingerprint() == model.memory_fingerprint()
    base_model(family, seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other weights"):
        AutoModelWithGRUMemory.from_pretrained(tmp_path / "other", tmp_path)
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path / "other", tmp_path, check_base=False)
    assert loaded.memory_config == model.memory_config


def test_another_family_and_other_sizes_are_refused_whatever_is_asked(tmp_path):
    memory_model("gpt2").save_memory(tmp_path / "gpt2")
    shape = {"num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 20, "vocab_size": 101}
    add_memory(LlamaForCausalLM(LlamaConfig(hidden_size=16, **shape))).save_memory(tmp_path / "narrow")
    model = memory_model("llama")
    for folder, message in (("gpt2", "'model_type': 'gpt2'"), ("narrow", "'hidden_size': 16.*'hidden_size': 32")):
        for check_base in (True, False):
            with unchanged(model), pytest.raises(ValueError, match=message):
                model.load_memory(tmp_path / folder, check_base=check_base)


# Damaged and foreign files


def nothing(folder):
    (folder / "memory_model.safetensors").unlink()


def pickle_beside(folder):
    torch.save({}, folder / "memory_model.bin")
    nothing(folder)


def torch_pickle(folder):
    torch.save({"top.gate": torch.ones(())}, folder / "memory_model.safetensors")


def plain_pickle(folder):
    (folder / "memory_model.safetensors").write_bytes(pickle.dumps({"top.gate": [1.0] * 9}))


def truncated(folder):
    whole = (folder / "memory_model.safetensors").read_bytes()
    (folder / "memory_model.safetensors").write_bytes(whole[:-10])


def weights_with(change):
    def damage(folder):
        path = folder / "memory_model.safetensors"
        weights = change(load_file(path))
        path.unlink()  # the tensors may still lie in the file
        save_file(weights, path)

    return damage


DAMAGES = {
    "missing": (nothing, "holds no memory: memory_model.safetensors is missing"),
    "pickle beside": (pickle_beside, "memory_model.bin.*pickle files can run code"),
    "pickle of torch": (torch_pickle, "pickle file under the name"),
    "pickle": (plain_pickle, "pickle file under the name"),
    "truncated": (truncated, "damaged or not a safetensors file"),
    "empty": (lambda folder: (folder / "memory_model.safetensors").write_bytes(b""), "damaged"),
    "nan": (weights_with(lambda w: {**w, "top.gate": w["top.gate"] / 0}), "NaN or infinite"),
    "other shape": (weights_with(lambda w: {**w, "top.gate": torch.ones(2)}), "do not fit.*top.gate"),
    "lacks one": (weights_with(lambda w: {k: v for k, v in w.items() if k != "top.gate"}), "do not fit.*top.gate"),
    "one too many": (weights_with(lambda w: {**w, "transformer.wte": torch.ones(2)}), "do not fit.*transformer.wte"),
    "newer format": (config_with(format_version=FORMAT_VERSION + 1), "newer.*upgrade"),
    "unknown keys": (config_with(surprise=1), r"unknown fields \['surprise'\].*upgrade"),
    "no version": (config_with(format_version="two"), "format_version"),
    "impossible sizes": (config_with(num_slots=10**30), "no memory can have the sizes"),
    "huge sizes": (config_with(num_slots=10**12), "do not fit"),
    "no such layer": (config_with(sites=["layer:77", "input", "top"]), "memory"),
    "own sites unread": (config_with(own_sites={"top": "mine.Site"}), r"site 'top'.*mine\.Site.*sites="),
    "own sites of an odd kind": (config_with(own_sites={"top": {"kind": []}}), r"of the kind \[\].*not registered"),
    "base as a text": (config_with(base_model="gpt2"), "not a memory config.*base_model is 'gpt2'"),
    "own sites odd": (config_with(own_sites=3), "not a memory config"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_and_foreign_files_are_refused_with_reasons(kind, tmp_path):
    damage, message = DAMAGES[kind]
    model = memory_model("llama")
    model.save_memory(tmp_path)
    damage(tmp_path)
    with unchanged(model), pytest.raises(ValueError, match=f"(?s){message}"):
        model.load_memory(tmp_path)


def test_files_too_large_to_be_a_memory_are_not_read(tmp_path, monkeypatch):
    model = memory_model()
    model.save_memory(tmp_path)
    monkeypatch.setattr(gru_memory.saving, "safe_open", None)  # to be called would be an error of its own
    with (tmp_path / "memory_model.safetensors").open("r+b") as file:
        file.truncate(10 << 30)  # sparse
    with unchanged(model), pytest.raises(ValueError, match="10,737,418,240 bytes.*nothing was read"):
        model.load_memory(tmp_path)
    with (tmp_path / "memory_config.json").open("r+b") as file:
        file.truncate(10 << 30)
    with unchanged(model), pytest.raises(ValueError, match="nothing was read"):
        model.load_memory(tmp_path)

"""Files of earlier formats load and say the same; those of later ones are refused."""

import json
from pathlib import Path

import pytest
import torch
from memory_files import (
    config_with,
    of_two_families,  # noqa: F401 (a fixture)
)
from safetensors.torch import load_file, save_file
from tiny import (
    assert_close,
    base_model,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    random_ids,
)

from gru_memory import AutoModelWithGRUMemory, MemoryConfig, MemoryState, add_memory
from gru_memory.config import FORMAT_VERSION

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("how", ("memory", "model"))
def test_files_of_format_1_load_and_say_the_same(family, how):
    folder = DATA / "format-1" / family
    if how == "memory":
        model = AutoModelWithGRUMemory.from_pretrained(folder / "model", folder / "memory")
    else:
        model = AutoModelWithGRUMemory.from_pretrained(folder / "model")
    assert list(model.memories) == ["default"]
    state = MemoryState.load(folder / "state.safetensors", model.memory_fingerprint())
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        got, without = model(expected["asked"], memory_state=state), model(expected["asked"])
    assert_close(got.logits, expected["logits"], 1e-4)
    assert_close(got.memory_state.sites["top"]["slots"], expected["slots"], 1e-4)
    assert (without.logits - expected["logits"]).abs().max() > 0.1
    assert {site.gate.shape for site in model.memory_sites().values()} == {(1,)}  # FSDP2 refuses ()
    assert all(site.gate.requires_grad for site in model.memory_sites().values())


def test_a_memory_of_format_1_is_saved_in_the_present_one(family, tmp_path):
    folder = DATA / "format-1" / family
    model = AutoModelWithGRUMemory.from_pretrained(folder / "model", folder / "memory")
    model.save_memory(tmp_path)
    assert json.loads((tmp_path / "memory_config.json").read_text())["format_version"] == FORMAT_VERSION
    again = AutoModelWithGRUMemory.from_pretrained(folder / "model", tmp_path)
    assert again.memory_fingerprint() == model.memory_fingerprint()


def test_the_version_of_a_state_is_in_its_file():
    metadata = MemoryState.read_metadata(DATA / "format-1" / "gpt2" / "state.safetensors")
    assert (metadata["version"], metadata["note"]) == ("1", "format 1")


def test_gates_of_format_2_load_from_a_model_of_several_memories(tmp_path):
    """Gates were numbers, shape (), before format 3, in a whole model as well as in a memory's own file."""
    model = memory_model("llama")
    model.attach_memory(MemoryConfig(sites=("top",), num_slots=3, gate_init=0.25), name="second")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gates = {name for name in weights if name.endswith(".gate")}
    assert len(gates) == 4
    old = {name: tensor.reshape(()) if name in gates else tensor for name, tensor in weights.items()}
    (tmp_path / "model.safetensors").unlink()
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["gru_memory"]["format_version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))

    again = AutoModelWithGRUMemory.from_pretrained(tmp_path, dtype=torch.float64)
    for name in ("default", "second"):
        again.set_memory(name)
        model.set_memory(name)
        assert {site.gate.shape for site in again.memory_sites().values()} == {(1,)}
        assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)
    model.load_state_dict(old)  # what Trainer does to resume
    assert model.config.gru_memory["format_version"] == again.config.gru_memory["format_version"] == FORMAT_VERSION


def test_a_memory_of_format_2_loads(family, tmp_path):
    """Its gates are numbers, and its config says which base model it is for."""
    model = memory_model(family)
    model.save_memory(tmp_path)
    weights = load_file(tmp_path / "memory_model.safetensors")
    old = {name: tensor.reshape(()) if name.endswith(".gate") else tensor.clone() for name, tensor in weights.items()}
    (tmp_path / "memory_model.safetensors").unlink()
    save_file(old, tmp_path / "memory_model.safetensors", {"format": "pt"})
    config_with(format_version=2)(tmp_path)
    again = add_memory(base_model(family)).double()
    again.load_memory(tmp_path)
    assert {site.gate.shape for site in again.memory_sites().values()} == {(1,)}
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)
    assert again.memory_fingerprint() == model.memory_fingerprint()  # so states of it go on
    with pytest.raises(ValueError, match="another base model"):
        memory_model("llama" if family == "gpt2" else "gpt2").load_memory(tmp_path)


def test_a_memory_of_format_3_asks_by_queries_of_its_own(tmp_path):
    """Behind an address rank; its config knows nothing of them."""
    model = memory_model("llama", address_rank=6, tied_queries=False)
    model.save_memory(tmp_path)
    path = tmp_path / "memory_config.json"
    values = json.loads(path.read_text())
    del values["tied_queries"], values["signature_size"], values["kept_in"]
    path.write_text(json.dumps({**values, "format_version": 3}))
    again = add_memory(base_model("llama")).double()
    again.load_memory(tmp_path)
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)
    assert again.memory_fingerprint() == model.memory_fingerprint()
    again.save_memory(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "memory_config.json").read_text())["tied_queries"] is False


def test_a_fingerprint_depends_on_later_fields_only_where_they_are_set():
    """Or every state that was ever kept would be refused after an upgrade."""
    assert set(MemoryConfig().meaning()) == {
        *("format_version", "sites", "num_heads", "num_slots", "slot_size"),
        *("decay", "decay_every", "cell", "key_layers"),
    }
    assert MemoryConfig(mode="ephemeral", gate_init=1.0).meaning() == MemoryConfig().meaning()
    assert (
        MemoryConfig(persistent_slots=2, persistent_floor=0.1).meaning() == MemoryConfig(persistent_slots=2).meaning()
    )
    assert MemoryConfig(decay=0.5).meaning() != MemoryConfig().meaning()
    assert MemoryConfig().meaning()["format_version"] == 1


def test_a_config_json_of_a_newer_version_is_refused(family, tmp_path):
    memory_model(family).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for change, message in (
        ({"format_version": FORMAT_VERSION + 1}, "newer"),
        ({"active": "fr"}, "damaged"),
        ({"memories": {"de.fault": {}}}, "cannot be the name"),
    ):
        path.write_text(json.dumps({**values, "gru_memory": {**values["gru_memory"], **change}}))
        with pytest.raises(ValueError, match=message):
            AutoModelWithGRUMemory.from_pretrained(tmp_path)

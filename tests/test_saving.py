"""Memories as files: what is in them, and models and memories that are loaded again, copied and sent elsewhere."""

import copy
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from memory_files import (
    FILES,
    of_two_families,  # noqa: F401 (a fixture)
    unchanged,
)
from safetensors.torch import load_file
from tiny import (
    HIDDEN,
    SumSite,
    assert_same_state,
    base_model,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    own_site_model,
    random_ids,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import gru_memory.saving
from gru_memory import AutoModelWithGRUMemory, MemoryConfig, MemoryState, add_memory, sharding
from gru_memory.base_identity import weights_digest
from gru_memory.config import FORMAT_VERSION
from gru_memory.models import memory_class

# What is in the files


def test_no_base_weight_is_in_the_files(family, tmp_path):
    model = memory_model(family)
    model.save_memory(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    saved = load_file(tmp_path / "memory_model.safetensors")
    memory = {f"{site}.{k}": v for site, m in model.memory_sites().items() for k, v in m.state_dict().items()}
    assert {name: tensor.shape for name, tensor in saved.items()} == {k: v.shape for k, v in memory.items()}
    rows = {
        tuple(row)
        for name, p in model.named_parameters()
        if not name.startswith("gru_memory") and p.shape[-1] >= 8
        for row in p.detach().reshape(-1, p.shape[-1]).tolist()
        if len(set(row)) > 1  # biases of zeros and norms of ones say nothing
    }
    assert len(rows) > 300
    for tensor in saved.values():
        assert not rows & {tuple(row) for row in tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1).tolist()}
    numbers = sum(t.numel() for t in memory.values())
    assert (tmp_path / "memory_model.safetensors").stat().st_size < 8 * numbers + 10_000
    assert (tmp_path / "memory_config.json").stat().st_size < 2_000


def test_the_config_says_which_base_model_it_is_for(family, tmp_path):
    model = memory_model(family)
    model.config._name_or_path = "ann/base"
    model.save_memory(tmp_path)
    values = json.loads((tmp_path / "memory_config.json").read_text())
    assert values["format_version"] == FORMAT_VERSION
    base = values["base_model"]
    assert base == {
        "name": "ann/base",
        "weights": weights_digest(model),
        "model_type": family,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 4,
        "vocab_size": 101,
    }
    assert re.fullmatch("[0-9a-f]{32}", base["weights"])


def test_a_folder_on_this_machine_is_told_to_nobody(family, tmp_path):
    base_model(family).save_pretrained(tmp_path / "secret")
    for name in (tmp_path / "secret", "secret/base"):
        model = AutoModelWithGRUMemory.from_pretrained_with_memory(tmp_path / "secret")
        model.config._name_or_path = str(name)
        if isinstance(name, str):
            assert "secret/base" in saved_text(model, tmp_path / "memory")
        else:
            assert "secret" not in saved_text(model, tmp_path / "memory")


def saved_text(model, folder, **options):
    model.save_memory(folder, **options)
    return (folder / "memory_config.json").read_text() + (folder / "README.md").read_text()


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = memory_model()
    model.save_memory(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(gru_memory.saving, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        memory_model("llama").save_memory(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_process_waits_for_one_that_could_not_write(monkeypatch):
    met = []
    monkeypatch.setattr(sharding, "has_shards", lambda module: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: met.append("barrier"))
    with pytest.raises(OSError, match="no space"), sharding.one_writes(torch.nn.Linear(2, 2)) as writes:
        assert writes and not met
        raise OSError("no space left")
    assert met == ["barrier"]


def test_a_memory_loads_in_the_precision_of_its_model_and_loses_no_bit_it_can_keep(family, tmp_path):
    model = memory_model(family)
    with torch.no_grad():
        model.memory_sites()["top"].output.weight.mul_(1 + 1e-12)  # float32 has no such numbers
    model.save_memory(tmp_path)
    same, half = add_memory(base_model(family)).double(), add_memory(base_model(family)).to(torch.bfloat16)
    same.load_memory(tmp_path)
    half.load_memory(tmp_path)
    assert torch.equal(same.memory_sites()["top"].output.weight, model.memory_sites()["top"].output.weight)
    assert torch.equal(same(random_ids()).logits, model(random_ids()).logits)
    assert half.memory_sites()["top"].output.weight.dtype == torch.bfloat16
    assert {p.requires_grad for p in same.memory_parameters()} == {True}


def test_a_folder_at_home_is_the_same_for_saving_and_loading(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    model = memory_model()
    model.save_memory("~/memory")
    assert not list(here.iterdir()) and (home / "memory" / "memory_config.json").is_file()
    model.load_memory("~/memory")


def test_whole_numbers_of_a_site_of_your_own_are_not_rounded(tmp_path):
    class Counted(SumSite):
        def __init__(self, *ids):
            super().__init__()
            self.register_buffer("ids", torch.tensor(ids))

    model = add_memory(base_model("llama"), MemoryConfig(), {"top": Counted(4097, 2049)})
    model.save_memory(tmp_path, dtype=torch.float16)
    model.load_memory(tmp_path, sites={"top": Counted(0, 0)})
    assert model.memory_sites()["top"].ids.tolist() == [4097, 2049]


@pytest.mark.parametrize("dtype", (torch.int8, "float16"))
def test_weights_are_saved_as_floats_or_not_at_all(dtype, tmp_path):
    model = memory_model()
    model.save_memory(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="give one of floats, such as torch.float16"):
        model.save_memory(tmp_path, dtype=dtype)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_memory_that_a_fused_optimizer_trained_is_another_one():
    """Fused steps write into weights and leave their version as it was."""
    model = memory_model()
    before = model.memory_fingerprint()
    for weight in model.memory_parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(list(model.memory_parameters()), lr=0.1, fused=True).step()
    assert model.memory_fingerprint() != before
    assert model.memory_fingerprint() == copy.deepcopy(model).memory_fingerprint()


def test_loading_draws_no_random_numbers(tmp_path):
    model = memory_model()
    model.save_memory(tmp_path)
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    model.load_memory(tmp_path)
    assert torch.equal(torch.rand(3), wanted)


def test_what_was_loaded_does_not_lie_in_the_file(family, tmp_path):
    """safetensors maps files into memory: written over in place, they would change under whoever loaded them."""
    model, ids = memory_model(family), random_ids()
    model.save_memory(tmp_path)
    model.load_memory(tmp_path)
    model(ids).memory_state.detach().save(tmp_path / "state")
    state = MemoryState.load(tmp_path / "state")
    wanted = model(ids, memory_state=state).logits
    for name in ("state", "memory_model.safetensors"):
        size = (tmp_path / name).stat().st_size
        with (tmp_path / name).open("r+b") as file:
            file.write(b"\x01" * size)
    assert torch.equal(model(ids, memory_state=state).logits, wanted)


# Modules of one's own


def own_model(family):
    model = own_site_model(family)
    with torch.no_grad():
        model.memory_sites()["middle"].scale.copy_(torch.linspace(-1, 1, HIDDEN))
    return model


def test_a_site_of_your_own_comes_back_where_you_give_it(family, tmp_path):
    model, ids = own_model(family), random_ids()
    wanted = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path / "model")
    model.save_memory(tmp_path / "memory")
    with pytest.raises(ValueError, match=r"'middle'.*tiny\.SumSite.*sites="):
        AutoModelWithGRUMemory.from_pretrained(tmp_path / "model")
    loaded = AutoModelWithGRUMemory.from_pretrained(
        tmp_path / "model", sites={"middle": SumSite()}, dtype=torch.float64
    )
    assert torch.equal(loaded(ids, use_cache=False).logits, wanted)

    other = add_memory(base_model(family)).double()
    with unchanged(other), pytest.raises(ValueError, match=r"'middle'.*tiny\.SumSite.*sites="):
        other.load_memory(tmp_path / "memory")
    with unchanged(other), pytest.raises(ValueError, match=r"do not fit.*middle"):
        other.load_memory(tmp_path / "memory", sites={"middle": SumSite(5)})
    other.load_memory(tmp_path / "memory", sites={"middle": SumSite()})
    assert torch.equal(other(ids, use_cache=False).logits, wanted)

    base_model(family).double().save_pretrained(tmp_path / "base")
    both = AutoModelWithGRUMemory.from_pretrained(
        tmp_path / "base", tmp_path / "memory", sites={"middle": SumSite()}, dtype=torch.float64
    )
    assert torch.equal(both(ids, use_cache=False).logits, wanted)
    with pytest.raises(ValueError, match="holds modules"):
        AutoModelWithGRUMemory.from_pretrained_with_memory(tmp_path / "base", sites={"middle": SumSite()})


def test_sites_of_several_memories_are_given_by_name(family, tmp_path):
    model = own_model(family)
    model.save_memory(tmp_path / "memory")
    model.load_memory(tmp_path / "memory", "fr", sites={"middle": SumSite()})
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="all have sites of their own"):
        AutoModelWithGRUMemory.from_pretrained(tmp_path / "model", sites={"middle": SumSite()})
    with pytest.raises(ValueError, match=r"\['de'\]"):
        AutoModelWithGRUMemory.from_pretrained(tmp_path / "model", sites={"de": {"middle": SumSite()}})
    given = {name: {"middle": SumSite()} for name in ("default", "fr")}
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path / "model", sites=given, dtype=torch.float64)
    for name in ("default", "fr"):
        loaded.set_memory(name)
        assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)


# Loading whole models


def test_a_loaded_model_leaves_its_base_alone(family, tmp_path):
    memory_model(family).save_pretrained(tmp_path)
    model = AutoModelWithGRUMemory.from_pretrained(tmp_path)
    model, information = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not information["missing_keys"]
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"gru_memory"}


def test_a_refused_memory_costs_no_loading_of_the_base(tmp_path):
    with pytest.raises(ValueError, match="holds no memory"):
        AutoModelWithGRUMemory.from_pretrained("this folder is not even opened", tmp_path)
    memory_model().save_memory(tmp_path)
    for settings in ({"decay": 0.5}, {"num_slots": 3}, {"sites": ("top",)}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} cannot be set together"):
            AutoModelWithGRUMemory.from_pretrained_with_memory("not opened either", memory=tmp_path, **settings)


def test_a_model_that_has_a_memory_is_not_given_an_untrained_one(family, tmp_path):
    model = memory_model(family)
    model.save_pretrained(tmp_path)
    for cls in (type(model), AutoModelWithGRUMemory):
        with pytest.raises(ValueError, match="was saved with a memory.*from_pretrained"):
            cls.from_pretrained_with_memory(tmp_path)
        for settings in ({"decay": 0.5}, {"mode": "ephemeral"}, {"kept_in": "int4"}, {"sites": ("top",)}):
            with pytest.raises(ValueError, match=f"{next(iter(settings))} cannot be set.*brings its own"):
                cls.from_pretrained(tmp_path, **settings)
        loaded = cls.from_pretrained(pretrained_model_name_or_path=tmp_path, dtype=torch.float64)
        assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)


def test_a_base_model_that_refuses_a_memory_stays_a_base_model(tmp_path, monkeypatch):
    memory_model("llama").save_memory(tmp_path)
    base = base_model("gpt2")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: base)
    with pytest.raises(ValueError, match="llama"):
        AutoModelWithGRUMemory.from_pretrained("base", tmp_path)
    assert type(base).__name__ == "GPT2LMHeadModel"
    assert all(p.requires_grad for p in base.parameters())


# Copies and other processes


def test_a_model_can_be_pickled_and_copied(family):
    model = memory_model(family)
    model.memory_state = model(random_ids()).memory_state.detach()
    ids, wanted = random_ids(2, 4, seed=8), model.memory_fingerprint()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(twin(ids).logits, model(ids).logits)
        assert_same_state(twin.memory_state, model.memory_state, 0)
        assert twin.memory_fingerprint() == wanted
        twin.reset(2)
        with torch.no_grad():
            twin.memory_sites()["top"].gate.zero_()
        assert not torch.equal(twin(ids).logits, model(ids).logits)
        assert (twin.memory_fingerprint() == wanted) is False
    assert model.memory_fingerprint() == wanted


def test_a_copy_takes_another_memory_without_touching_the_first(family, tmp_path):
    model = memory_model(family)
    memory_model(family, sites=("layer:1",), cell="mingru").save_memory(tmp_path)
    before, twin = model(random_ids()).logits, copy.deepcopy(model)
    twin.load_memory(tmp_path)
    assert torch.equal(model(random_ids()).logits, before)
    fresh = memory_model(family, sites=("layer:1",), cell="mingru")
    assert torch.equal(twin(random_ids()).logits, fresh(random_ids()).logits)


def test_a_model_goes_to_another_process(family, tmp_path):
    """A fresh interpreter has made no class yet; it is where a worker that is not forked starts."""
    model = memory_model(family)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys; model = pickle.load(open(sys.argv[1], 'rb'));"
        "sys.stdout.write(type(model).__name__ + ' ' + model.memory_fingerprint())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == f"{type(model).__name__} {model.memory_fingerprint()}", done.stderr


class Own(memory_class(LlamaForCausalLM)):
    """A class of somebody's own, which pickle finds by its name."""


def test_a_class_of_your_own_stays_what_it_is():
    model = Own(base_model("llama").config).eval()
    assert type(pickle.loads(pickle.dumps(model))) is Own
    assert type(copy.deepcopy(model)) is Own

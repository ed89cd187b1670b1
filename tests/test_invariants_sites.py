"""Where memories can be, modules of one's own among them, and models that are saved, loaded and copied with them."""

import copy
import json

import pytest
import torch
from decoding import OFTEN, assert_state_after, some_state
from safetensors import safe_open
from shared_models import no_state_stays, one_a_family, one_of_each_kind  # noqa: F401 (fixtures)
from tiny import (
    FAMILIES,
    LAYERS,
    SumSite,
    assert_close,
    assert_same_state,
    base_model,
    gradients,
    loss_of,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    own_site_model,
    random_ids,
)
from transformers import AutoModelForCausalLM

from gru_memory import AutoModelWithGRUMemory, GPT2WithGRUMemory, MemoryConfig, MemoryState, add_memory

# Sites


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings", ({"sites": ("layer:0", "layer:2")}, {"sites": ("layer:3", "top"), "key_layers": (0, 2)})
)
def test_other_places(family, settings, tmp_path):
    model, ids = memory_model(family, **settings), random_ids()
    assert tuple(model.memory_sites()) == settings["sites"]
    whole = model(ids, use_cache=False)
    one = model(ids[:, :7], use_cache=True)
    two = model(ids[:, 7:], past_key_values=one.past_key_values)
    assert_close(torch.cat([one.logits, two.logits], 1), whole.logits)
    assert_same_state(two.memory_state, whole.memory_state)
    sequences = model.generate(ids, max_new_tokens=4, do_sample=True, eos_token_id=OFTEN)
    assert_state_after(model, model.memory_state, sequences, ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded(ids, use_cache=False).logits, whole.logits)


def test_places_read_what_they_name():
    """`layer:K` takes the output of block K, 'middle' that of block n // 2, 'input' what enters block 0."""
    ids = random_ids()
    seen = {}
    for site in ("input", "layer:0", "middle", "layer:2", "top"):
        spy = SumSite()
        spy.register_forward_pre_hook(
            lambda module, args, kwargs, site=site: seen.update({site: args[0]}), with_kwargs=True
        )
        add_memory(base_model("llama").double(), MemoryConfig(sites=(site,)), {site: spy})(ids)
    base = base_model("llama").double()
    hidden = base(ids, output_hidden_states=True).hidden_states
    assert torch.equal(seen["input"], hidden[0])
    assert torch.equal(seen["layer:0"], hidden[1])
    assert torch.equal(seen["middle"], hidden[LAYERS // 2 + 1])
    assert torch.equal(seen["layer:2"], seen["middle"])
    assert torch.equal(seen["top"], hidden[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_site_of_your_own(family, tmp_path):
    """Any module with `initial_state` and the documented `forward` is a memory."""
    model, ids = own_site_model(family), random_ids()
    whole = model(ids, use_cache=False)
    one = model(ids[:, :7], use_cache=True)
    two = model(ids[:, 7:], past_key_values=one.past_key_values)
    assert_close(torch.cat([one.logits, two.logits], 1), whole.logits)
    assert_same_state(two.memory_state, whole.memory_state)
    for strategy in ({"do_sample": True}, {"num_beams": 3, "do_sample": False}):
        model.reset(2)
        sequences = model.generate(ids, max_new_tokens=5, eos_token_id=OFTEN, **strategy)
        assert_state_after(model, model.memory_state, sequences, ids)
    state = model.memory_state
    state.save(tmp_path / "state")
    assert_same_state(MemoryState.load(tmp_path / "state", model.memory_fingerprint()), state, 0)
    found = gradients(model, loss_of(model(ids, use_cache=False).logits))
    assert found["gru_memory.middle.scale"].abs().max() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ()}, "sites is empty"),
        ({"sites": ("top", "top")}, "twice"),
        ({"sites": ("bottom",)}, "unknown site"),
        ({"sites": (f"layer:{LAYERS}",)}, "does not exist"),
        ({"key_layers": (LAYERS,)}, "key layer"),
        ({"key_layers": (-1,)}, "key layer"),
        ({"sites": ("input", "top"), "key_layers": (0,)}, "before every site"),
        ({"mode": "sometimes"}, "mode"),
        ({"num_heads": 2.0}, "num_heads"),
    ],
)
def test_impossible_memories_are_refused_and_the_model_is_as_before(settings, message):
    base = base_model()
    kind, wanted = type(base), base(random_ids()).logits
    with pytest.raises(ValueError, match=message):
        add_memory(base, MemoryConfig(**settings))
    assert type(base) is kind
    assert all(p.requires_grad for p in base.parameters())
    assert not any(name.startswith("gru_memory") for name, _ in base.named_modules())
    assert torch.equal(base(random_ids()).logits, wanted)
    with pytest.raises(ValueError, match="not in config"):
        add_memory(base, MemoryConfig(sites=("top",)), {"middle": SumSite()})
    assert type(base) is kind


def test_a_second_memory_replaces_the_first():
    model = memory_model()
    add_memory(model, MemoryConfig(sites=("top",), num_heads=1, num_slots=2, slot_size=4))
    assert list(model.memory_sites()) == ["top"]
    assert torch.equal(model(random_ids()).logits, base_model().double()(random_ids()).logits)
    assert type(model) is GPT2WithGRUMemory


# Saving, loading and copying


def test_a_model_saved_with_its_memory(model, tmp_path):
    ids, start = random_ids(), some_state(model)
    wanted = model(ids, memory_state=start, use_cache=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(model)
    assert loaded.memory_config == model.memory_config
    assert loaded.memory_fingerprint() == model.memory_fingerprint()
    got = loaded(ids, memory_state=start, use_cache=False)
    assert torch.equal(got.logits, wanted.logits)
    assert_same_state(got.memory_state, wanted.memory_state, 0)


def test_a_model_saved_with_its_memory_loads_as_its_base(family_model, tmp_path):
    family_model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with family_model.disable_memory():
        assert torch.equal(base(random_ids()).logits, family_model(random_ids()).logits)


def test_a_memory_saved_alone(model, tmp_path):
    ids, start = random_ids(), some_state(model)
    model.save_memory(tmp_path)
    files = {"memory_config.json", "memory_model.safetensors", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == files
    with safe_open(tmp_path / "memory_model.safetensors", "pt") as file:
        saved = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
        assert all(name.split(".")[0] in model.memory_config.sites for name in file.keys())  # noqa: SIM118
    assert saved == model.num_memory_parameters()
    other = add_memory(base_model(model.config.model_type)).double()
    other.load_memory(tmp_path)
    assert torch.equal(
        other(ids, memory_state=start, use_cache=False).logits,
        model(ids, memory_state=start, use_cache=False).logits,
    )
    assert other.memory_fingerprint() == model.memory_fingerprint()
    found = gradients(other, loss_of(other(ids).logits))
    assert all(name.startswith("gru_memory.") for name in found)


def test_a_base_model_and_a_memory_by_their_folders(family_model, tmp_path):
    base_model(family_model.config.model_type).double().save_pretrained(tmp_path / "base")
    family_model.save_memory(tmp_path / "memory")
    model = AutoModelWithGRUMemory.from_pretrained(tmp_path / "base", tmp_path / "memory", dtype=torch.float64)
    assert torch.equal(model(random_ids()).logits, family_model(random_ids()).logits)
    with pytest.raises(ValueError, match="memory="):
        AutoModelWithGRUMemory.from_pretrained(tmp_path / "base")


def test_a_memory_of_another_model_is_refused(tmp_path):
    memory_model("llama").save_memory(tmp_path)
    model = memory_model("gpt2")
    before = model(random_ids()).logits
    model.memory_state = state = some_state(model)
    with pytest.raises(ValueError, match="llama"):
        model.load_memory(tmp_path)
    assert torch.equal(model(random_ids()).logits, before)
    assert model.memory_state is state


def test_a_damaged_memory_is_refused(tmp_path):
    model = memory_model()
    before = model(random_ids()).logits
    model.save_memory(tmp_path)
    weights, config = tmp_path / "memory_model.safetensors", tmp_path / "memory_config.json"
    good_weights, good_config = weights.read_bytes(), config.read_text()
    values = json.loads(good_config)
    for path, content in (
        (weights, good_weights[: len(good_weights) // 2]),
        (config, b"{"),
        (config, b"[]"),
        (config, json.dumps({**values, "num_slots": 5}).encode()),
        (config, json.dumps({**values, "sites": ["top", "layer:1"]}).encode()),
        (config, json.dumps({**values, "sites": 3}).encode()),
        (config, json.dumps({**values, "format_version": 99}).encode()),
        (config, json.dumps({**values, "surprise": 1}).encode()),
        (config, json.dumps({k: v for k, v in values.items() if k != "base_model"}).encode()),
    ):
        weights.write_bytes(good_weights)
        config.write_text(good_config)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"memory|format|fields"):
            model.load_memory(tmp_path)
        assert torch.equal(model(random_ids()).logits, before)
    with pytest.raises(ValueError, match="holds no memory"):
        model.load_memory(tmp_path / "nowhere")


def test_copies_are_independent(family_model):
    ids, twin = random_ids(), copy.deepcopy(family_model)
    assert torch.equal(twin(ids).logits, family_model(ids).logits)
    with torch.no_grad():
        twin.memory_sites()["top"].gate.zero_()
    assert not torch.equal(twin(ids).logits, family_model(ids).logits)
    twin.generate(ids, max_new_tokens=2)
    assert family_model.memory_state is None

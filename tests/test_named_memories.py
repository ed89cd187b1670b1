"""Several memories on one model: each is what it would be alone, and none touches another."""

import copy
import pickle

import pytest
import torch
from talking import talking_model, talking_tokenizer
from tiny import (
    SumSite,
    assert_same_state,
    base_model,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    random_ids,
)

from gru_memory import AutoModelWithGRUMemory, Conversation, MemoryConfig, MemoryState, add_memory

# Of other sites, cells and clocks, so that nothing of one can pass for the other
DEFAULT = {"sites": ("input", "middle", "top")}
FRENCH = {"sites": ("layer:1", "top"), "cell": "mingru", "decay": 0.5, "decay_every": "turn", "key_layers": (0,)}


@pytest.fixture(params=("gpt2", "llama"))
def family(request):
    return request.param


@pytest.fixture
def folder(family, tmp_path):
    memory_model(family, **FRENCH).save_memory(tmp_path / "fr")
    return tmp_path / "fr"


@pytest.fixture
def model(family, folder):
    """Two memories; "default" is active."""
    model = memory_model(family, **DEFAULT)
    model.load_memory(folder, name="fr")
    return model


def alone(family, name):
    return memory_model(family, **(DEFAULT if name == "default" else FRENCH))


def hooks(model):
    """How many hooks there are on all parts of the model."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def said(model, prompt=0, **settings):
    return model.generate(
        random_ids(2, 6, seed=prompt), max_new_tokens=5, do_sample=False, eos_token_id=None, **settings
    )


def test_loading_under_a_name_changes_nothing_yet(family, model):
    assert list(model.memories) == ["default", "fr"]
    assert model.memories["fr"].decay == 0.5
    assert model.active_memory == "default"
    assert model.memory_config is model.memories["default"]
    assert torch.equal(model(random_ids()).logits, alone(family, "default")(random_ids()).logits)


def test_each_memory_is_what_it_would_be_alone(family, model):
    for name in ("fr", "default", "fr"):
        model.set_memory(name)
        single = alone(family, name)
        assert model.active_memory == name
        assert model.memory_config == single.memory_config
        assert model.memory_fingerprint() == single.memory_fingerprint()
        assert hooks(model) == hooks(single)
        got, wanted = model(random_ids(), use_cache=False), single(random_ids(), use_cache=False)
        assert torch.equal(got.logits, wanted.logits)
        assert_same_state(got.memory_state, wanted.memory_state, 0)


def test_each_memory_keeps_its_own_state(family, model):
    """Two conversations that take turns are as two conversations apart."""
    singles = {name: alone(family, name) for name in ("default", "fr")}
    for turn, name in enumerate(("default", "fr", "default", "default", "fr")):
        model.set_memory(name)
        assert torch.equal(said(model, turn), said(singles[name], turn))
        assert_same_state(model.memory_state, singles[name].memory_state)
    model.reset(2)
    model.set_memory("default")
    assert_same_state(model.memory_state, singles["default"].memory_state)  # only the active one was reset


def test_without_memory_the_model_is_its_base_whichever_is_set(family, model):
    base = base_model(family).double()
    for name in ("fr", "default"):
        model.set_memory(name)
        with model.disable_memory():
            assert torch.equal(model(random_ids()).logits, base(random_ids()).logits)


def test_the_state_of_one_memory_is_refused_by_another(model, tmp_path):
    with torch.no_grad():
        state = model(random_ids()).memory_state
        cache = model(random_ids(), use_cache=True).past_key_values
    state.save(tmp_path / "state")
    model.set_memory("fr")
    message = r"belongs to the memory 'default'.*set_memory\('default'\)"
    for wrong in (
        lambda: model(random_ids(), memory_state=state),
        lambda: model(random_ids(), past_key_values=cache),
        lambda: said(model, memory_state=state),
        lambda: setattr(model, "memory_state", state),
        lambda: model.train()(random_ids(), memory_state=state),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ValueError, match="another model or memory"):
        MemoryState.load(tmp_path / "state", model.memory_fingerprint())
    assert model.memory_state is None
    model.eval().set_memory("default")
    said(model, memory_state=state)


def test_memories_that_differ_in_weights_alone_refuse_each_others_states(family, model, tmp_path):
    twin = alone(family, "default")
    with torch.no_grad():
        twin.memory_sites()["top"].key.weight.add_(0.01)
    twin.save_memory(tmp_path / "twin")
    model.load_memory(tmp_path / "twin", "twin")
    state = model(random_ids()).memory_state.detach()
    model.set_memory("twin")
    with pytest.raises(ValueError, match="belongs to the memory 'default'"):
        model(random_ids(), memory_state=state)


def test_one_memory_under_two_names_shares_its_states(family, model, tmp_path):
    model.save_memory(tmp_path / "again")
    model.load_memory(tmp_path / "again", "again")
    state = model(random_ids()).memory_state.detach()
    wanted = model(random_ids(2, 3), memory_state=state).logits
    model.set_memory("again")
    assert torch.equal(model(random_ids(2, 3), memory_state=state).logits, wanted)


def test_a_conversation_is_held_with_one_memory(family, tmp_path):
    model = talking_model(family)
    talking_model(family, decay=0.5).save_memory(tmp_path)
    model.load_memory(tmp_path, "fr")
    chat = Conversation(model, talking_tokenizer(family), max_new_tokens=4)
    chat.read("My boat is called Marigold.")
    state = chat.state
    model.set_memory("fr")
    for take in (chat.read, chat.say):
        with pytest.raises(ValueError, match="belongs to the memory 'default'"):
            take("What is my boat called?")
    assert chat.state is state
    assert chat.turns == 1
    model.set_memory("default")
    chat.say("What is my boat called?")


# Learning


def test_only_the_active_memory_learns(model):
    for name, prefix in (("default", "gru_memory."), ("fr", "gru_memory_fr."), ("default", "gru_memory.")):
        model.set_memory(name)
        assert {id(p) for p in model.memory_parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
        model(random_ids(), labels=random_ids()).loss.backward()
        found = {key for key, p in model.named_parameters() if p.grad is not None}
        assert found
        assert all(key.startswith(prefix) for key in found)
        assert model.num_memory_parameters() == sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.zero_grad()
    model.freeze_base()
    assert not any(p.requires_grad for key, p in model.named_parameters() if key.startswith("gru_memory_fr."))


def test_all_memories_move_with_the_model(family, model):
    model.to(torch.bfloat16)
    model.set_memory("fr")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(random_ids()).logits, alone(family, "fr").to(torch.bfloat16)(random_ids()).logits)


# Saving


def test_one_memory_of_several_is_saved_by_its_name(family, model, folder, tmp_path):
    weights = "memory_model.safetensors"
    model.save_memory(tmp_path / "one", "fr")
    assert (tmp_path / "one" / weights).read_bytes() == (folder / weights).read_bytes()
    model.save_memory(tmp_path / "active")
    single = add_memory(base_model(family)).double()
    single.load_memory(tmp_path / "active")
    assert single.memory_fingerprint() == model.memory_fingerprint()
    with pytest.raises(ValueError, match=r"no memory is called 'de' \(there are: default, fr\)"):
        model.save_memory(tmp_path / "none", "de")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("active", ("default", "fr"))
def test_a_model_is_saved_with_all_of_its_memories(family, model, active, tmp_path):
    model.set_memory(active)
    model.memory_config.mode = "ephemeral"
    model.save_pretrained(tmp_path)
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path, dtype=torch.float64)
    assert list(loaded.memories) == ["default", "fr"]
    assert loaded.memories == model.memories
    assert loaded.active_memory == active
    assert {id(p) for p in loaded.memory_parameters()} == {id(p) for p in loaded.parameters() if p.requires_grad}
    for name in ("default", "fr"):
        loaded.set_memory(name)
        assert torch.equal(loaded(random_ids()).logits, alone(family, name)(random_ids()).logits)


def test_weights_that_are_missing_start_as_their_own_memory_says(family, model, tmp_path):
    """Not as the active one says, whose sizes are others."""
    model.save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    config.gru_memory["memories"]["de"] = {"sites": ["top"], "num_slots": 3, "slot_size": 5, "gate_init": 0.25}
    loaded, information = type(model).from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert all(key.startswith("gru_memory_de.") for key in information["missing_keys"])
    loaded.set_memory("de")
    site = loaded.memory_sites()["top"]
    assert site.gate.item() == 0.25
    assert torch.equal(site.query.weight, site.key.weight)
    assert torch.equal(site.output.weight, site.value_embed.weight.t())


def test_copies_and_pickles_hold_all_memories(family, model):
    said(model)
    model.set_memory("fr")
    said(model, 1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (list(twin.memories), twin.active_memory) == (["default", "fr"], "fr")
        assert_same_state(twin.memory_state, model.memory_state, 0)
        twin.set_memory("default")
        assert twin.memory_state.tokens.tolist() == [11, 11]
        assert torch.equal(twin(random_ids()).logits, alone(family, "default")(random_ids()).logits)
    assert model.active_memory == "fr"


# Replacing and deleting


def test_a_memory_is_replaced_under_its_name(family, model, tmp_path):
    said(model)
    kept = model.memory_state
    memory_model(family, sites=("top",)).save_memory(tmp_path / "other")
    model.load_memory(tmp_path / "other", "fr")
    assert list(model.memories) == ["default", "fr"]
    assert model.memory_state is kept
    model.set_memory("fr")
    assert model.memory_state is None
    assert torch.equal(model(random_ids()).logits, memory_model(family, sites=("top",))(random_ids()).logits)
    said(model)
    model.set_memory("default")
    model.load_memory(tmp_path / "other", "fr")  # the state that waited belonged to what was there before
    model.set_memory("fr")
    assert model.memory_state is None
    model.load_memory(tmp_path / "other")  # no name: the active one
    assert list(model.memories) == ["default", "fr"]
    assert model.active_memory == "fr"


def test_a_memory_that_is_deleted_leaves_nothing(family, model, tmp_path):
    with pytest.raises(ValueError, match="'default' is in use"):
        model.delete_memory("default")
    for name in ("de", "", None, 3):
        with pytest.raises(ValueError, match=r"no memory is called|is in use"):
            model.delete_memory(name)
    model.set_memory("fr")
    model.delete_memory("default")
    assert list(model.memories) == ["fr"]
    assert not any(name.startswith("gru_memory.") for name in model.state_dict())
    with pytest.raises(ValueError, match="no memory is called 'default'"):
        model.set_memory("default")
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert (list(loaded.memories), loaded.active_memory) == (["fr"], "fr")
    assert torch.equal(loaded(random_ids()).logits, alone(family, "fr")(random_ids()).logits)
    loaded.load_memory(tmp_path / "fr")
    assert list(loaded.memories) == ["fr"]


def test_a_refused_memory_changes_none(family, model, folder, tmp_path):
    before, memories, keys = model(random_ids()).logits, model.memories, list(model.state_dict())
    said(model)
    state = model.memory_state
    (folder / "memory_model.safetensors").write_bytes(b"damaged")
    for name in ("fr", "de", None):
        with pytest.raises(ValueError, match="damaged"):
            model.load_memory(folder, name)
    with pytest.raises(ValueError, match="no memory is called 'de'"):
        model.set_memory("de")
    with pytest.raises(ValueError, match="does not exist"):
        model.attach_memory(MemoryConfig(sites=("layer:9",)), name="de")
    assert (model.memories, list(model.state_dict()), model.active_memory) == (memories, keys, "default")
    assert model.memory_state is state
    assert torch.equal(model(random_ids()).logits, before)
    model.set_memory("fr")
    assert torch.equal(model(random_ids()).logits, alone(family, "fr")(random_ids()).logits)


@pytest.mark.parametrize("name", ("", "de.fault", "a/b", "-x", 3, "é"))
def test_names_that_cannot_be(name, model, folder):
    with pytest.raises(ValueError, match="cannot be the name"):
        model.load_memory(folder, name)


@pytest.mark.parametrize("name", ("keys", "to", "de-AT", "7"))
def test_names_that_mean_something_elsewhere(name, family, model, folder, tmp_path):
    model.load_memory(folder, name)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path / "model", dtype=torch.float64)
    loaded.set_memory(name)
    assert torch.equal(loaded(random_ids()).logits, alone(family, "fr")(random_ids()).logits)


def test_a_memory_of_your_own_under_a_name(family):
    model = memory_model(family)
    model.attach_memory(MemoryConfig(sites=("top",)), {"top": SumSite().double()}, "sum")
    assert model.active_memory == "default"
    model.set_memory("sum")
    single = add_memory(base_model(family).double(), MemoryConfig(sites=("top",)), {"top": SumSite().double()})
    assert torch.equal(model(random_ids()).logits, single(random_ids()).logits)


def test_a_base_model_has_no_memories_to_ask_for():
    assert not hasattr(base_model(), "memories")
    model = memory_model()
    model.__dict__["_active_memory"] = None
    assert not hasattr(model, "memory_config")

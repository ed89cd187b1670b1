"""Models that change their precision, lie on several devices, or whose weights are fetched when they are needed."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import send_to_device
from decoding import assert_state_after, at_word
from talking import talking_base, talking_model, talking_tokenizer
from tiny import (
    SumSite,
    assert_close,
    assert_same_state,
    base_model,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    random_ids,
    wake,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from gru_memory import AutoModelWithGRUMemory, Conversation, MemoryConfig, MemoryState, add_memory
from gru_memory.base_identity import weights_digest
from gru_memory.editing import diff
from gru_memory.inspection import trace
from gru_memory.placement import device_for
from gru_memory.scan import registry

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
CONFIG = {"sites": ("input", "middle", "top"), "num_heads": 2, "num_slots": 4, "slot_size": 8, "cell": "mingru"}


@pytest.fixture(params=("gpt2", "llama"))
def family(request):
    return request.param


# Precision


@pytest.mark.parametrize("cast", ("half", "bfloat16", "float", "to"))
def test_a_conversation_goes_on_in_another_precision(family, cast, tmp_path):
    """A cast is no other memory: the model's own state, one in a file and the parked one of another memory stay valid."""
    model = memory_model(family)
    model.attach_memory(MemoryConfig(**CONFIG), name="second")
    wake(model)
    model.generate(random_ids(), **GREEDY)
    model.set_memory("second")
    model.generate(random_ids(), **GREEDY)
    second = model.memory_fingerprint()
    model.set_memory("default")
    state, fingerprint = model.memory_state, model.memory_fingerprint()
    state.save(tmp_path / "state")
    before = model(random_ids(2, 4), memory_state=state).logits
    model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    assert model.dtype != torch.float64
    assert model.memory_fingerprint() == fingerprint
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kept = MemoryState.load(tmp_path / "state", other.memory_fingerprint())
        assert (other(random_ids(2, 4), memory_state=kept).logits.double() - before).abs().mean() < 0.2
        other.generate(random_ids(2, 25, seed=3), **GREEDY)
        assert other.memory_state.tokens.tolist() == [24 + 29] * 2
        other.set_memory("second")
        assert other.memory_fingerprint() == second
        other.generate(random_ids(2, 25, seed=3), **GREEDY)
    model.double()  # rounded once, it is not what it was, but the same memory all the same
    model.set_memory("default")
    assert model.memory_fingerprint() == fingerprint
    with torch.no_grad():
        next(model.memory_parameters()).add_(0.1)
    assert model.memory_fingerprint() != fingerprint
    with pytest.raises(ValueError, match="another model or by a memory with other weights"):
        model.generate(random_ids(), memory_state=state, **GREEDY)


def test_a_model_that_was_cast_is_saved_as_the_memory_it_is(family, tmp_path):
    """Also saved once more, and with several memories."""
    model = memory_model(family)
    model.attach_memory(MemoryConfig(**CONFIG), name="second")
    fingerprints = {name: model._fingerprint_of(name) for name in model.memories}
    model.bfloat16().save_pretrained(tmp_path / "once")
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path / "once", dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "twice")
    for folder in ("once", "twice"):
        loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        assert {name: loaded._fingerprint_of(name) for name in loaded.memories} == fingerprints
    with torch.no_grad():
        next(loaded.memory_parameters()).add_(0.1)
    loaded.save_pretrained(tmp_path / "changed")
    changed = AutoModelWithGRUMemory.from_pretrained(tmp_path / "changed", dtype=torch.bfloat16)
    assert changed.memory_fingerprint() == loaded.memory_fingerprint() not in fingerprints.values()


def test_the_state_of_a_site_of_your_own_is_cast_along():
    """It adds what it kept to what it reads, so they must be of one type."""
    config = MemoryConfig(sites=("middle", "top"), num_heads=2, num_slots=4, slot_size=8)
    model = wake(add_memory(base_model("llama"), config, {"middle": SumSite()})).double()
    model.generate(random_ids(), **GREEDY)
    model.float()
    assert {tensor.dtype for tensor in model.memory_state.sites["middle"].values()} == {torch.float32}
    model.generate(random_ids(2, 25), **GREEDY)
    assert model.memory_state.tokens.tolist() == [24 + 29] * 2


def test_a_memory_that_is_loaded_into_another_precision_takes_its_states(family, tmp_path):
    model = memory_model(family).float()
    model.save_memory(tmp_path / "memory")
    base_model(family).save_pretrained(tmp_path / "base")
    model.generate(random_ids(), **GREEDY)
    model.memory_state.save(tmp_path / "state")
    half = AutoModelWithGRUMemory.from_pretrained(tmp_path / "base", memory=tmp_path / "memory", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.memory_state = MemoryState.load(tmp_path / "state", half.memory_fingerprint())
    half.generate(random_ids(2, 3), **GREEDY)


def test_states_move_with_the_model(family):
    model = memory_model(family)
    model.attach_memory(MemoryConfig(**CONFIG), name="second")
    for name in ("default", "second"):
        model.set_memory(name)
        model.reset(2)
    model.to("meta")
    for name in ("second", "default"):
        model.set_memory(name)
        assert {tensor.device.type for tensor in model.memory_state._tensors()} == {"meta"}


# Weights that are fetched


PARTS = {
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h", "transformer.ln_f", "lm_head"),
    "llama": ("model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm", "lm_head"),
}
BLOCKS = ("transformer.h", "model.layers")


def device_map(family, fetched):
    on_disk = BLOCKS if fetched == "blocks" else PARTS[family]
    return {part: "disk" if part in on_disk else "cpu" for part in PARTS[family]}


def assert_works_like(model, plain):
    """Logits, state, decoding, a cut of the text in the cache, and a prompt of embeddings."""
    ids = random_ids()
    for one in (model, plain):
        one.memory_state = None
    wanted = plain(ids)
    got = model(ids)
    assert_close(got.logits, wanted.logits, 1e-5)
    assert_same_state(got.memory_state, wanted.memory_state, 1e-5)
    for settings in ({}, {"num_beams": 2}):
        model.memory_state = plain.memory_state = None
        sequences = model.generate(ids, **GREEDY, **settings)
        assert torch.equal(sequences, plain.generate(ids, **GREEDY, **settings))
        assert_same_state(model.memory_state, plain.memory_state, 1e-5)
        assert_state_after(plain, model.memory_state, sequences, ids, ended=at_word([]), tolerance=1e-5)
    if model.device.type != "meta":  # else transformers makes positions there, for its base models as well
        text = ids[:1].repeat(1, 2)
        guesses = {"prompt_lookup_num_tokens": 3, "memory_state": model.initial_memory_state(1)}
        assert torch.equal(model.generate(text, **GREEDY, **guesses), plain.generate(text, **GREEDY, **guesses))
    embeds = plain.get_input_embeddings()(ids)
    wanted, got = plain(inputs_embeds=embeds), model(inputs_embeds=embeds)
    assert_same_state(got.memory_state, wanted.memory_state, 1e-5)


@pytest.mark.parametrize("fetched", ("blocks", "all"))
@pytest.mark.parametrize("how", ("memory beside it", "saved whole", "added"))
def test_a_device_map_with_a_disk(family, how, fetched, tmp_path):
    """accelerate's hooks stand before every module, the model itself included, and weights are on the meta device outside."""
    plain = wake(add_memory(base_model(family), MemoryConfig(**CONFIG)))
    plain.save_memory(tmp_path / "memory")
    settings = {"device_map": device_map(family, fetched), "offload_folder": str(tmp_path / "disk")}
    if how == "saved whole":
        plain.save_pretrained(tmp_path / "model")
        settings["device_map"]["gru_memory"] = "cpu"
        model = AutoModelWithGRUMemory.from_pretrained(tmp_path / "model", **settings)
    else:
        base_model(family).save_pretrained(tmp_path / "model")
        memory = {"memory": tmp_path / "memory"} if how == "memory beside it" else CONFIG
        model = AutoModelWithGRUMemory.from_pretrained_with_memory(tmp_path / "model", **memory, **settings)
    assert any(p.device.type == "meta" for p in model.parameters())
    assert all(p.device.type == "cpu" for p in model.memory_parameters())
    if how == "added":
        model.load_memory(tmp_path / "memory")
    assert_works_like(model, plain)


@pytest.fixture(params=("gpt2", "llama"))
def talking(request):
    """A model all of whose own weights are fetched, the same where they are not, and their tokenizer."""
    plain, fetched = talking_model(request.param).float(), talking_base(request.param)
    cpu_offload(fetched, execution_device=torch.device("cpu"))
    fetched = add_memory(fetched, plain.memory_config)
    for mine, theirs in zip(fetched.memory_parameters(), plain.memory_parameters(), strict=True):
        mine.data.copy_(theirs.data)
    assert fetched.device.type == "meta" and fetched.memory_fingerprint() == plain.memory_fingerprint()
    return fetched, plain, talking_tokenizer(request.param)


def test_a_conversation_with_weights_that_are_fetched(talking):
    """`model.device` is no place to put tokens then."""
    *models, tokenizer = talking
    chats = [Conversation(model, tokenizer, max_new_tokens=4) for model in models]
    for text in ("My boat is called Marigold.", "Where do you live?"):
        first, second = (chat.say(text) for chat in chats)
        assert first == second
    assert_same_state(chats[0].state, chats[1].state, 1e-5)
    chats[0].load(chats[1].to_bytes())
    for model in models:
        model.remember("I live in Porto.", tokenizer)
        model.remember("Oh.", tokenizer)
    assert_same_state(models[0].memory_state, models[1].memory_state, 1e-5)


def test_a_difference_in_words_where_the_head_is_fetched(talking):
    fetched, plain, tokenizer = talking
    before = plain.initial_memory_state(1)
    after = trace(plain, tokenizer, [("My boat is called Marigold.", None)]).state
    wanted, got = (diff(model, tokenizer, before, after, top=3) for model in (plain, fetched))
    assert [word for word, _ in got.gained] == [word for word, _ in wanted.gained]
    assert [score for _, score in got.lost] == pytest.approx([score for _, score in wanted.lost], rel=1e-4)


def test_the_digest_of_weights_that_are_elsewhere_is_unknown(tmp_path):
    """So a memory is not refused because half of the model could not be looked at."""
    base = base_model("llama")
    assert weights_digest(base) is not None
    cpu_offload(base.model, execution_device=torch.device("cpu"))
    assert weights_digest(base) is None


def test_a_memory_that_is_itself_fetched_is_refused(family):
    model = memory_model(family)
    cpu_offload(model, execution_device=torch.device("cpu"))
    for call in (lambda: model(random_ids()), lambda: model.generate(random_ids(), **GREEDY), lambda: model.reset(1)):
        with pytest.raises(ValueError, match="'gru_memory': 'cpu'"):
            call()


def test_a_forward_that_was_replaced_is_refused(family):
    """`add_memory` changes the class, and something that holds the old `forward` would never get to the memory."""
    model = base_model(family)
    model.forward = torch.compile(model.forward, backend="eager")
    kind = type(model)
    with pytest.raises(ValueError, match="add the memory first"):
        add_memory(model)
    assert type(model) is kind
    del model.forward
    model = add_memory(model)
    model.forward = torch.compile(model.forward, backend="eager")
    add_memory(model, MemoryConfig(sites=("top",)))  # it was compiled with its memory


# Several devices


@pytest.fixture
def two_devices(monkeypatch):
    """Inside, "meta" is a device like any other: torch's fake tensors know where they are, and refuse to mix."""
    able = {name: form for name, form in registry.FORMS.items() if name != "compiled"}
    monkeypatch.setattr(registry, "FORMS", able)  # fake tensors have no numbers to hand over to compiled code
    allowed = torch._functorch.config.patch(fake_tensor_allow_meta=True)
    with allowed, FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("meta"), torch.device("cpu")


def spread(first, second, sites, key_layers=(), own=None):
    """A tiny Llama whose last two blocks, norm and head are on `second`, and each part takes its input to where it is."""
    model = base_model("llama")
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1"), first)
    places |= dict.fromkeys(("model.layers.2", "model.layers.3", "model.norm", "lm_head"), second)
    for name, place in places.items():
        for part in model.get_submodule(name).modules():
            for key, parameter in part._parameters.items():  # fake tensors do not take part in Module.to
                part._parameters[key] = None if parameter is None else torch.nn.Parameter(parameter.detach().to(place))
            for key, buffer in part._buffers.items():
                part._buffers[key] = buffer.to(place)
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, place=place: send_to_device(
                (args, kwargs), place, skip_keys="past_key_values"
            ),
            with_kwargs=True,
        )
    config = MemoryConfig(sites=sites, key_layers=key_layers, num_heads=2, num_slots=4, slot_size=8)
    return add_memory(model, config, own and {"middle": own()}).train()  # a fingerprint would ask for numbers


@pytest.mark.parametrize(
    ("sites", "key_layers", "own"),
    [(("input", "middle", "top"), (), None), (("layer:1", "top"), (0,), None), (("middle", "top"), (), SumSite)],
)
def test_a_model_on_two_devices(two_devices, sites, key_layers, own):
    """The memory lies with the head; the state, like the outputs, where the input was."""
    first, second = two_devices
    model = spread(first, second, sites, key_layers, own)
    assert {p.device for p in model.memory_parameters()} == {second}
    ids = torch.zeros(2, 6, dtype=torch.long, device=first)
    output = model(ids, use_cache=False)
    assert output.logits.shape == (2, 6, 101)
    assert {t.device for t in output.memory_state._tensors()} == {first}
    again = model(ids, memory_state=output.memory_state, use_cache=False, labels=ids)
    assert again.loss.shape == () and again.memory_state.tokens.shape == (2,)
    model(ids, memory_state=output.memory_state.to(second), use_cache=False)
    cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :1], past_key_values=cache)
    with pytest.raises(RuntimeError, match="device"):  # fake tensors would tell
        torch.zeros(2, device=first) + torch.zeros(2, device=second)


def test_a_device_is_known_by_its_name_or_refused():
    assert device_for("cpu") == torch.device("cpu")
    assert device_for().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("no such thing", "cuda:99"):
        with pytest.raises(ValueError, match=f"device is '{name}', which torch cannot use here.*choose 'cpu'"):
            device_for(name)
    with pytest.raises(ValueError, match="device is 'meta', which holds no numbers"):
        device_for("meta")

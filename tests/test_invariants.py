"""What must hold of a model with memory, whatever its family, cell and clock."""

import copy
import json
import threading

import pytest
import torch
import transformers
from decoding import OFTEN, assert_state_after, some_state
from packaging.version import Version
from safetensors import safe_open
from tiny import (
    CELLS,
    FAMILIES,
    KINDS,
    LAYERS,
    PAD,
    SumSite,
    assert_close,
    assert_differ,
    assert_same_state,
    base_model,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    random_ids,
    wake,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor, LogitsProcessorList

from gru_memory import AutoModelWithGRUMemory, GPT2WithGRUMemory, MemoryConfig, MemoryState, add_memory
from gru_memory import scan as recurrence


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def model(request):
    """One of each kind. Tests that change weights must not use it."""
    family, cell, clock = request.param
    return memory_model(family, cell=cell, decay_every=clock)


@pytest.fixture(scope="module", params=FAMILIES)
def family_model(request):
    """One a family."""
    return memory_model(request.param, cell="mingru", decay_every="turn")


@pytest.fixture(autouse=True)
def clean(request):
    """Models are shared by tests: none may leave a state behind."""
    yield
    for name in ("model", "family_model"):
        if name in request.fixturenames:
            request.getfixturevalue(name).memory_state = None


def padded(ids, left=0, right=0):
    """`ids` between pad tokens, with the mask and positions that go with them."""
    ids = F.pad(ids, (left, right), value=PAD)
    mask = torch.zeros_like(ids)
    mask[:, left : ids.shape[1] - right] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


# 1. Whole = chunks = token by token


@pytest.mark.parametrize("sizes", ([7, 1, 12], [1] * 20), ids=("chunks", "tokens"))
def test_whole_is_chunks_is_tokens(model, sizes):
    ids, start = random_ids(), some_state(model)
    whole = model(ids, memory_state=start, use_cache=False)
    cache, state, logits = None, start, []
    for part in ids.split(sizes, dim=1):
        output = model(part, past_key_values=cache, memory_state=state, use_cache=True)
        cache, state = output.past_key_values, None  # from here on the cache carries the memory
        logits.append(output.logits)
    assert_close(torch.cat(logits, 1), whole.logits)
    assert_same_state(output.memory_state, whole.memory_state)
    assert_differ(whole.memory_state, start)


def test_packed_turns_are_separate_calls(model):
    """A row of turns whose positions restart: attention sees one turn, memory sees all."""
    lengths = [5, 1, 9, 5]
    ids = random_ids(2, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packed = model(ids, position_ids=positions, use_cache=False)
    state, logits = None, []
    for turn in ids.split(lengths, dim=1):
        output = model(turn, memory_state=state, use_cache=False)
        state = output.memory_state
        logits.append(output.logits)
    assert_close(packed.logits, torch.cat(logits, 1))
    assert_same_state(packed.memory_state, state)
    assert state.turns.tolist() == [4, 4]
    assert state.tokens.tolist() == [20, 20]


def test_the_memory_is_heard(model):
    ids = random_ids()
    without = model(ids, use_cache=False).logits
    assert (model(ids, memory_state=some_state(model), use_cache=False).logits - without).abs().max() > 1e-3


# 2. Padding and other rows


@pytest.mark.parametrize("side", ("left", "right"))
def test_padding_changes_nothing(model, side):
    ids, start = random_ids(), some_state(model)
    wanted = model(ids, memory_state=start, use_cache=False)
    got = model(**padded(ids, **{side: 6}), memory_state=start, use_cache=False)
    assert_close(got.logits[:, 6:] if side == "left" else got.logits[:, :20], wanted.logits)
    assert_same_state(got.memory_state, wanted.memory_state)


@pytest.mark.parametrize("positions", (True, False), ids=("positions", "no positions"))
def test_padding_in_chunks(positions):
    """The first chunk of a row may be all padding; its turn begins in a later one."""
    model = memory_model("llama", decay_every="turn")
    inputs, start = padded(random_ids(2, 9), left=6), some_state(model)
    inputs["attention_mask"][1, :6] = 1
    inputs["input_ids"][1, :6] = 50
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    whole = model(**inputs, memory_state=start, use_cache=False)
    cache, state, at = None, start, 0
    for size in (2, 3, 1, 4, 5):
        part = slice(at, at + size)
        output = model(
            inputs["input_ids"][:, part],
            attention_mask=inputs["attention_mask"][:, : at + size],
            position_ids=inputs["position_ids"][:, part] if positions else None,
            past_key_values=cache,
            memory_state=state,
            use_cache=True,
        )
        cache, state, at = output.past_key_values, output.memory_state, at + size
    assert_same_state(state, whole.memory_state) if positions else assert_turns(state, whole.memory_state)


def assert_turns(state, wanted):
    assert state.turns.tolist() == wanted.turns.tolist()
    assert state.tokens.tolist() == wanted.tokens.tolist()


def test_other_rows_change_nothing(model):
    ids, start = random_ids(3), some_state(model, 3)
    whole = model(ids, memory_state=start, use_cache=False)
    for row in range(3):
        alone = model(ids[row : row + 1], memory_state=start.select(row), use_cache=False)
        assert_close(whole.logits[row : row + 1], alone.logits)
        assert_same_state(whole.memory_state.select(row), alone.memory_state)


def test_an_all_padding_row_keeps_its_state(model):
    ids, start = random_ids(), some_state(model)
    mask = torch.ones_like(ids)
    mask[1] = 0
    state = model(ids, attention_mask=mask, memory_state=start, use_cache=False).memory_state
    assert_same_state(state.select(1), start.select(1), 0)


def test_memory_mask_hides_tokens_from_memory_only(model):
    """Context that memory knows already: attention sees it, nothing is written."""
    ids, start = random_ids(2, 12), some_state(model)
    seen = torch.ones_like(ids, dtype=torch.bool)
    seen[:, :5] = False
    state = model(ids, memory_mask=seen, memory_state=start, use_cache=False).memory_state
    assert state.tokens.tolist() == [15, 15]
    assert state.turns.tolist() == [2, 2]  # the turn ticks with its first token that is written
    seen[:] = False
    state = model(ids, memory_mask=seen, memory_state=start, use_cache=False).memory_state
    for site, kept in start.sites.items():
        assert torch.equal(state.sites[site]["slots"], kept["slots"])
    assert state.pending.tolist() == [True, True]


@torch.no_grad()
def test_a_memory_mask_is_about_the_tokens_fed(family_model):
    """That of a whole prompt serves its chunks; one that ends before the tokens fed says nothing of them."""
    ids, cache = random_ids(2, 8), DynamicCache()
    seen = torch.arange(8).expand(2, -1) != 4
    family_model(ids[:, :5], past_key_values=cache, memory_mask=seen)
    state = family_model(ids[:, 5:7], past_key_values=cache, memory_mask=seen).memory_state
    assert_same_state(state, family_model(ids[:, :7], memory_mask=seen[:, :7]).memory_state)
    with pytest.raises(ValueError, match=r"memory_mask has 7 column.* or also for the 7 in the cache"):
        family_model(ids[:, 7:], past_key_values=cache, memory_mask=seen[:, :7])
    with pytest.raises(ValueError, match=r"memory_mask has 8 column\(s\) for 1 token"):
        family_model(ids[:, 7:], memory_state=state, memory_mask=seen)
    state = family_model(ids[:, 7:], past_key_values=cache, memory_mask=seen).memory_state
    assert state.tokens.tolist() == [7, 7]


# The stateful shell


def test_persistent_memory_goes_on_from_call_to_call(model):
    prompts = [random_ids(2, 6, seed=seed) for seed in range(3)]
    state = None
    model.reset(batch_size=2)
    for prompt in prompts:
        sequences = model.generate(prompt, max_new_tokens=3, do_sample=False, eos_token_id=None)
        with torch.no_grad():
            state = model(sequences, memory_state=state, use_cache=False).memory_state
    assert_same_state(model.memory_state, state)
    assert model.memory_state.turns.tolist() == [3, 3]
    model.reset(batch_size=2)
    assert_same_state(model.memory_state, model.initial_memory_state(2), 0)


def test_ephemeral_memory_starts_empty_and_keeps_nothing():
    model, prompt = memory_model(mode="ephemeral"), random_ids()
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(prompt, **settings)
    second = model.generate(prompt, **settings)
    assert torch.equal(first.sequences, second.sequences)
    assert_same_state(first.memory_state, second.memory_state, 0)
    assert model.memory_state is None
    model.memory_state = before = some_state(model)
    third = model.generate(prompt, **settings)
    assert_same_state(third.memory_state, first.memory_state, 0)
    assert model.memory_state is before


def test_a_given_state_leaves_the_model_alone(model):
    model.memory_state = before = some_state(model)
    start = model.initial_memory_state(2)
    output = model.generate(
        random_ids(), memory_state=start, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    assert model.memory_state is before
    assert_same_state(start, model.initial_memory_state(2), 0)
    assert_differ(output.memory_state, before)


def test_forward_is_pure(model):
    model.memory_state = before = some_state(model)
    start = some_state(model)
    copies = start.clone()
    one = model(random_ids(), memory_state=start, use_cache=False)
    two = model(random_ids(), memory_state=start, use_cache=False)
    assert torch.equal(one.logits, two.logits)
    assert_same_state(start, copies, 0)
    assert model.memory_state is before


class Fails(LogitsProcessor):
    """An error at the third token."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 3:
            raise ArithmeticError("lost")
        return scores


def test_a_failing_generate_leaves_the_state(model):
    model.memory_state = before = some_state(model)
    copies = before.clone()
    with pytest.raises(ArithmeticError):
        model.generate(random_ids(), max_new_tokens=5, logits_processor=LogitsProcessorList([Fails()]), do_sample=False)
    assert model.memory_state is before
    assert_same_state(before, copies, 0)
    model.generate(random_ids(), max_new_tokens=2, do_sample=False)


def test_nothing_that_is_not_finite_is_committed():
    model = memory_model()
    model.memory_state = before = some_state(model)
    embeds = model.get_input_embeddings()(random_ids()).detach()
    embeds[1, 4] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2, do_sample=False)
    assert model.memory_state is before


def test_a_wrong_batch_size_names_the_remedy(model):
    model.reset(batch_size=2)
    for call in (
        lambda: model.generate(random_ids(3), max_new_tokens=2),
        lambda: model(random_ids(3), memory_state=model.memory_state),
    ):
        with pytest.raises(ValueError, match=r"model\.reset\(batch_size=3\)"):
            call()
    assert model.memory_state.batch_size == 2
    for wrong in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match="batch_size"):
            model.reset(wrong)


def test_states_that_do_not_belong_are_refused():
    model = memory_model()
    for state, message in (
        (memory_model(sites=("top",)).initial_memory_state(2), "sites"),
        (memory_model(num_slots=3).initial_memory_state(2), "another memory"),
        ({"top": None}, "MemoryState"),
    ):
        with pytest.raises(ValueError, match=message):
            model(random_ids(), memory_state=state)
        with pytest.raises(ValueError, match=message):
            model.generate(random_ids(), memory_state=state, max_new_tokens=2)


# 4. The base model, bit for bit


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_an_untrained_memory_changes_nothing(family, cell, dtype):
    base, ids = base_model(family).to(dtype), random_ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    wanted = base(ids, attention_mask=mask).logits
    settings = {"max_new_tokens": 5, "do_sample": False}
    text = base.generate(ids, attention_mask=mask, **settings)
    config = MemoryConfig(sites=("input", "middle", "top"), num_heads=2, num_slots=4, slot_size=8, cell=cell)
    model = add_memory(base, config)
    assert torch.equal(model(ids, attention_mask=mask).logits, wanted)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), text)


def test_a_disabled_memory_is_the_base_model(model):
    ids, base = random_ids(), base_model(model.config.model_type).double()
    model.memory_state = before = some_state(model)
    settings = {"max_new_tokens": 5, "do_sample": False}
    with model.disable_memory():
        output = model(ids)
        assert torch.equal(output.logits, base(ids).logits)
        assert "memory_state" not in output
        assert torch.equal(model.generate(ids, **settings), base.generate(ids, **settings))
        with model.disable_memory():
            pass
        assert model.memory_disabled
    assert model.memory_state is before
    assert not model.memory_disabled
    assert not torch.equal(model(ids).logits, base(ids).logits)


def test_another_memory_is_set_where_memory_is_disabled(tmp_path):
    model = memory_model()
    model.save_memory(tmp_path)
    with model.disable_memory():
        model.load_memory(tmp_path)
        model.load_memory(tmp_path, "other")
        model.set_memory("other")
        assert model._memory_off == 1  # what compiled code goes by
    assert model._memory_off == 0


def run_together(*works):
    """Run each in its own thread, all starting at once; their results."""
    gate, results, errors = threading.Barrier(len(works)), [None] * len(works), []

    def run(index, work):
        try:
            gate.wait()
            results[index] = work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results


def test_threads_do_not_meet(model):
    """Each thread has its own conversation, and one of them switches memory off."""
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    prompts = [random_ids(1, 6 + n, seed=n) for n in range(3)]

    def talk(prompt):
        return lambda: model.generate(prompt, memory_state=model.initial_memory_state(1), **settings)

    def plain():
        with model.disable_memory():
            return [model(prompt).logits for prompt in prompts * 4]

    works = [*map(talk, prompts), plain]
    alone = [work() for work in works]
    together = run_together(*works)
    for got, wanted in zip(together[:3], alone[:3], strict=True):
        assert torch.equal(got.sequences, wanted.sequences)
        assert_same_state(got.memory_state, wanted.memory_state, 1e-12)
    for got, wanted in zip(together[3], alone[3], strict=True):
        assert_close(got, wanted, 1e-12)


# 6. Gradients


def loss_of(logits, seed=6):
    generator = torch.Generator().manual_seed(seed)
    return (logits.log_softmax(-1) * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, wanted, tolerance=1e-8):
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= tolerance * (1 + gradient.abs().max()), name


def test_only_the_memory_learns(model):
    found = gradients(model, loss_of(model(random_ids(), use_cache=False).logits))
    assert set(found) == {name for name, _ in model.named_parameters() if name.startswith("gru_memory.")}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in model.memory_parameters()}


def test_gradients_of_chunks_are_those_of_the_whole(model):
    ids = random_ids(2, 12)
    wanted = gradients(model, loss_of(model(ids, use_cache=False).logits))
    cache, parts = None, []
    for part in ids.split([5, 1, 6], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert_same_gradients(gradients(model, loss_of(torch.cat(parts, 1))), wanted)


def test_gradients_are_those_of_the_plain_recurrence(model, monkeypatch):
    ids, start = random_ids(2, 21), some_state(model)
    got = gradients(model, loss_of(model(ids, memory_state=start, use_cache=False).logits))
    monkeypatch.setattr(recurrence, "scan", recurrence.scan_reference)
    assert_same_gradients(got, gradients(model, loss_of(model(ids, memory_state=start, use_cache=False).logits)))


def test_gradients_flow_through_the_state(family_model):
    """From a later turn into how an earlier one was written, unless the state is detached."""
    first = family_model(random_ids(), use_cache=False).memory_state
    later = random_ids(seed=4)
    loss_of(family_model(later, memory_state=first, use_cache=False).logits).backward()
    through = family_model.memory_sites()["top"].value_embed.weight.grad.clone()
    family_model.zero_grad()
    loss_of(family_model(later, memory_state=first.detach(), use_cache=False).logits).backward()
    assert (through - family_model.memory_sites()["top"].value_embed.weight.grad).abs().max() > 1e-6
    family_model.zero_grad()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # but new in 5.23 is its heir
@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("sites", "key_layers"),
    [(("input", "middle", "top"), ()), (("middle", "layer:3", "top"), (1,)), (("top",), (1,))],
)
def test_gradient_checkpointing_changes_nothing(family, reentrant, sites, key_layers):
    model, ids = memory_model(family, sites=sites, key_layers=key_layers).train(), random_ids()
    start = some_state(model).detach()

    def run():
        loss = loss_of(model(ids, memory_state=start, use_cache=False).logits)
        return loss, gradients(model, loss)

    loss, wanted = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if sites != ("top",) and Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(RuntimeError, match="5.23"):
            run()
        return
    checkpointed, got = run()
    assert_close(checkpointed, loss, 1e-10)
    assert_same_gradients(got, wanted)


def test_a_loss_from_labels(family_model):
    ids = random_ids()
    output = family_model(ids, labels=ids)
    wanted = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(output.loss.double(), wanted, 1e-6)  # transformers computes the loss in float32


# 8. Saving and loading


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
    config = MemoryConfig(sites=("middle", "top"), num_heads=2, num_slots=4, slot_size=8)
    model = wake(add_memory(base_model(family), config, {"middle": SumSite()})).double()
    ids = random_ids()
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


# Whatever else people do with a model


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cell", CELLS)
def test_lower_precision_runs(family, cell, dtype):
    exact = memory_model(family, cell=cell)
    model, ids = memory_model(family, cell=cell).to(dtype), random_ids()
    output = model(ids)
    assert output.logits.dtype == dtype
    assert output.memory_state.sites["top"]["slots"].dtype == torch.float32
    tolerance = 1e-3 if dtype == torch.float32 else 0.5
    assert (output.logits.double() - exact(ids).logits).abs().mean() < tolerance
    sequences = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert sequences.shape[1] <= 23
    assert model.memory_state.is_finite()


def test_autocast_runs(family_model):
    single = copy.deepcopy(family_model).float()
    with torch.autocast("cpu", torch.bfloat16):
        output = single(random_ids())
    assert output.memory_state.sites["top"]["slots"].dtype == torch.float32
    assert output.memory_state.is_finite()


def test_tuples_instead_of_outputs(family_model):
    ids = random_ids()
    wanted = family_model(ids, use_cache=False)
    logits, state = family_model(ids, use_cache=False, return_dict=False)
    assert torch.equal(logits, wanted.logits)
    assert_same_state(state, wanted.memory_state, 0)
    _, cache, _ = family_model(ids[:, :7], use_cache=True, return_dict=False)
    rest, _, state = family_model(ids[:, 7:], past_key_values=cache, return_dict=False)
    assert_close(rest, wanted.logits[:, 7:])
    assert_same_state(state, wanted.memory_state)


def test_copies_are_independent(family_model):
    ids, twin = random_ids(), copy.deepcopy(family_model)
    assert torch.equal(twin(ids).logits, family_model(ids).logits)
    with torch.no_grad():
        twin.memory_sites()["top"].gate.zero_()
    assert not torch.equal(twin(ids).logits, family_model(ids).logits)
    twin.generate(ids, max_new_tokens=2)
    assert family_model.memory_state is None


def test_a_second_memory_replaces_the_first():
    model = memory_model()
    add_memory(model, MemoryConfig(sites=("top",), num_heads=1, num_slots=2, slot_size=4))
    assert list(model.memory_sites()) == ["top"]
    assert torch.equal(model(random_ids()).logits, base_model().double()(random_ids()).logits)
    assert type(model) is GPT2WithGRUMemory


def test_trainable_parameters_are_counted(family_model, capsys):
    family_model.print_trainable_parameters()
    assert f"{family_model.num_memory_parameters():,}" in capsys.readouterr().out


def test_a_state_of_another_memory_is_refused_by_generate_and_by_the_setter(model):
    state = model.initial_memory_state(1)
    prompt = torch.randint(3, 60, (1, 5))
    with torch.no_grad():
        next(iter(model.memory_parameters())).add_(0.5)
    try:
        with pytest.raises(ValueError, match="other weights"):
            model.generate(prompt, max_new_tokens=2, memory_state=state)
        with pytest.raises(ValueError, match="other weights"):
            model.memory_state = state
    finally:
        with torch.no_grad():
            next(iter(model.memory_parameters())).sub_(0.5)
    model.generate(prompt, max_new_tokens=2, memory_state=model.initial_memory_state(1), pad_token_id=0)

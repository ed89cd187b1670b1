"""A forward pass, whatever the family, cell and clock: chunks, padding and other rows change nothing, nor does a silent memory."""

import copy

import pytest
import torch
from decoding import some_state
from shared_models import no_state_stays, one_a_family, one_of_each_kind  # noqa: F401 (fixtures)
from tiny import (
    CELLS,
    FAMILIES,
    assert_close,
    assert_differ,
    assert_same_state,
    base_model,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    padded,
    random_ids,
)
from transformers import DynamicCache

from gru_memory import MemoryConfig, add_memory

# Whole = chunks = token by token


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


# Padding and other rows


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


# The base model, bit for bit


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


# What comes out


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

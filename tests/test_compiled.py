"""Caches of fixed size and `torch.compile`: the same numbers, one graph, and no compiling again once it is warm."""

import copy
import shutil

import pytest
import torch
from decoding import OFTEN, assert_state_after, at_word, padded_prompt, some_state
from tiny import (
    FAMILIES,
    KINDS,
    SumSite,
    assert_close,
    assert_same_state,
    base_model,
    gradients,
    loss_of,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    random_ids,
    wake,
)
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache

from gru_memory import MemoryConfig, add_memory
from gru_memory.cache import find_layer

SETTINGS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": OFTEN, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def clean_compiler():
    """Graphs of other tests neither count nor are found again."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(backend="eager"):
    """Settings of `generate` that compile the decoding step, whole or not at all, on any device."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


# Caches of fixed size


@pytest.mark.parametrize(("family", "cell", "clock"), KINDS)
def test_a_static_cache(family, cell, clock):
    model = memory_model(family, cell=cell, decay_every=clock)
    prompt, mask = padded_prompt()
    settings = {**SETTINGS, "attention_mask": mask, "memory_state": some_state(model)}
    wanted = model.generate(prompt, **settings)
    got = model.generate(prompt, cache_implementation="static", **settings)
    assert torch.equal(got.sequences, wanted.sequences)
    assert_same_state(got.memory_state, wanted.memory_state)


@pytest.mark.parametrize("more", ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}))
def test_a_static_cache_for_several_rows(more):
    model, (prompt, mask) = memory_model("llama"), padded_prompt()
    start, settings = some_state(model), {**SETTINGS, **more, "cache_implementation": "static"}
    output = model.generate(prompt, attention_mask=mask, memory_state=start, **settings)
    assert_state_after(model, output.memory_state, output.sequences, prompt, start, mask)


def test_a_prefill_in_chunks_into_a_static_cache():
    model, (prompt, mask) = memory_model("llama"), padded_prompt(padding=6)
    memory_mask = torch.arange(11).expand(2, -1) > 7
    settings = {**SETTINGS, "attention_mask": mask, "memory_mask": memory_mask, "memory_state": some_state(model)}
    wanted = model.generate(prompt, **settings)
    got = model.generate(prompt, cache_implementation="static", prefill_chunk_size=4, **settings)
    assert torch.equal(got.sequences, wanted.sequences)
    assert_same_state(got.memory_state, wanted.memory_state)


def test_a_static_cache_of_ones_own_goes_on():
    model, prompt = memory_model("llama"), random_ids(2, 7)
    cache = StaticCache(config=model.config, max_cache_len=40)
    settings = {**SETTINGS, "eos_token_id": None}
    first = model.generate(prompt, past_key_values=cache, **settings)
    assert_state_after(model, first.memory_state, first.sequences, prompt, ended=at_word([]))
    kept = first.memory_state.clone()
    longer = torch.cat([first.sequences, random_ids(2, 5, seed=8)], dim=1)
    second = model.generate(longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **settings)
    assert_state_after(model, second.memory_state, second.sequences, prompt, ended=at_word([]))
    assert_same_state(first.memory_state, kept, 0)  # a state is a value, though the cache overwrites its own


class Still(SumSite):
    """Returns every other state as it came."""

    calls = 0

    def forward(self, hidden_states, token_embeds, state, mask, turn_starts):
        hidden_states, new = super().forward(hidden_states, token_embeds, state, mask, turn_starts)
        self.calls += 1
        return hidden_states, new if self.calls % 2 else state


@torch.no_grad()
def test_a_static_cache_keeps_its_tensors_and_its_states_apart():
    config = MemoryConfig(sites=("middle", "top"), num_heads=2, num_slots=4, slot_size=8)
    model = add_memory(base_model("llama"), config, {"middle": Still()}).double()
    cache, states, copies, places = StaticCache(config=model.config, max_cache_len=12), [], [], []
    for ids in random_ids(2, 12).split(3, dim=1):
        states.append(model(ids, past_key_values=cache).memory_state)
        copies.append(states[-1].clone())
        places.append([tensor.data_ptr() for tensor in find_layer(cache).state._tensors()])
    assert places == places[:1] * 4
    for state, kept in zip(states, copies, strict=True):
        assert_same_state(state, kept, 0)
    assert_same_state(find_layer(cache).state, states[-1], 0)


def test_a_mask_that_does_not_tell_padding():
    """Masks of four dimensions are for attention; then `memory_mask` says what is there."""
    model, ids = memory_model("llama"), random_ids(2, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    with pytest.raises(ValueError, match="memory_mask"):
        model(ids, attention_mask=mask)
    got = model(ids, attention_mask=mask, memory_mask=torch.ones(2, 6, dtype=torch.bool))
    assert_same_state(got.memory_state, model(ids).memory_state)


# Compiled


@pytest.mark.parametrize(("family", "cell", "clock"), KINDS)
def test_decoding_compiles_once(family, cell, clock):
    """Other prompts, other lengths, other states, padding, rows that finish early: one graph, whole."""
    model = memory_model(family, cell=cell, decay_every=clock)
    prompt, mask = padded_prompt()
    settings = {**SETTINGS, "max_length": 20, "max_new_tokens": None}
    calls = [
        {"inputs": prompt, "attention_mask": mask, "memory_state": model.initial_memory_state(2), "eos_token_id": None},
        {"inputs": random_ids(2, 9, seed=5), "memory_state": some_state(model)},
        {"inputs": prompt, "attention_mask": mask, "memory_state": some_state(model), "do_sample": True},
        {"inputs": prompt, "attention_mask": mask, "memory_state": copy.deepcopy(some_state(model))},
    ]
    for call in calls:
        torch.manual_seed(2)
        wanted = model.generate(**{**settings, **call})
        torch.manual_seed(2)
        with torch._dynamo.config.patch(error_on_recompile=call is not calls[0]):
            got = model.generate(**{**settings, **call, **compiled()})
        assert torch.equal(got.sequences, wanted.sequences)
        assert_same_state(got.memory_state, wanted.memory_state)
        assert graphs() == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):  # from the memory's own state, and from what that became
            model.generate(prompt, attention_mask=mask, **{**settings, **compiled()})
    assert graphs() == 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_compiled_model(family):
    """Whole sequences, and a loop of one's own with a cache of fixed size."""
    model, ids = memory_model(family, cell="mingru", decay_every="turn", sites=("input", "top")), random_ids(2, 8)
    start = some_state(model)
    fast = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    wanted = model(ids, memory_state=start, use_cache=False)
    got = fast(ids, memory_state=start, use_cache=False)
    assert_close(got.logits, wanted.logits)
    assert_same_state(got.memory_state, wanted.memory_state)
    cache, positions = StaticCache(config=model.config, max_cache_len=8), torch.arange(8).expand(2, -1)
    model(ids[:, :4], position_ids=positions[:, :4], past_key_values=cache, memory_state=start)
    before, logits = graphs(), []
    for t in range(4, 8):
        with torch._dynamo.config.patch(error_on_recompile=t > 4):
            step = fast(ids[:, t : t + 1], position_ids=positions[:, t : t + 1], past_key_values=cache)
        logits.append(step.logits)
    assert graphs() == before + 1
    assert_close(torch.cat(logits, 1), wanted.logits[:, 4:])
    assert_same_state(step.memory_state, wanted.memory_state)


@torch.no_grad()
def test_a_compiled_model_can_switch_its_memory_off():
    model, base, ids = memory_model("llama", sites=("top",)), base_model("llama").double(), random_ids(2, 3)
    fast = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    wanted = model(ids, use_cache=False).logits
    assert_close(fast(ids, use_cache=False).logits, wanted)
    with model.disable_memory():
        assert_close(fast(ids, use_cache=False).logits, base(ids, use_cache=False).logits)
    assert_close(fast(ids, use_cache=False).logits, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ("gru", "mingru"))
def test_a_compiled_model_learns_the_same(cell):
    model, ids = memory_model("llama", cell=cell, sites=("middle", "top")).train(), random_ids(2, 4)
    start = some_state(model).detach()
    wanted = gradients(model, loss_of(model(ids, memory_state=start, use_cache=False).logits))
    fast = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    got = gradients(model, loss_of(fast(ids, memory_state=start, use_cache=False).logits))
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        assert_close(got[name], gradient, 1e-8)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_machine_code_decodes_the_same():
    """The default compiler, in float32."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=101
    )
    memory = MemoryConfig(sites=("top",), num_heads=2, num_slots=4, slot_size=8)
    model = wake(add_memory(LlamaForCausalLM(config).eval(), memory))
    prompt, mask = padded_prompt()
    settings = {**SETTINGS, "attention_mask": mask}
    wanted = model.generate(prompt, memory_state=some_state(model), **settings)
    for state in (some_state(model), some_state(model)):
        with torch._dynamo.config.patch(error_on_recompile=graphs() > 0):
            got = model.generate(prompt, memory_state=state, **settings, **compiled("inductor"))
        assert torch.equal(got.sequences, wanted.sequences)
        assert_same_state(got.memory_state, wanted.memory_state, 1e-5)
    assert graphs() == 1

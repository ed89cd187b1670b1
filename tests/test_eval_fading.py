"""Fading follows the clock: lambda^n where nothing is written, less where the talk writes over it."""

import pytest
import torch
from talking import talking_model, talking_tokenizer
from tiny import assert_close, assert_same_state

from gru_memory.evaluation.batched import BatchReader
from gru_memory.evaluation.fading import FadingConfig, emptied, evaluate_fading, trace_left
from gru_memory.evaluation.variants import accumulating, half_life, unwritten, with_decay
from gru_memory.inspection import trace
from gru_memory.state import MemoryState

TOLD = [("My boat is called Marigold.", "Lovely.")]
TALK = [("What is two and two?", "Four."), ("Oh.", "Yes.")]
SMALL = {"facts": 1, "sessions": 2, "max_new_tokens": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return talking_tokenizer("llama")


@pytest.mark.parametrize("clock", ["turn", "token"])
def test_a_trace_fades_by_the_law_and_the_talk_wears_it_further(tokenizer, clock):
    model = talking_model("llama", decay_every=clock)
    before = model.memory_sites()["top"].decay_table
    result = evaluate_fading(model, tokenizer, FadingConfig(decays=(0.5, 0.99), turns=(0, 2, 4), **SMALL))
    assert model.memory_sites()["top"].decay_table == before
    assert len(result.rows) == 6
    for row in result.rows:
        assert row["silent"] == pytest.approx(row["law"], rel=1e-6, abs=1e-12)
        assert row["strength"] <= row["law"] * (1 + 1e-6)
        if row["turns"] == 0:
            assert row["strength"] == pytest.approx(1)
        elif clock == "turn":
            assert row["law"] == pytest.approx(row["decay"] ** row["turns"])
            assert row["strength"] < row["law"]
        else:
            assert row["law"] < row["decay"] ** (5 * row["turns"])  # a turn has many tokens
    assert len(result.details["replies"]) == 6 * 2


@torch.no_grad()
def test_the_trace_is_what_inspection_says_is_left(tokenizer):
    """Of slots that are a sum of contents, a later reading keeps what `Trace.left` says of each."""
    model = talking_model("llama")
    reader = BatchReader(model, tokenizer)
    begun = reader.read_all(reader.start(1), [TOLD])
    now = reader.read_all(begun, [TALK])
    without = reader.read_all(emptied(begun), [TALK])
    whole = trace(model, tokenizer, TOLD + TALK).left
    told = len(trace(model, tokenizer, TOLD).tokens)
    at_first = trace(model, tokenizer, TOLD).left
    slots = begun.sites["top"]["slots"][0]  # (N, S, d)
    kept = (whole[:told].sum(0) / at_first.sum(0)).double()  # (N, S), the same for every token of a slot
    wanted = (kept.unsqueeze(-1) * slots * slots).sum() / (slots * slots).sum()
    assert_close(trace_left(begun, now, without)[0], wanted.double(), 1e-4)


def test_half_lives_are_as_documented():
    assert half_life(0.9) == pytest.approx(6.58, abs=0.01)
    assert half_life(0.99) == pytest.approx(68.97, abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("cell", ["gru", "mingru"])
def test_another_decay_is_that_of_a_memory_made_with_it(tokenizer, cell):
    model, other = (talking_model("llama", cell=cell, decay=decay) for decay in (0.9, 0.4))
    with with_decay(model, 0.4):
        got = BatchReader(model, tokenizer).read_all(model.initial_memory_state(1), [TOLD + TALK])
    wanted = BatchReader(other, tokenizer).read_all(other.initial_memory_state(1), [TOLD + TALK])
    assert_same_state(got, wanted)
    assert_close(got.decay_rates["top"], wanted.decay_rates["top"])


@torch.no_grad()
def test_an_accumulator_adds_up_what_is_written(tokenizer):
    model = talking_model("llama")
    seen = []

    def keep(module, args, kwargs, output):
        seen.append(module.prepare(args[0], **kwargs).inputs)

    hook = model.memory_sites()["top"].register_forward_hook(keep, with_kwargs=True)
    with with_decay(model, 1.0):
        BatchReader(model, tokenizer).read(model.initial_memory_state(1), TOLD)
    hook.remove()
    with with_decay(model, 1.0), accumulating(model):
        state = BatchReader(model, tokenizer).read(model.initial_memory_state(1), TOLD)
    inputs = seen[0]
    assert_close(state.sites["top"]["slots"], torch.einsum("btns,btnd->bnsd", inputs.write, inputs.values), 1e-6)
    assert "prepare" not in vars(model.memory_sites()["top"])


@torch.no_grad()
def test_a_token_left_unwritten_is_what_inspection_says_of_it(tokenizer):
    model = talking_model("llama")
    reader = BatchReader(model, tokenizer)
    whole = trace(model, tokenizer, TOLD)
    places = [3, len(whole.tokens) - 2]
    states = MemoryState.cat([reader.start(1)] * 2)
    with unwritten(model, [[places[0]], [places[1]]]):
        states = reader.read(states, TOLD * 2)
    full = reader.read(reader.start(1), TOLD).sites["top"]["slots"][0]
    for row, place in enumerate(places):
        got = states.sites["top"]["slots"][row]
        assert (got - full).abs().max() > 1e-4
        lost = whole.left[place] > 1e-6  # nothing else changes: slots it was not written to stay
        assert_close(got[~lost], full[~lost], 1e-5)

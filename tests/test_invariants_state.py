"""The state that a model keeps between calls: when it changes, when it is left alone, and which states are refused."""

import threading

import pytest
import torch
from decoding import some_state
from shared_models import no_state_stays, one_a_family, one_of_each_kind  # noqa: F401 (fixtures)
from tiny import (
    assert_close,
    assert_differ,
    assert_same_state,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    random_ids,
)
from transformers import LogitsProcessor, LogitsProcessorList

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


# States that do not belong


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


# Threads


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

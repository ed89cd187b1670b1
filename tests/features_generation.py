"""What is checked of `generate()` on every family."""

import pytest
import test_compiled
import torch
import transformers
from cells import Feature, Refusal, Row
from decoding import guessing, padded_prompt, repeating_prompt, some_state, tokens_taken_back
from packaging.version import Version
from test_generation import (
    test_a_conversation_that_keeps_its_cache,
    test_beams_carry_their_own_memory,
    test_memory_mask_in_generate,
    test_rows_that_stopping_criteria_end,
    test_state_after_generate,
    test_the_pipeline,
)
from tiny import assert_same_state, base_model, random_ids
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer


def strategies(*names: str):
    """The state after decoding by these strategies of test_generation.py is that of one pass over what was returned."""

    def check(row: Row) -> None:
        for name in names:
            test_state_after_generate(row.model(), name)

    return check


def beams(row: Row) -> None:
    test_state_after_generate(row.model(), "several beams")
    test_state_after_generate(row.model(), "sampled beams")
    test_beams_carry_their_own_memory(row.model(), "beams")


def static_cache(row: Row) -> None:
    model, ids = row.model(), random_ids()
    settings = {"max_new_tokens": 5, "do_sample": False, "memory_state": some_state(model)}
    settings |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    settings["attention_mask"][0, :5] = 0
    wanted = model.generate(ids, **settings)
    got = model.generate(ids, cache_implementation="static", **settings)
    assert torch.equal(got.sequences, wanted.sequences)
    assert_same_state(got.memory_state, wanted.memory_state)


def decode(row: Row, prompt: torch.Tensor, **settings):
    """Greedily from a memory that is not empty; what `generate` returns."""
    model = row.model()
    start = some_state(model, len(prompt))
    common = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    return model.generate(prompt, memory_state=start, **common, **settings)


def slides(model: PreTrainedModel) -> bool:
    """Whether some of its attention has a window."""
    return any(DynamicCache(config=model.config).is_sliding)


def assert_guesses_change_nothing(row: Row, prompt: torch.Tensor, **guesses) -> None:
    wanted = decode(row, prompt)
    with tokens_taken_back() as numbers:
        got = decode(row, prompt, **guesses)
    assert torch.equal(got.sequences, wanted.sequences)
    assert_same_state(got.memory_state, wanted.memory_state)
    assert numbers


def assisted(row: Row) -> None:
    """By another model, which is mostly wrong."""
    assistant = guessing(base_model(row.name, seed=9).to(row.dtype))
    if Version(transformers.__version__) < Version("5.18") and slides(row.model()):
        with pytest.raises(RuntimeError, match="must match the size"):  # and so does the base model by itself
            row.base().generate(random_ids(1, 11), assistant_model=assistant, max_new_tokens=8)
        return
    assert_guesses_change_nothing(row, random_ids(1, 11), assistant_model=assistant)


def lookup(row: Row) -> None:
    assert_guesses_change_nothing(row, repeating_prompt(), prompt_lookup_num_tokens=4)


class Heard(BaseStreamer):
    """What a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def streaming(row: Row) -> None:
    prompt, heard = random_ids(1, 6), Heard()
    wanted, got = decode(row, prompt), decode(row, prompt, streamer=heard)
    assert heard.tokens == [*got.sequences[0].tolist(), -1]
    assert torch.equal(got.sequences, wanted.sequences)
    assert_same_state(got.memory_state, wanted.memory_state)


def own_cache(row: Row) -> None:
    test_a_conversation_that_keeps_its_cache(row.model(), True)


def stopping(row: Row) -> None:
    test_rows_that_stopping_criteria_end(row.model(), "sampling")


def context_only(row: Row) -> None:
    test_memory_mask_in_generate(row.model(), "sampling")


def text_pipeline(row: Row) -> None:
    test_the_pipeline(row.model())


def compiled(row: Row) -> None:
    """Once warm, another prompt of another length compiles nothing; each graph is whole.

    The first token that a static cache's sliding window drops is a second graph, as it is for the base model.
    """
    torch._dynamo.reset()
    test_compiled.counters.clear()
    model = row.fresh(sites=("top",))
    prompt, mask = padded_prompt()
    calls = [{"inputs": prompt, "attention_mask": mask}, {"inputs": random_ids(2, 9, seed=5)}]
    settings = {"max_length": 16, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    settings["memory_state"] = some_state(model)
    for call in calls:
        wanted = model.generate(**settings, **call)
        with torch._dynamo.config.patch(error_on_recompile=call is not calls[0]):
            got = model.generate(**settings, **call, **test_compiled.compiled())
        assert torch.equal(got.sequences, wanted.sequences)
        assert_same_state(got.memory_state, wanted.memory_state)
        assert test_compiled.graphs() == (2 if slides(model) else 1)
    torch._dynamo.reset()


_NO_STATIC_CACHE = Refusal(
    "something else with a static cache",
    "transformers computes something else for it with a static cache than with a growing one, or fails",
)
_WITHOUT = {"gpt_neo": _NO_STATIC_CACHE, "falcon, alibi": _NO_STATIC_CACHE}

FEATURES = [
    Feature(
        "greedy, sampling",
        "With rows that end early and `num_return_sequences`, the state after decoding is that of one pass over what was returned.",
        strategies("greedy", "sampling", "several sequences"),
    ),
    Feature(
        "options",
        "The same with every option that changes logits: top_k, top_p, min_p, typical_p, penalties, n-grams, bad words, biases.",
        strategies("all options"),
    ),
    Feature(
        "beams", "The same for beams and sampled beams, which carry their own memory when they are reordered.", beams
    ),
    Feature("stopping", "The same for rows that stopping criteria end.", stopping),
    Feature(
        "chunks, no cache",
        "The same with a prefill in chunks, and without a KV cache.",
        strategies("prefill in chunks", "no cache"),
    ),
    Feature("own cache", "A conversation goes on from the cache that `generate` returned.", own_cache),
    Feature("memory_mask", "Context that attention sees is not taken in by memory.", context_only),
    Feature(
        "assistant",
        "Guesses of an assistant are taken back from memory: the text and the state are those without.",
        assisted,
    ),
    Feature("prompt lookup", "The same for guesses from the prompt.", lookup),
    Feature("streamer", "A streamer is given each token, and the state is the same.", streaming),
    Feature("pipeline", '`pipeline("text-generation")`.', text_pipeline),
    Feature(
        "static cache",
        "The text and the state with a static cache are those with a growing one.",
        static_cache,
        _WITHOUT,
    ),
    Feature(
        "compiled",
        "Decoding with `torch.compile` and a static cache is one graph (two where a window slides), and gives the same.",
        compiled,
        _WITHOUT,
        slow=True,
    ),
]

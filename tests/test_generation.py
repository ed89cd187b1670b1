"""The state after `generate()` is that of one forward pass over what it returned, however it decoded."""

import copy

import pytest
import torch
from decoding import OFTEN, assert_state_after, at_word, character, ends, padded_prompt, some_state, tokenizer
from shared_models import no_state_stays, one_a_family, one_of_each_kind  # noqa: F401 (fixtures)
from tiny import (
    BOS,
    EOS,
    PAD,
    assert_same_state,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    random_ids,
)
from transformers import (
    DynamicCache,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)

EVERY_LOGITS_OPTION = {
    "do_sample": True,
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 60,
    "min_p": 0.001,
    "typical_p": 0.98,
    "epsilon_cutoff": 1e-6,
    "eta_cutoff": 1e-6,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[7], [8, 9]],
    "min_new_tokens": 2,
    "suppress_tokens": [11],
    "begin_suppress_tokens": [12],
    "sequence_bias": [[[13], -2.0]],
    "exponential_decay_length_penalty": (5, 1.01),
    "renormalize_logits": True,
    "remove_invalid_values": True,
}
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "all options": EVERY_LOGITS_OPTION,
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "length_penalty": -1.0},
    "sampled beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
    "no cache": {"do_sample": True, "use_cache": False},
    "beams, no cache": {"num_beams": 2, "use_cache": False, "do_sample": False},
    "prefill in chunks": {"do_sample": True, "prefill_chunk_size": 4},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_state_after_generate(model, strategy):
    """Left-padded rows that finish at different times, from a memory that is not empty."""
    (prompt, mask), start = padded_prompt(), some_state(model)
    torch.manual_seed(3)
    model.memory_state = start
    settings = {"max_new_tokens": 7, "eos_token_id": OFTEN, **STRATEGIES[strategy]}
    sequences = model.generate(prompt, attention_mask=mask, **settings)
    assert_state_after(model, model.memory_state, sequences, prompt, start, mask)


def test_rows_do_finish_early():
    """The test above would not see a mistake if all rows were equally long."""
    model, prompt = memory_model(), random_ids(4, 11)
    torch.manual_seed(3)
    sequences = model.generate(prompt, max_new_tokens=7, eos_token_id=OFTEN, do_sample=True)
    assert len(set(ends(sequences, 11, at_word(OFTEN)))) > 1


@pytest.mark.parametrize("settings", ("beams", "several beams"))
def test_beams_carry_their_own_memory(family_model, settings):
    """With a cache, beams swap rows: the text is that of decoding without one."""
    prompt, start = random_ids(2, 9), some_state(family_model)
    settings = {**STRATEGIES[settings], "max_new_tokens": 8, "eos_token_id": OFTEN, "memory_state": start}
    wanted = family_model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(family_model.generate(prompt, **settings), wanted)


class AtMultiplesOfThree(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 3 == 0


@pytest.mark.parametrize("settings", ("sampling", "beams", "several sequences", "no cache"))
def test_rows_that_stopping_criteria_end(family_model, settings):
    """Such rows end without an end-of-sequence token; what follows is padding all the same."""
    prompt = random_ids(8, 6)
    torch.manual_seed(1)
    sequences = family_model.generate(
        prompt,
        max_new_tokens=6,
        eos_token_id=EOS,
        pad_token_id=PAD,
        stopping_criteria=StoppingCriteriaList([AtMultiplesOfThree()]),
        **STRATEGIES[settings],
    )

    def ended(row, end):
        return int(row[end - 1]) in (EOS,) or int(row[end - 1]) % 3 == 0

    assert len(set(ends(sequences, 6, ended))) > 1
    assert_state_after(family_model, family_model.memory_state, sequences, prompt, ended=ended)


@pytest.mark.parametrize("settings", ("sampling", "beams"))
def test_rows_that_stop_strings_end(family_model, settings):
    model, prompt = family_model, random_ids(8, 6)
    capitals = list(range(32, 58))  # in no special token
    assert character(capitals[0]) + character(capitals[-1]) == "AZ"
    torch.manual_seed(1)
    sequences = model.generate(
        prompt,
        max_new_tokens=6,
        eos_token_id=EOS,
        stop_strings=[character(i) for i in capitals],
        tokenizer=tokenizer(),
        **STRATEGIES[settings],
    )
    assert len(set(ends(sequences, 6, at_word([EOS, *capitals])))) > 1
    assert_state_after(model, model.memory_state, sequences, prompt, ended=at_word([EOS, *capitals]))


@pytest.mark.parametrize("settings", ("sampling", "beams", "no cache", "prefill in chunks"))
def test_memory_mask_in_generate(family_model, settings):
    (prompt, mask), start = padded_prompt(padding=3), some_state(family_model)
    memory_mask = torch.ones_like(prompt, dtype=torch.bool)
    memory_mask[:, :6] = False
    torch.manual_seed(4)
    output = family_model.generate(
        prompt,
        attention_mask=mask,
        memory_mask=memory_mask,
        memory_state=start,
        max_new_tokens=6,
        eos_token_id=OFTEN,
        return_dict_in_generate=True,
        **STRATEGIES[settings],
    )
    assert_state_after(family_model, output.memory_state, output.sequences, prompt, start, mask, memory_mask)


@pytest.mark.parametrize("memory_mask", (False, True))
@pytest.mark.parametrize("family", ("gpt2", "qwen2"))
def test_prompts_of_embeddings(family, memory_mask):
    """With tied embeddings a prompt of embeddings is the prompt of their tokens."""
    model, prompt = memory_model(family), random_ids()
    start = some_state(model)
    embeds = model.get_input_embeddings()(prompt)
    settings = {"max_new_tokens": 6, "eos_token_id": OFTEN, "do_sample": False, "memory_state": start}
    if memory_mask:
        settings["memory_mask"] = torch.arange(20).expand(2, -1) > 7
    wanted = model.generate(prompt, return_dict_in_generate=True, **settings)
    got = model.generate(inputs_embeds=embeds, return_dict_in_generate=True, **settings)
    assert torch.equal(got.sequences, wanted.sequences[:, 20:])
    assert_same_state(got.memory_state, wanted.memory_state)


@pytest.mark.parametrize("given", (False, True), ids=("made by generate", "given"))
def test_a_conversation_that_keeps_its_cache(family_model, given):
    """The cache that comes back holds all but the last token; given back with more input, memory goes on from there."""
    prompt, settings = (
        random_ids(2, 7),
        {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True},
    )
    settings |= {"eos_token_id": None, "suppress_tokens": [PAD]}  # what looks like padding is taken for it
    cache = {"past_key_values": DynamicCache()} if given else {}
    first = family_model.generate(prompt, **cache, **settings)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    assert_state_after(family_model, first.memory_state, first.sequences, prompt, ended=at_word([]))
    longer = torch.cat([first.sequences, random_ids(2, 5, seed=8)], dim=1)
    second = family_model.generate(longer, past_key_values=first.past_key_values, **settings)
    assert_state_after(family_model, second.memory_state, second.sequences, prompt, ended=at_word([]))
    assert_same_state(family_model.memory_state, second.memory_state, 0)
    third = family_model.generate(second.sequences, past_key_values=second.past_key_values, **settings)
    assert_state_after(family_model, third.memory_state, third.sequences, prompt, ended=at_word([]))


def test_the_text_is_that_of_the_logits(model):
    """Greedy decoding step by step, by forward alone, gives the same tokens."""
    prompt, start = random_ids(2, 6), some_state(model)
    sequences = model.generate(prompt, memory_state=start, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = prompt
    with torch.no_grad():
        for _ in range(6):
            logits = model(ids, memory_state=start, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(sequences, ids)


def test_a_static_cache(family_model):
    settings = {"max_new_tokens": 5, "do_sample": False, "memory_state": some_state(family_model)}
    settings |= {"return_dict_in_generate": True}
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    wanted = family_model.generate(random_ids(), attention_mask=mask, **settings)
    got = family_model.generate(random_ids(), attention_mask=mask, cache_implementation="static", **settings)
    assert torch.equal(got.sequences, wanted.sequences)
    assert_same_state(got.memory_state, wanted.memory_state)


def test_the_pipeline(family_model):
    words = tokenizer()
    single = copy.deepcopy(family_model).float()
    generate = pipeline("text-generation", model=single, tokenizer=words, device="cpu")
    reply = generate("ABC", max_new_tokens=4, do_sample=False, suppress_tokens=[PAD, BOS, EOS])[0]["generated_text"]
    assert reply.startswith("ABC")
    assert single.memory_state.tokens.item() == len(reply) == 7

"""Taking tokens back: the memory's part of a cache, and the decoding strategies that live on it."""

import copy

import pytest
import torch
import transformers
from decoding import (
    assert_state_after,
    at_word,
    character,
    guessing,
    repeating_prompt,
    some_state,
    tokenizer,
    tokens_taken_back,
)
from families import CONFIGS
from packaging.version import Version
from shared_models import no_state_stays, one_a_family, one_of_each_kind  # noqa: F401 (fixtures)
from tiny import (
    BOS,
    EOS,
    FAMILIES,
    LAYERS,
    PAD,
    VOCABULARY,
    assert_same_state,
    base_model,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    own_site_model,
    random_ids,
    wake,
)
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from gru_memory import MemoryConfig, add_memory
from gru_memory.cache import find_layer


@pytest.fixture
def taken_back():
    """The numbers of tokens that the memory took back, as long as there were any."""
    with tokens_taken_back() as numbers:
        yield numbers


# The cache


def own_site():
    return own_site_model("llama")


def key_layers():
    return memory_model("llama", sites=("layer:2", "top"), key_layers=(0, 1), decay_every="turn")


def test_every_token_can_be_taken_back(model):
    """Over several forward passes, at any number of tokens, padding included."""
    assert_tokens_can_be_taken_back(model)


@pytest.mark.parametrize("make", (own_site, key_layers))
def test_every_token_can_be_taken_back_from_other_memories(make):
    assert_tokens_can_be_taken_back(make())


@torch.no_grad()
def assert_tokens_can_be_taken_back(model):
    ids, start = random_ids(2, 12), some_state(model)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)

    def feed(begin, end, **more):
        part = {"attention_mask": mask[:, :end], "position_ids": position_ids[:, begin:end]}
        return model(ids[:, begin:end], **part, use_cache=True, **more)

    for kept in range(4, 13):
        cache = feed(0, 4, memory_state=start).past_key_values
        cache.activate_past_recording()
        for begin, end in ((4, 9), (9, 10), (10, 12)):
            feed(begin, end, past_key_values=cache)
        cache.crop(kept - 12)
        wanted = feed(0, kept, memory_state=start)
        assert cache.get_seq_length() == kept
        assert_same_state(find_layer(cache).state, wanted.memory_state)
        if kept == 12:
            continue
        more = feed(kept, 12, past_key_values=cache)
        assert_same_state(more.memory_state, feed(0, 12, memory_state=start).memory_state)
        cache.crop(-1)
        assert_same_state(find_layer(cache).state, feed(0, 11, memory_state=start).memory_state)


def test_a_turn_that_was_taken_back_has_not_begun():
    model = memory_model("llama", decay_every="turn")
    cache = DynamicCache()
    model(random_ids(1, 5), past_key_values=cache)
    cache.activate_past_recording()
    model(random_ids(1, 4), position_ids=torch.arange(4)[None], past_key_values=cache)
    assert find_layer(cache).state.turns.item() == 2
    cache.crop(-4)
    assert find_layer(cache).state.turns.item() == 1


def test_what_was_not_recorded_cannot_be_taken_back():
    model = memory_model()
    cache = model(random_ids(1, 5), use_cache=True).past_key_values
    layer, before = find_layer(cache), find_layer(cache).state
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-1)
    cache.activate_past_recording()
    model(random_ids(1, 3), past_key_values=cache)
    after = layer.state
    with pytest.raises(RuntimeError, match="has recorded 3"):
        layer.crop(-4)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(4)
    assert layer.state is after
    layer.crop(-3)
    assert layer.state is before
    with pytest.raises(RuntimeError, match="has recorded 0"):
        layer.crop(-1)


@torch.no_grad()
def test_a_copy_of_a_cache_does_not_copy_the_model():
    model = memory_model()
    cache = model(random_ids(1, 5), use_cache=True).past_key_values
    cache.activate_past_recording()
    model(random_ids(1, 3), past_key_values=cache)
    twin = find_layer(copy.deepcopy(cache))
    assert_same_state(twin.state, find_layer(cache).state, 0)
    with pytest.raises(RuntimeError, match="has recorded 0"):
        twin.crop(-1)
    cache.crop(-2)


# Decoding

SETTINGS = {"max_new_tokens": 16, "eos_token_id": EOS, "return_dict_in_generate": True}


def another_model(model):
    """Its guesses are mostly wrong."""
    return guessing(base_model(model.config.model_type, seed=9).double())


def stumbling_twin(model):
    """The same model with the same memory, whose every third guess is another token: it is right and wrong in turns."""
    twin, calls = guessing(copy.deepcopy(model)), []

    def stumble(module, args, output):
        calls.append(1)
        return output if len(calls) % 3 else output.roll(1, dims=-1)

    twin.get_output_embeddings().register_forward_hook(stumble)
    return twin


@pytest.mark.parametrize("assistant", (another_model, stumbling_twin))
def test_an_assistant_changes_the_speed_alone(model, assistant, taken_back):
    prompt, start = random_ids(1, 11), some_state(model, 1)
    wanted = model.generate(prompt, memory_state=start, do_sample=False, **SETTINGS)
    passes, guesser = [], assistant(model)
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: passes.append(1))
    model.memory_state = start
    output = model.generate(prompt, assistant_model=guesser, do_sample=False, **SETTINGS)
    hook.remove()
    assert torch.equal(output.sequences, wanted.sequences)
    assert_same_state(output.memory_state, wanted.memory_state)
    assert model.memory_state is output.memory_state
    assert_state_after(model, output.memory_state, output.sequences, prompt, start, ended=at_word([EOS]))
    assert taken_back
    if assistant is stumbling_twin:
        assert len(passes) < wanted.sequences.shape[1] - 11  # some guesses were right


@pytest.mark.parametrize("how", ("assistant", "lookup"))
def test_sampling_from_guesses(model, how, taken_back):
    prompt, start = repeating_prompt(), some_state(model, 1)
    guess = {"prompt_lookup_num_tokens": 5} if how == "lookup" else {"assistant_model": stumbling_twin(model)}
    torch.manual_seed(2)
    options = {"do_sample": True, "temperature": 0.7, **SETTINGS}
    output = model.generate(prompt, memory_state=start, **guess, **options)
    assert_state_after(model, output.memory_state, output.sequences, prompt, start, ended=at_word([EOS]))
    assert taken_back
    assert model.memory_state is None


def test_prompt_lookup_changes_the_speed_alone(model, taken_back):
    prompt, start = repeating_prompt(), some_state(model, 1)
    model.memory_state = start
    wanted = model.generate(prompt, memory_state=start, do_sample=False, **SETTINGS)
    output = model.generate(prompt, prompt_lookup_num_tokens=5, do_sample=False, **SETTINGS)
    assert torch.equal(output.sequences, wanted.sequences)
    assert_same_state(model.memory_state, wanted.memory_state)
    assert taken_back


def test_the_first_blocks_draft_for_all(taken_back):
    model, prompt = memory_model("llama"), random_ids(1, 9)
    model.memory_state = start = some_state(model, 1)
    wanted = model.generate(prompt, memory_state=start, do_sample=False, **SETTINGS)
    output = model.generate(prompt, assistant_early_exit=LAYERS - 1, do_sample=False, **SETTINGS)
    assert torch.equal(output.sequences, wanted.sequences)
    assert_same_state(model.memory_state, wanted.memory_state)
    assert taken_back


@pytest.mark.parametrize("blocks", (1, 2, 3))
def test_first_blocks_that_lack_what_memory_looks_up_by(blocks, taken_back):
    """The memory reads block 2, and some sites come later than the draft ends: it is silent there, and right afterwards."""
    model, prompt = memory_model("llama", sites=("layer:3", "top"), key_layers=(2,)), random_ids(1, 9)
    model.memory_state = start = some_state(model, 1)
    settings = {**SETTINGS, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(prompt, memory_state=start, **settings)
    output = model.generate(prompt, assistant_early_exit=blocks, **settings)
    assert torch.equal(output.sequences, wanted.sequences)
    assert_same_state(model.memory_state, wanted.memory_state)
    assert taken_back


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_with_a_memory_follows(family):
    """It starts from its own memory, is left alone while it drafts, and takes in what was decided on."""
    model, assistant = memory_model(family), guessing(memory_model(family, seed=3, num_slots=2))
    prompt = random_ids(1, 9)
    model.memory_state, assistant.memory_state = start, own = some_state(model, 1), some_state(assistant, 1)
    wanted = model.generate(prompt, memory_state=start, do_sample=False, **SETTINGS)
    output = model.generate(prompt, assistant_model=assistant, do_sample=False, **SETTINGS)
    assert torch.equal(output.sequences, wanted.sequences)
    assert_same_state(model.memory_state, wanted.memory_state)
    assert_state_after(assistant, assistant.memory_state, output.sequences, prompt, own, ended=at_word([EOS]))
    before = assistant.memory_state
    model.generate(prompt, assistant_model=assistant, memory_state=start, do_sample=False, **SETTINGS)
    assert assistant.memory_state is before  # nothing was committed, so there is nothing to follow


def test_a_draft_reads_its_own_memory():
    """Of the same weights and the same memory it is always right."""
    model = memory_model("llama")
    assistant = guessing(copy.deepcopy(model))
    model.memory_state, assistant.memory_state = start, _ = some_state(model, 1), some_state(model, 1)
    passes = []
    model.get_output_embeddings().register_forward_hook(lambda *_: passes.append(1))
    prompt = random_ids(1, 9)
    output = model.generate(prompt, assistant_model=assistant, do_sample=False, **{**SETTINGS, "eos_token_id": None})
    assert len(passes) == 4 + 1  # 16 tokens, 5 a pass, and one pass for the last token
    assert_state_after(model, model.memory_state, output.sequences, prompt, start, ended=at_word([]))
    assert_same_state(assistant.memory_state, model.memory_state)


def in_other_words():
    """A larger vocabulary that has all but the special tokens in another order."""
    tokens = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    tokens |= {character(3 + i * 5 % 98): i + 3 for i in range(98)} | {"é" * (i + 1): VOCABULARY + i for i in range(4)}
    plain = Tokenizer(models.BPE(tokens, []))
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def with_more_words(family):
    """A model for them, with a memory."""
    config = CONFIGS[family]()
    config.vocab_size = VOCABULARY + 4
    torch.manual_seed(3)
    memory = MemoryConfig(num_heads=2, num_slots=4, slot_size=8)
    return guessing(wake(add_memory(AutoModelForCausalLM.from_config(config).eval(), memory)).double())


@pytest.mark.parametrize("sample", (False, True), ids=("greedy", "sampling"))
@pytest.mark.parametrize("family", FAMILIES)
def test_an_assistant_of_another_tokenizer(family, sample, taken_back):
    """transformers translates its guesses, and cuts text into other tokens again and again: too far back for its memory."""
    model, assistant, prompt = memory_model(family), with_more_words(family), random_ids(1, 9)
    words = {"tokenizer": tokenizer(), "assistant_tokenizer": in_other_words()}
    model.memory_state = start = some_state(model, 1)
    with pytest.raises(ValueError, match=r"assistant.disable_memory\(\)"):
        model.generate(prompt, assistant_model=assistant, do_sample=sample, **words, **SETTINGS)
    assert model.memory_state is start
    torch.manual_seed(2)
    with assistant.disable_memory():
        output = model.generate(prompt, assistant_model=assistant, do_sample=sample, **words, **SETTINGS)
    assert_state_after(model, model.memory_state, output.sequences, prompt, start, ended=at_word([EOS]))
    assert taken_back
    if not sample:
        wanted = model.generate(prompt, memory_state=start, do_sample=False, **SETTINGS)
        assert torch.equal(output.sequences, wanted.sequences)


def test_a_model_without_memory_takes_a_draft_with_one():
    model, assistant = base_model("llama").double(), memory_model("llama", seed=3)
    assistant.memory_state = before = some_state(assistant, 1)
    prompt = random_ids(1, 9)
    wanted = model.generate(prompt, do_sample=False, **SETTINGS)
    output = model.generate(prompt, assistant_model=assistant, do_sample=False, **SETTINGS)
    assert torch.equal(output.sequences, wanted.sequences)
    assert assistant.memory_state is before


def test_a_cache_that_goes_on_with_guesses(family_model):
    prompt, settings = repeating_prompt(), {**SETTINGS, "eos_token_id": None, "do_sample": False}
    cache = DynamicCache()
    first = family_model.generate(prompt, past_key_values=cache, prompt_lookup_num_tokens=3, **settings)
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    assert not find_layer(cache).record_past
    longer = torch.cat([first.sequences, random_ids(1, 5, seed=8)], dim=1)
    wanted = family_model.generate(longer, past_key_values=copy.deepcopy(cache), **settings)
    second = family_model.generate(longer, past_key_values=cache, prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(second.sequences, wanted.sequences)
    assert_state_after(family_model, second.memory_state, second.sequences, prompt, ended=at_word([]))
    third = family_model.generate(second.sequences, past_key_values=cache, **settings)
    assert_state_after(family_model, third.memory_state, third.sequences, prompt, ended=at_word([]))


def test_guesses_where_memory_is_disabled(family_model):
    """The state in a cache is in nobody's way, and stays as it is."""
    settings = {**SETTINGS, "eos_token_id": None, "do_sample": False, "prompt_lookup_num_tokens": 3}
    prompt = repeating_prompt()
    cache = DynamicCache()
    first = family_model.generate(prompt, past_key_values=cache, **settings)
    longer, before, plain = torch.cat([first.sequences, prompt], dim=1), find_layer(cache).state, copy.deepcopy(cache)
    plain.layers.remove(find_layer(plain))
    with family_model.disable_memory():
        wanted = family_model.generate(longer, past_key_values=plain, **settings)
        got = family_model.generate(longer, past_key_values=cache, **settings)
    assert torch.equal(got.sequences, wanted.sequences)
    assert_same_state(find_layer(cache).state, before, 0)


@pytest.mark.parametrize("how", ("assistant", "lookup"))
def test_context_that_memory_does_not_take_in(family_model, how):
    prompt, start = repeating_prompt(), some_state(family_model, 1)
    memory_mask = torch.arange(24)[None] > 9
    guess = {"prompt_lookup_num_tokens": 5} if how == "lookup" else {"assistant_model": stumbling_twin(family_model)}
    settings = {**SETTINGS, "memory_mask": memory_mask, "memory_state": start, "do_sample": False}
    output = family_model.generate(prompt, **guess, **settings)
    wanted = family_model.generate(prompt, **settings)
    assert torch.equal(output.sequences, wanted.sequences)
    assert_same_state(output.memory_state, wanted.memory_state)
    assert_state_after(
        family_model,
        output.memory_state,
        output.sequences,
        prompt,
        start,
        memory_mask=memory_mask,
        ended=at_word([EOS]),
    )


def test_stop_strings_end_guesses(family_model):
    """What was decided on along with the stop string is returned, so it is in the memory."""
    model, prompt = family_model, repeating_prompt()
    settings = {**SETTINGS, "eos_token_id": None, "do_sample": False, "prompt_lookup_num_tokens": 5}
    settings["suppress_tokens"] = [0, 1, 2]  # special ones spell nothing
    whole = model.generate(prompt, memory_state=model.initial_memory_state(1), **settings).sequences[0, 24:]
    stop = next(character(i) for i in whole[4:].tolist() if character(i) not in "<pad></s>")
    output = model.generate(prompt, stop_strings=[stop], tokenizer=tokenizer(), **settings)
    assert output.sequences.shape[1] < 24 + 16
    assert_state_after(model, model.memory_state, output.sequences, prompt, ended=at_word([]))


def test_prompts_of_embeddings_with_guesses():
    model, prompt = memory_model("qwen2"), random_ids(1, 9)
    settings = {**SETTINGS, "do_sample": False, "memory_state": some_state(model, 1)}
    embeds = model.get_input_embeddings()(prompt)
    mask = (torch.arange(9) > 1).long()[None]
    for more in ({"assistant_model": another_model(model)}, {"prompt_lookup_num_tokens": 4, "attention_mask": mask}):
        with pytest.raises(ValueError, match="input_ids"):
            model.generate(inputs_embeds=embeds, **more, **settings)
    if Version(transformers.__version__) < Version("5.23"):  # it keeps masks that hide nothing
        return
    wanted = model.generate(prompt, **settings)
    got = model.generate(inputs_embeds=embeds, prompt_lookup_num_tokens=4, **settings)
    assert torch.equal(got.sequences, wanted.sequences[:, 9:])
    assert_same_state(got.memory_state, wanted.memory_state)


def test_a_failing_draft_leaves_both_memories():
    model, assistant = memory_model("llama"), memory_model("llama", seed=3)
    model.memory_state, assistant.memory_state = before = some_state(model, 1), some_state(assistant, 1)
    assistant.memory_sites()["top"].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(random_ids(1, 5), assistant_model=assistant, max_new_tokens=4)
    assert (model.memory_state, assistant.memory_state) == before


def test_what_transformers_refuses_is_refused(family_model):
    family_model.memory_state = before = some_state(family_model, 2)
    for prompt, more, message in (
        (random_ids(2), {}, "batch_size = 1"),
        (random_ids(1), {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        (random_ids(1), {"cache_implementation": "static"}, "Static"),
        (random_ids(1), {"use_cache": False}, "use_cache"),
    ):
        state = some_state(family_model, len(prompt))
        with pytest.raises(ValueError, match=message):
            family_model.generate(prompt, prompt_lookup_num_tokens=3, max_new_tokens=4, memory_state=state, **more)
    assert family_model.memory_state is before

"""Everything else that `generate()` of transformers takes: the memory is right after it, or it is refused in words."""

import contextlib
import io
import threading

import pytest
import torch
import transformers
from decoding import OFTEN, assert_state_after, at_word, padded_prompt, some_state, tokenizer
from packaging.version import Version
from shared_models import no_state_stays  # noqa: F401 (a fixture)
from tiny import (
    EOS,
    FAMILIES,
    PAD,
    assert_same_state,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    random_ids,
)
from transformers import (
    DynamicCache,
    GenerationConfig,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
)
from transformers.generation import GenerationMixin
from transformers.generation import utils as generation_utils


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """One a family."""
    return memory_model(request.param, cell="mingru", decay_every="turn")


# Which token is chosen

OPTIONS = {
    "temperature": {"do_sample": True, "temperature": 0.6},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.7},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "typical_p": {"do_sample": True, "typical_p": 0.6},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.02},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.02},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[7], [8, 9]]},
    "sequence_bias": {"sequence_bias": [[[13], 6.0], [[14, 15], -6.0]]},
    "suppress_tokens": {"suppress_tokens": list(range(3, 40))},
    "min_new_tokens": {"min_new_tokens": 4},
    "forced_eos_token_id": {"forced_eos_token_id": EOS},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5)},
    "watermarking_config": {"do_sample": True, "watermarking_config": WatermarkingConfig(bias=2.5)},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [20 + row, 30, 41]},
    "guidance_scale": {"guidance_scale": 1.7},
    "max_time": {"max_time": 60.0},
    "position_ids": {"position_ids": torch.arange(11).expand(2, -1) + 3},
}


@pytest.mark.parametrize("beams", (1, 2))
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(model, option, beams):
    """Alone, for single rows and for beams, over left-padded rows that finish early."""
    prompt, mask = padded_prompt()
    start = some_state(model)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": OFTEN, "num_beams": beams, **OPTIONS[option]}
    if option == "position_ids":
        mask, prompt = torch.ones_like(mask), random_ids(2, 11)
    model.memory_state = start
    torch.manual_seed(3)
    sequences = model.generate(prompt, attention_mask=mask, **settings)
    ended = at_word([*OFTEN, EOS] if option == "forced_eos_token_id" else OFTEN)
    if option == "position_ids":
        return assert_positions_were_used(model, sequences, start)
    assert_state_after(model, model.memory_state, sequences, prompt, start, mask, ended=ended)


def assert_positions_were_used(model, sequences, start):
    """No turn begins, as no position is 0."""
    positions = torch.arange(sequences.shape[1]) + 3
    for row, ids in enumerate(sequences):
        stop = next((n for n in range(12, len(ids) + 1) if int(ids[n - 1]) in OFTEN), len(ids))
        with torch.no_grad():
            part = {"position_ids": positions[None, :stop], "memory_state": start.select(row)}
            wanted = model(ids[None, :stop], use_cache=False, **part).memory_state
        assert_same_state(model.memory_state.select(row), wanted)
    assert model.memory_state.turns.tolist() == start.turns.tolist()


def test_guidance_reads_the_memory_in_one_branch_only(model):
    """The branch without the prompt has no memory, nor does it write into one."""
    prompt, start = random_ids(1, 8), some_state(model, 1)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "guidance_scale": 2.5}
    sequences = model.generate(prompt, negative_prompt_ids=random_ids(1, 5, seed=4), memory_state=start, **settings)
    ids, negative = prompt, random_ids(1, 5, seed=4)
    with torch.no_grad():
        for _ in range(6):
            with_it = model(ids, memory_state=start, use_cache=False).logits[:, -1].log_softmax(-1)
            without = model(negative, use_cache=False).logits[:, -1].log_softmax(-1)
            token = (2.5 * (with_it - without) + without).argmax(-1, keepdim=True)
            ids, negative = torch.cat([ids, token], 1), torch.cat([negative, token], 1)
    assert torch.equal(sequences, ids)


def test_token_healing():
    """The last token of a prompt is chosen anew, by the base model; the memory sees the prompt as it is returned."""
    model, words = memory_model("llama"), tokenizer()
    longer = [f"A{letter}" for letter in "BCDEFGHIJ"]  # what "A" can be healed to
    words.add_tokens(longer)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    prompt = words("XYZA", return_tensors="pt").input_ids
    model.memory_state = start = some_state(model, 1)
    sequences = model.generate(
        prompt, token_healing=True, tokenizer=words, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert_state_after(model, model.memory_state, sequences, prompt, start, ended=at_word([]))
    assert model.memory_state.tokens.item() == start.tokens.item() + sequences.shape[1]
    with model.disable_memory():
        healed = model.heal_tokens(prompt, words)
    assert torch.equal(sequences[:, :4], healed)
    assert words.decode(healed[0]) in [f"XYZ{token}" for token in longer]


# Prompts


@pytest.mark.parametrize("memory_mask", (False, True))
@pytest.mark.parametrize("family", ("gpt2", "qwen2"))
def test_beams_over_a_prompt_of_embeddings(family, memory_mask):
    """With tied embeddings a prompt of embeddings is the prompt of their tokens."""
    model, (prompt, mask) = memory_model(family), padded_prompt()
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "eos_token_id": OFTEN}
    settings |= {"attention_mask": mask, "memory_state": some_state(model), "return_dict_in_generate": True}
    if memory_mask:
        settings["memory_mask"] = torch.arange(11).expand(2, -1) > 7
    wanted = model.generate(prompt, **settings)
    got = model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **settings)
    assert torch.equal(got.sequences, wanted.sequences[:, 11:])
    assert_same_state(got.memory_state, wanted.memory_state)


@pytest.mark.parametrize("shape", ((2, 10), (1, 11), (2, 13)))
def test_a_memory_mask_of_another_shape_is_refused(shape):
    model = memory_model()
    with pytest.raises(ValueError, match=r"memory_mask is .*11 prompt tokens"):
        model.generate(random_ids(2, 11), memory_mask=torch.ones(shape, dtype=torch.bool), max_new_tokens=2)
    assert model.memory_state is None


# A cache of one's own


def filled(model, prompt, start):
    """A cache that holds all of `prompt` but its last token."""
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=cache, memory_state=start)
    return cache


@pytest.mark.parametrize(
    "more", ({"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3, "do_sample": True})
)
def test_several_rows_go_on_from_a_cache(model, more):
    prompt, start = random_ids(2, 9), some_state(model)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": OFTEN, **more}
    with pytest.raises(ValueError, match=r"batch_repeat_interleave\(3\)"):
        model.generate(prompt, past_key_values=filled(model, prompt, start), **settings)
    cache = filled(model, prompt, start)
    cache.batch_repeat_interleave(3)
    torch.manual_seed(2)
    sequences = model.generate(prompt, past_key_values=cache, **settings)
    assert_state_after(model, model.memory_state, sequences, prompt, start)
    torch.manual_seed(2)
    assert torch.equal(sequences, model.generate(prompt, memory_state=start, **settings))


@pytest.mark.parametrize("beams", (1, 3))
def test_new_tokens_alone_go_on_from_a_cache(model, beams):
    """The mask tells of all tokens, the ids are the new ones; context can be kept from the memory all the same."""
    past, new, start = random_ids(2, 7), random_ids(2, 4, seed=3), some_state(model)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0

    @torch.no_grad()
    def fed(ids, cache, **more):
        seen = torch.nn.functional.pad(mask, (0, ids.shape[1]), value=1)[:, : cache.get_seq_length() + ids.shape[1]]
        positions = (seen.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        return model(ids, attention_mask=seen, position_ids=positions, past_key_values=cache, **more)

    cache, again = DynamicCache(), DynamicCache()
    for each in (cache, again):
        fed(past, each, memory_state=start)
    cache.batch_repeat_interleave(beams)
    context = torch.tensor([[False, True, True, True]] * 2)  # the first new token is
    settings = {"num_beams": beams, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    sequences = model.generate(new, past_key_values=cache, attention_mask=mask, memory_mask=context, **settings)
    written = torch.nn.functional.pad(context, (0, 5), value=True)
    assert_same_state(model.memory_state, fed(sequences, again, memory_mask=written).memory_state)


def test_a_cache_that_is_returned_holds_all_but_the_last_token():
    """The step that takes in the last token is taken back, or made on a copy where that cannot be (sliding windows)."""
    for family in ("llama", "mistral"):
        model, prompt = memory_model(family), random_ids(2, 11)
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
        output = model.generate(prompt, **settings)
        cache = output.past_key_values
        assert cache.get_seq_length() == 22
        with torch.no_grad():
            wanted = model(output.sequences, use_cache=False)
            got = model(output.sequences[:, -1:], past_key_values=cache, position_ids=torch.full((2, 1), 22))
        torch.testing.assert_close(got.logits[:, -1], wanted.logits[:, -1])
        assert_same_state(got.memory_state, wanted.memory_state)


# Streaming


def test_text_is_streamed_as_it_is_decoded(model):
    words, prompt, text = tokenizer(), random_ids(1, 6), io.StringIO()
    with contextlib.redirect_stdout(text):
        sequences = model.generate(
            prompt, streamer=TextStreamer(words, skip_prompt=True), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    assert text.getvalue() == words.decode(sequences[0, 6:]) + "\n"
    assert_state_after(model, model.memory_state, sequences, prompt, ended=at_word([]))


@pytest.mark.parametrize("more", ({}, {"prompt_lookup_num_tokens": 3}))
def test_text_is_streamed_out_of_a_thread(model, more):
    words, prompt = tokenizer(), random_ids(1, 6).repeat(1, 3)
    streamer = TextIteratorStreamer(words, skip_prompt=True, timeout=60)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **more}
    thread = threading.Thread(target=lambda: model.generate(prompt, streamer=streamer, **settings))
    thread.start()
    text = "".join(streamer)
    thread.join()
    state = model.memory_state
    sequences = model.generate(prompt, memory_state=model.initial_memory_state(1), **settings)
    assert text == words.decode(sequences[0, 18:])
    assert_state_after(model, state, sequences, prompt, ended=at_word([]))


@pytest.mark.parametrize("returned", (False, True))
def test_a_stop_that_is_noticed_one_step_late(model, returned, monkeypatch):
    """As on Apple's GPUs: one token too many is fed when all rows have ended, and taken back if the cache is kept."""
    if not hasattr(generation_utils, "DeferredStopCheck"):
        pytest.skip("this version of transformers stops at once on every device")

    class Event:
        def __init__(self, **_): ...
        def record(self): ...
        def synchronize(self): ...

    late = []

    def is_supported(*_, is_assistant, **__):
        late.append(is_assistant)
        return not is_assistant

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(generation_utils.DeferredStopCheck, "is_supported", staticmethod(is_supported))
    prompt, mask = padded_prompt()
    start = some_state(model)
    settings = {"max_new_tokens": 30, "do_sample": True, "eos_token_id": OFTEN, "return_dict_in_generate": returned}
    torch.manual_seed(3)
    model.memory_state = start
    result = model.generate(prompt, attention_mask=mask, **settings)
    sequences = result.sequences if returned else result
    assert late and sequences.shape[1] < 11 + 30
    assert_state_after(model, model.memory_state, sequences, prompt, start, mask)


# A decoding function of one's own


def sample_twice(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """Decodes a reply, throws it away, and decodes another one from a cache of its own."""
    settings = {"max_new_tokens": 3, "do_sample": True, "eos_token_id": None}
    with torch.no_grad():
        for _ in range(2):
            ids, cache = input_ids, DynamicCache(config=model.config)
            output = model(ids, past_key_values=cache, memory_state=model_kwargs.get("memory_state"))
            for _ in range(settings["max_new_tokens"]):
                token = torch.multinomial(output.logits[:, -1].softmax(-1), 1)
                ids = torch.cat([ids, token], 1)
                output = model(token, past_key_values=cache)
    return ids


def wraps_sampling(model, *args, **kwargs):
    return GenerationMixin._sample(model, *args, **kwargs)


@pytest.mark.parametrize("decode", (sample_twice, wraps_sampling))
def test_a_decoding_function_of_ones_own(model, decode):
    prompt, start = random_ids(2, 7), some_state(model)
    model.memory_state = start
    sequences = model.generate(prompt, custom_generate=decode, max_new_tokens=3, do_sample=True, eos_token_id=OFTEN)
    ended = at_word([] if decode is sample_twice else OFTEN)
    assert_state_after(model, model.memory_state, sequences, prompt, start, ended=ended)


CUSTOM = """
from transformers import GenerationMixin


def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    for _ in range(generation_config.max_new_tokens):
        logits = logits_processor(input_ids, model(input_ids, use_cache=False).logits[:, -1])
        input_ids = input_ids.new_tensor([[*row, word] for row, word in zip(input_ids.tolist(), logits.argmin(-1).tolist())])
    return input_ids


def generate(model, *args, **kwargs):
    return GenerationMixin.generate(model, *args, custom_generate=decode, **kwargs)
"""


def test_a_strategy_out_of_a_folder(model, tmp_path):
    """As those that transformers moved to the hub come: `custom_generate/generate.py`."""
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(CUSTOM)
    prompt, start = random_ids(2, 7), some_state(model)
    model.memory_state = start
    sequences = model.generate(prompt, custom_generate=str(tmp_path), trust_remote_code=True, max_new_tokens=3)
    assert sequences.shape == (2, 10)
    assert_state_after(model, model.memory_state, sequences, prompt, start, ended=at_word([]))


def test_a_decoding_function_that_does_not_say_what_it_decoded():
    model = memory_model()
    model.memory_state = before = some_state(model)
    with pytest.raises(ValueError, match="custom_generate"):
        model.generate(random_ids(2, 7), custom_generate=lambda model, *args, **kwargs: ["a reply"], max_new_tokens=3)
    assert model.memory_state is before


# Refused

MOVED = {  # to repositories of code on the hub
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "dola": {"dola_layers": "low"},
    "group beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained beams": {"num_beams": 2, "force_words_ids": [[[5]]]},
}


@pytest.mark.parametrize("strategy", MOVED)
def test_strategies_that_transformers_moved_to_the_hub(model, strategy):
    """Refused with where they went; the memory stays."""
    model.memory_state = before = some_state(model)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(random_ids(2), max_new_tokens=3, **MOVED[strategy])
    assert model.memory_state is before


def test_other_things_that_transformers_refuses(model):
    model.memory_state = before = some_state(model)
    for settings, message in (
        ({"num_beams": 2, "streamer": TextStreamer(tokenizer())}, "`streamer` cannot be used with beam search"),
        ({"do_sample": False, "num_return_sequences": 2}, "`num_return_sequences` different than 1"),
        ({"prefill_chunk_size": 4, "use_cache": False}, "without a cache"),
        ({"surprise": 1}, r"not used by the model: \['surprise'\]"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(random_ids(2), **{"max_new_tokens": 3, **settings})
    assert model.memory_state is before


def test_conversations_packed_into_one_row_are_refused(model):
    model.memory_state = before = some_state(model)
    prompts = random_ids(2, 5)
    with pytest.raises(ValueError, match="disable_memory"):
        model.generate_batch(prompts.tolist(), generation_config=GenerationConfig(max_new_tokens=2))
    with pytest.raises(ValueError, match="disable_memory"):
        model.init_continuous_batching()
    if Version(transformers.__version__) >= Version("5.23"):
        with pytest.raises(ValueError, match="disable_memory"):
            model.generate(prompts, cache_implementation="paged", max_new_tokens=2)
    assert model.memory_state is before


# Precision


@pytest.mark.parametrize("strategy", ("greedy", "beams", "guesses", "static"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lower_precision(family, dtype, strategy):
    """What is read differs a little between one pass and many; the memory stays as close as that."""
    model = memory_model(family).to(dtype)
    prompt = random_ids(1, 4).repeat(1, 3)
    settings = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "guesses": {"prompt_lookup_num_tokens": 3},
        "static": {"cache_implementation": "static"},
    }[strategy]
    model.memory_state = start = some_state(model, 1)
    sequences = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, **settings)
    assert model.memory_state.sites["top"]["slots"].dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert_state_after(model, model.memory_state, sequences, prompt, start, ended=at_word([]), tolerance=tolerance)


# The pipeline


def test_the_pipeline_in_batches():
    """Prompts of different lengths are padded by the pipeline; each row is a conversation of its own."""
    model, words = memory_model("llama").float(), tokenizer()
    words.padding_side = "left"
    model.generation_config.pad_token_id = PAD
    generate = pipeline("text-generation", model=model, tokenizer=words, device="cpu")
    prompts = ["ABCDE", "AB", "XYZ"]
    model.reset(3)
    replies = generate(prompts, batch_size=3, max_new_tokens=4, do_sample=False)
    together = model.memory_state
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        model.reset(1)
        alone = generate(prompt, max_new_tokens=4, do_sample=False)
        assert alone[0]["generated_text"] == reply[0]["generated_text"]
        assert_same_state(together.select(row), model.memory_state, 1e-4)


def test_the_pipeline_talks(caplog):
    """Messages go through the chat template; a second call goes on with the same memory."""
    model, words = memory_model("llama").float(), tokenizer()
    words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    generate = pipeline("text-generation", model=model, tokenizer=words, device="cpu")
    for turn in (1, 2):
        talk = generate([{"role": "user", "content": "ABC"}], max_new_tokens=4, do_sample=False)[0]["generated_text"]
        assert [message["role"] for message in talk] == ["user", "assistant"]
        assert model.memory_state.turns.item() == turn
    assert "not supported" not in caplog.text

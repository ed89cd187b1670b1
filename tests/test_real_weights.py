"""The invariants on real weights: SmolLM2-135M-Instruct, a Llama, with the memory that ships for it, in float32."""

import pytest
import torch
from decoding import assert_state_after, at_word
from tiny import assert_close, assert_same_state
from transformers import TextIteratorStreamer

from gru_memory import add_memory
from gru_memory.bench.models import sharing_weights
from gru_memory.embedded import load_model
from gru_memory.shipped import shipped_memory

pytestmark = [pytest.mark.needs_model, pytest.mark.slow]
TOLERANCE = 2e-3
BEFORE = "Please remember that my locker code is 3517."
TOLD = "My boat is called Marigold. My boat is red. What is my boat called? My boat is called"


class Real:
    """The model with memory, the same weights without, and a text as ids."""

    def __init__(self):
        base, self.tokenizer = load_model()
        self.base = sharing_weights(base)
        self.model = add_memory(base)
        self.model.load_memory(shipped_memory())
        self.ids = self.tokenizer(TOLD, return_tensors="pt").input_ids  # (1, T)
        with torch.no_grad():
            before = self.tokenizer(BEFORE, return_tensors="pt").input_ids
            self.start = self.model(before, use_cache=False).memory_state
        self.end = self.tokenizer.eos_token_id


@pytest.fixture(scope="module")
def real():
    return Real()


@torch.no_grad()
def test_whole_is_chunks_is_tokens(real):
    model, ids = real.model, real.ids
    whole = model(ids, memory_state=real.start, use_cache=False)
    for sizes in ([7, 1, ids.shape[1] - 8], [1] * ids.shape[1]):
        cache, state, logits = None, real.start, []
        for part in ids.split(sizes, dim=1):
            given = {} if cache is not None else {"memory_state": state}
            out = model(part, past_key_values=cache, use_cache=True, **given)
            cache, state = out.past_key_values, out.memory_state
            logits.append(out.logits)
        assert_close(torch.cat(logits, 1), whole.logits, TOLERANCE)
        assert_same_state(state, whole.memory_state, TOLERANCE)
    afresh = model(ids, use_cache=False)
    assert (whole.memory_state.sites["top"]["slots"] - afresh.memory_state.sites["top"]["slots"]).abs().max() > 0.01
    with model.disable_memory():  # the text asks for what it tells, and that is heard
        assert (afresh.logits - model(ids, use_cache=False).logits).abs().max() > 0.1


@torch.no_grad()
def test_padding_and_other_rows_change_nothing(real):
    model, ids = real.model, real.ids
    wanted = model(ids, memory_state=real.start, use_cache=False)
    rows = torch.nn.functional.pad(ids, (4, 0), value=real.tokenizer.pad_token_id).repeat(2, 1)
    rows[1] = rows[1].roll(5)
    mask = torch.ones_like(rows)
    mask[0, :4] = 0
    state = real.start.repeat_interleave(2)
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    got = model(rows, attention_mask=mask, position_ids=position_ids, memory_state=state, use_cache=False)
    assert_close(got.logits[:1, 4:], wanted.logits, TOLERANCE)
    assert_same_state(got.memory_state.select(0), wanted.memory_state, TOLERANCE)


STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {
        **{"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.98},
        **{"repetition_penalty": 1.1, "no_repeat_ngram_size": 4, "bad_words_ids": [[7]]},
    },
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 4, "do_sample": False},
    "early exit": {"assistant_early_exit": 20, "do_sample": False},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False},
    "prefill in chunks": {"prefill_chunk_size": 6, "do_sample": False},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_state_after_generate(real, strategy):
    torch.manual_seed(1)
    real.model.memory_state = real.start
    sequences = real.model.generate(real.ids, max_new_tokens=6, pad_token_id=real.end, **STRATEGIES[strategy])
    ended = at_word([real.end])
    assert_state_after(
        real.model, real.model.memory_state, sequences, real.ids, real.start, ended=ended, tolerance=TOLERANCE
    )


def test_stop_strings_and_a_streamer(real):
    model, words = real.model, real.tokenizer
    streamer = TextIteratorStreamer(words, skip_prompt=True)
    model.memory_state = real.start
    settings = {"do_sample": False, "max_new_tokens": 12, "stop_strings": ["Mar"], "tokenizer": words}
    sequences = model.generate(real.ids, streamer=streamer, **settings)
    assert "".join(streamer) == words.decode(sequences[0, real.ids.shape[1] :])
    assert_state_after(
        model, model.memory_state, sequences, real.ids, real.start, ended=at_word([real.end]), tolerance=TOLERANCE
    )


@torch.no_grad()
def test_without_its_memory_it_is_the_base_model_bit_for_bit(real, tmp_path):
    wanted = real.base(real.ids, use_cache=False).logits
    text = real.base.generate(real.ids, max_new_tokens=4, do_sample=False)
    with real.model.disable_memory():
        assert torch.equal(real.model(real.ids, use_cache=False).logits, wanted)
        assert torch.equal(real.model.generate(real.ids, max_new_tokens=4, do_sample=False), text)
    silent = add_memory(sharing_weights(real.base))  # gate 0
    assert torch.equal(silent(real.ids, use_cache=False).logits, wanted)
    heard = real.model(real.ids, memory_state=real.start, use_cache=False)
    assert not torch.equal(heard.logits, wanted)
    real.model.save_memory(tmp_path)
    silent.load_memory(tmp_path)
    assert torch.equal(silent(real.ids, memory_state=real.start, use_cache=False).logits, heard.logits)


def test_only_the_memory_has_gradients(real):
    real.model(real.ids, labels=real.ids, use_cache=False).loss.backward()
    learned = {name for name, p in real.model.named_parameters() if p.grad is not None}
    real.model.zero_grad()
    assert learned == {name for name, _ in real.model.named_parameters() if name.startswith("gru_memory.")}

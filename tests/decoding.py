"""What tests of decoding share: the state that must be there afterwards, and a tokenizer for the tiny models."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from tiny import BOS, EOS, PAD, VOCABULARY, assert_same_state, random_ids
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from gru_memory.cache import MemoryCacheLayer

OFTEN = list(range(40, 75))  # a third of all words end a reply: rows finish early, at different times


def some_state(model, rows=2):
    """The state of conversations that have gone on for a while."""
    with torch.no_grad():
        return model(random_ids(rows, 8, seed=77), use_cache=False).memory_state


def padded_prompt(rows=2, length=11, padding=5):
    """Ids and mask; the first row is left-padded."""
    prompt = random_ids(rows, length)
    mask = torch.ones_like(prompt)
    mask[0, :padding], prompt[0, :padding] = 0, PAD
    return prompt, mask


def at_word(words):
    """Rows end at these words."""
    words = set(words)
    return lambda row, end: int(row[end - 1]) in words


def ends(sequences, prompt, ended):
    """How long each row is: up to and with the first token at which `ended(row, length)` is true."""
    return [next((end for end in range(prompt + 1, len(row) + 1) if ended(row, end)), len(row)) for row in sequences]


def assert_state_after(
    model, state, sequences, prompt, start=None, mask=None, memory_mask=None, ended=None, tolerance=None
):
    """`state` is that of one forward over prompt and reply of each row alone, without padding."""
    every = len(sequences) // len(prompt)
    assert state.batch_size == len(sequences)
    for row, length in enumerate(ends(sequences, prompt.shape[1], ended or at_word(OFTEN))):
        source = row // every
        real = torch.ones(length, dtype=torch.bool)
        writes = torch.ones(length, dtype=torch.bool)
        if mask is not None:
            real[: prompt.shape[1]] = mask[source].bool()
        if memory_mask is not None:
            writes[: prompt.shape[1]] = memory_mask[source].bool()
        ids = sequences[row, :length][real][None]
        with torch.no_grad():
            wanted = model(
                ids,
                memory_mask=writes[real][None],
                memory_state=model.initial_memory_state(1) if start is None else start.select(source),
                use_cache=False,
            )
        assert_same_state(state.select(row), wanted.memory_state, tolerance)


def guessing(assistant, tokens=4):
    """The same assistant, which guesses so many tokens each time."""
    assistant.generation_config.num_assistant_tokens = tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


def repeating_prompt():
    """Prompt lookup finds its own n-grams in it."""
    return random_ids(1, 6).repeat(1, 4)


@contextlib.contextmanager
def tokens_taken_back() -> Iterator[list[int]]:
    """How many tokens the memory took back at each time that it did."""
    numbers, crop = [], MemoryCacheLayer.crop

    def spy(layer, tokens_to_remove):
        crop(layer, tokens_to_remove)
        if tokens_to_remove:
            numbers.append(-tokens_to_remove)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryCacheLayer, "crop", spy)
        yield numbers


def character(token):
    return chr(ord("!") + token)


def tokenizer():
    """One token a character."""
    characters = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, **{character(i): i for i in range(3, VOCABULARY)}}
    plain = Tokenizer(models.BPE(characters, []))
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")

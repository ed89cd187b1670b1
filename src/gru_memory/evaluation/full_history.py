"""The base model with the earlier turns in its context: what a memory is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .batched import GREEDY, BatchReader, Pair, pad


@dataclass
class ContextAnswers:
    """Replies of the base model to questions about one history."""

    replies: list[str]
    history_tokens: int
    kv_bytes: int  # of the keys and values of the history, as they lie in the cache
    dropped_turns: int  # oldest turns that did not fit into the model's positions


@torch.no_grad()
def ask_with_history(
    reader: BatchReader, history: Sequence[Pair], questions: Sequence[str], max_new_tokens: int = 32, **generation: Any
) -> ContextAnswers:
    """Ask the base model each question on its own, after all of `history` (nothing of it: the question alone).

    The history runs through the model once; the questions share its keys and values.
    """
    model = reader.model
    dropped = 0
    while True:
        before, asked = _split_ids(reader, history[dropped:], questions)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        needed = len(before) + max(map(len, asked)) + max_new_tokens
        if longest is None or needed <= longest:
            break
        if dropped == len(history):
            raise ValueError(f"a question needs {needed} positions, the model has {longest}: ask for fewer new tokens")
        dropped += 1
    with model.disable_memory():
        cache, kv_bytes = None, 0
        if before:
            ids = torch.tensor([before], device=model.device)
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            kv_bytes = cache_bytes(cache)
            cache.batch_repeat_interleave(len(questions))
        ids, mask = pad(asked, reader.pad_id, left=True, device=model.device)
        past = torch.tensor([before] * len(questions), dtype=torch.long, device=model.device)
        input_ids = torch.cat([past, ids], dim=1)
        sequences = model.generate(
            input_ids=input_ids, attention_mask=torch.cat([torch.ones_like(past), mask], dim=1),
            past_key_values=cache, max_new_tokens=max_new_tokens, **{**GREEDY, **generation},
            pad_token_id=reader.pad_id,
        )  # fmt: skip
    replies = reader.decode(sequences, input_ids.shape[1])
    return ContextAnswers(replies, len(before), kv_bytes, dropped)


def ask_alone(
    reader: BatchReader,
    questions: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    tell: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy replies of the base model to questions, each asked on its own; `tell` hears how many are done, of how many."""
    tell, replies = tell or (lambda done, total: None), []
    for start in range(0, len(questions), batch_size):
        tell(start, len(questions))
        replies += ask_with_history(reader, [], questions[start : start + batch_size], max_new_tokens).replies
    tell(len(questions), len(questions))
    return replies


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a transformers cache."""
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))


@torch.no_grad()
def kv_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that one more token in the context costs, measured on this model."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with model.disable_memory():
        one, two = (cache_bytes(model(ids[:, :n], use_cache=True, logits_to_keep=1).past_key_values) for n in (1, 2))
    return two - one


def _split_ids(
    reader: BatchReader, history: Sequence[Pair], questions: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Tokens that all questions have before them, and those of each question, as the chat template writes them."""
    renderer = reader.renderer
    if not history:
        return renderer.prefix_ids, [renderer.prompt(question) for question in questions]
    head = [] if reader.system is None else [{"role": "system", "content": reader.system}]
    messages = head + [message for pair in history for message in _messages(*pair)]

    def text(more: list[dict[str, str]], reply: bool) -> str:
        return reader.tokenizer.apply_chat_template(
            messages + more, tokenize=False, add_generation_prompt=reply, chat_template=renderer.template
        )

    before = text([], False)
    whole = [text(_messages(question, None), True) for question in questions]
    if not all(one.startswith(before) for one in whole):  # a template that writes later turns into earlier ones
        before = ""
    return _ids(reader, before), [_ids(reader, one[len(before) :]) for one in whole]


def _messages(user: str, reply: str | None) -> list[dict[str, str]]:
    answered = [] if reply is None else [{"role": "assistant", "content": reply}]
    return [{"role": "user", "content": user}, *answered]


def _ids(reader: BatchReader, text: str) -> list[int]:
    return reader.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

"""The library's promise in one minute: three facts, ten unrelated turns, three questions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .conversation import Conversation
from .evaluation.batched import BatchReader, Pair
from .evaluation.full_history import ask_with_history
from .evaluation.recall import stored_bytes
from .evaluation.scoring import contains
from .inspection import SlotWords, StoredToken, Trace, recalled_words, slot_words, stored_tokens, trace

Progress = Callable[[str, int, int], None]  # (what is being done, done, in all)

TOLD: tuple[Pair, ...] = (
    ("My boat is called Marigold.", "What a lovely name."),
    ("By the way, I live in Porto.", "Good to know."),
    ("Please remember that my locker code is 3517.", "Noted."),
)
UNRELATED: tuple[Pair, ...] = (
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("Can you give me another word for quick?", "Another word for quick is fast."),
    ("What do bees make?", "Bees make honey and wax."),
    ("I slept badly last night.", "I'm sorry to hear that. I hope tonight is better."),
    ("What is seven times six?", "Seven times six is 42."),
    ("Why is the sky blue?", "Air scatters blue light more than red light."),
    ("Which season comes after winter?", "Spring comes after winter."),
    ("Tell me something about the moon.", "The moon goes around the Earth in about 27 days."),
    ("How do I keep bread fresh?", "Keep it in a paper bag or a bread box, away from the sun."),
    ("Is a tomato a fruit?", "Yes, to a botanist a tomato is a fruit."),
)
ASKED: tuple[tuple[str, str], ...] = (  # question, value
    ("What is my boat called?", "Marigold"),
    ("Where do I live?", "Porto"),
    ("What is my locker code?", "3517"),
)


@dataclass(frozen=True)
class DemoAnswer:
    """One question and three replies to it."""

    question: str
    value: str
    alone: str  # the base model, which sees the question alone
    memory: str  # the same model and the same context, with the memory
    full_history: str  # the base model, which sees everything
    recalled: list[tuple[str, float]]  # what the memory adds where the value is due: tokens and logits

    @property
    def right(self) -> bool:
        return contains(self.memory, self.value)


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo shows."""

    answers: list[DemoAnswer]
    stored: list[StoredToken]
    slots: list[SlotWords]  # the fullest first
    state_bytes: int  # one file, float32
    state_bytes_half: int  # the same in float16
    kv_bytes: int  # keys and values of the full history
    history_tokens: int
    seconds: float
    trace: Trace


def run_demo(model: Any, tokenizer: Any, max_new_tokens: int = 24, progress: Progress | None = None) -> DemoResult:
    """Tell, talk, ask, and look inside.

    Args:
        model: a causal LM with a trained memory.
        tokenizer: its tokenizer.
        max_new_tokens: longest reply.
        progress: told how far it is.
    """
    began = time.perf_counter()
    tell = progress or (lambda *_: None)
    history = [*TOLD, *UNRELATED]
    conversation = Conversation(model, tokenizer, max_new_tokens=max_new_tokens)
    for number, (user, reply) in enumerate(history):
        tell("telling, then talking about other things", number, len(history))
        conversation.read(user, reply)
    told = conversation.state

    questions = [question for question, _ in ASKED]
    tell("asking", 0, 3)
    replies = [conversation.say(question) for question in questions]
    reader = BatchReader(model, tokenizer)
    tell("asking", 1, 3)
    alone = ask_with_history(reader, [], questions, max_new_tokens)
    tell("asking", 2, 3)
    full = ask_with_history(reader, history, questions, max_new_tokens)
    tell("looking inside", 0, 1)

    with torch.no_grad():
        telling = trace(model, tokenizer, TOLD)
        answers = [
            DemoAnswer(*ASKED[i], alone.replies[i], replies[i], full.replies[i],
                       _recalled(model, tokenizer, told, *ASKED[i], replies[i]))
            for i in range(len(ASKED))
        ]  # fmt: skip
    slots = sorted(slot_words(model, tokenizer, told), key=lambda slot: -slot.norm)
    tell("looking inside", 1, 1)
    return DemoResult(
        answers=answers,
        stored=stored_tokens(telling),
        slots=slots,
        state_bytes=stored_bytes(told),
        state_bytes_half=stored_bytes(told, torch.float16),
        kv_bytes=full.kv_bytes,
        history_tokens=full.history_tokens,
        seconds=time.perf_counter() - began,
        trace=telling,
    )


def write_plot(result: DemoResult, folder: str | Path) -> Path:
    """Where the told tokens went, as a PNG in `folder`."""
    from .plots import plot_writes

    path = Path(folder) / "writes.png"
    plot_writes(result.trace, path, turns=range(len(TOLD)))
    return path


def _recalled(model, tokenizer, state, question: str, value: str, reply: str) -> list[tuple[str, float]]:
    """What the memory adds at the token before the value (at the last token, if the reply has no value in it)."""
    asked = trace(model, tokenizer, [(question, reply or None)], state)
    at = reply.lower().find(value.lower())
    position = len(asked.tokens) - 1
    if at >= 0:
        left = "".join(asked.tokens).rfind(reply) + at  # characters before the value
        while position > 0 and sum(map(len, asked.tokens[:position])) > left:
            position -= 1
        position -= 1
    return recalled_words(model, tokenizer, asked, position, top=3)

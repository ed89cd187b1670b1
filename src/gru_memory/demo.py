"""The library's promise in one minute: three facts, ten unrelated turns, three questions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conversation import Conversation
from .evaluation.batched import BatchReader, Pair
from .evaluation.full_history import ask_with_history
from .evaluation.scoring import contains
from .inspection import StoredToken, Trace, recalled_words, said_tokens, slot_tokens, slot_words, stored_tokens, trace
from .state import AS_KEPT, MemoryState

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
class DemoSlot:
    """One slot after all turns, seen from both sides."""

    head: int
    slot: int
    made_of: list[tuple[str, float]]  # tokens and their weights
    words: list[tuple[str, float]]  # what the state alone tells of it: see `SlotWords.words`


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo shows."""

    answers: list[DemoAnswer]
    stored: list[StoredToken]  # of which most is left after all turns
    slots: list[DemoSlot]  # in which most is left of what was told
    state_bytes: int  # as a conversation is kept
    kept_in: str  # see `MemoryConfig.kept_in`
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

    answers = [
        DemoAnswer(question, value, *replied, _recalled(model, tokenizer, told, question, value, replied[1]))
        for (question, value), *replied in zip(ASKED, alone.replies, replies, full.replies, strict=True)
    ]
    whole = trace(model, tokenizer, history)
    tell("looking inside", 1, 1)
    return DemoResult(
        answers=answers,
        stored=stored_tokens(whole, by="left"),
        slots=_slots(model, tokenizer, whole),
        state_bytes=len(told.to_bytes(AS_KEPT)),
        kept_in=told.kept_in,
        kv_bytes=full.kv_bytes,
        history_tokens=full.history_tokens,
        seconds=time.perf_counter() - began,
        trace=whole,
    )


def write_plot(result: DemoResult, folder: str | Path) -> Path:
    """Where the told tokens went, as a PNG in `folder`."""
    from .plots import plot_writes

    path = Path(folder) / "writes.png"
    plot_writes(result.trace, path, turns=range(len(TOLD)))
    return path


def _slots(model: Any, tokenizer: Any, whole: Trace, count: int = 8) -> list[DemoSlot]:
    facts = [i for i, turn in enumerate(whole.turns) if 0 <= turn < len(TOLD)]
    left = whole.left[facts].amax(dim=0)  # (N, S)
    found = slot_words(model, tokenizer, whole.state, among=said_tokens(tokenizer, [*TOLD, *UNRELATED]))
    return [
        DemoSlot(found[i].head, found[i].slot, slot_tokens(whole, found[i].head, found[i].slot), found[i].words)
        for i in left.flatten().argsort(descending=True)[:count].tolist()
    ]


def _recalled(
    model: Any, tokenizer: Any, state: MemoryState, question: str, value: str, reply: str
) -> list[tuple[str, float]]:
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

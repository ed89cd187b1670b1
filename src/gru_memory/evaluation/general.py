"""General questions: how often the memory answers as if they had been about the user."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..data.facts import FactGenerator
from ..data.general_questions import GENERAL_QUESTIONS
from ..drawing import PALETTE
from ..limits import at_least
from .asking import as_kept, ask_all, talked, told
from .batched import BatchReader
from .fact_bars import plot_by_facts
from .full_history import ask_alone
from .outcome import Evaluation, Figure, Outcome, Progress
from .scoring import contains
from .untold import declines


@dataclass(frozen=True)
class GeneralConfig:
    """What is told before, and how many general questions are asked."""

    facts: tuple[int, ...] = field(default=(0, 3, 10), metadata={"help": "facts told before; 0: an empty memory"})
    between: int = field(default=6, metadata={"help": "unrelated turns between telling and asking"})
    questions: int = field(
        default=len(GENERAL_QUESTIONS), metadata={"help": "the first so many of data/general_questions.py"}
    )
    seed: int = field(default=1234, metadata={"help": "of the facts"})
    max_new_tokens: int = field(default=24, metadata={"help": "longest reply, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "questions at once"})

    def __post_init__(self) -> None:
        at_least(self, 0, "facts", "between")
        at_least(self, 1, "questions", "max_new_tokens", "batch_size")
        if self.questions > len(GENERAL_QUESTIONS):
            raise ValueError(
                f"questions is {self.questions}: there are {len(GENERAL_QUESTIONS)}, so take at most as many"
            )


@torch.no_grad()
def evaluate_general(model: Any, tokenizer: Any, config: GeneralConfig, progress: Progress | None = None) -> Outcome:
    """Ask a memory in which facts were told what has nothing to do with them, and the base model the same.

    A question is *taken* for one about the user if the reply declines (`untold.declines`) where the base model's does not, and
    it *leaks* if a value that was told stands in the reply.
    """
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    questions = list(GENERAL_QUESTIONS[: config.questions])
    reader = BatchReader(model, tokenizer)
    base = ask_alone(reader, questions, config.batch_size, config.max_new_tokens, partial(tell, "base model"))

    session = FactGenerator(config.seed, values="test").session(max(1, *config.facts), config.between)
    rows, replies = [], []
    for done, facts in enumerate(config.facts):
        tell("facts told", done, len(config.facts))
        turns = [*told(session)[:facts], *talked(session)]
        state = as_kept(reader.read_all(reader.start(1), [turns]))
        found = ask_all(reader, state, [0] * len(questions), questions, config.batch_size, config.max_new_tokens)
        values = [turn.value for turn in session.turns if turn.kind == "tell"][:facts]
        rows.append({"facts": facts, **_compare(found, base, values)})
        for question, reply, other in zip(questions, found, base, strict=True):
            replies.append({"facts": facts, "question": question, "memory": reply, "base": other})
    tell("facts told", len(config.facts), len(config.facts))
    return Outcome(config, rows, time.perf_counter() - began, {"replies": replies})


def _compare(memory: Sequence[str], base: Sequence[str], values: Sequence[str]) -> dict[str, float]:
    count = len(memory)
    return {
        "takes": sum(declines(one) and not declines(other) for one, other in zip(memory, base, strict=True)) / count,
        "leaks": sum(any(contains(reply, value) for value in values) for reply in memory) / count,
        "same": sum(one == other for one, other in zip(memory, base, strict=True)) / count,
        "questions": count,
    }


def plot_general(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Shares of replies that take a question for one about the user, that leak, and that are the base model's."""
    bars = {
        "takes": ("says that nobody told it", PALETTE[0]),
        "leaks": ("gives a value that was told", PALETTE[1]),
        "same": ("says what the base model says", PALETTE[2]),
    }
    plot_by_facts(runs, bars, "replies to general questions (%)", path, title)


GENERAL = Evaluation(
    name="general",
    about="General questions: how often the memory answers as if they were about the user.",
    config=GeneralConfig,
    run=evaluate_general,
    labels={"facts": "facts told"},
    figures={
        "takes": Figure("taken for one about the user", "share"),
        "leaks": Figure("leaks a told value", "share"),
        "same": Figure("same reply as base", "share"),
        "questions": Figure("questions", "count"),
    },
    plot=plot_general,
)

"""General questions: how often the memory answers as if they had been about the user."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.facts import FactGenerator
from ..data.general_questions import GENERAL_QUESTIONS
from ..drawing import PALETTE, panels, save
from .asking import as_kept, ask_all, talked, told
from .batched import BatchReader
from .full_history import ask_with_history
from .outcome import Evaluation, Figure, Outcome, Progress, at_least, labels_of
from .scoring import contains, wilson_interval
from .untold import declines

_KINDS = {
    "takes": ("says that nobody told it", PALETTE[0]),
    "leaks": ("gives a value that was told", PALETTE[1]),
    "same": ("says what the base model says", PALETTE[2]),
}


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


@torch.no_grad()
def evaluate_general(model: Any, tokenizer: Any, config: GeneralConfig, progress: Progress | None = None) -> Outcome:
    """Ask a memory in which facts were told what has nothing to do with them, and the base model the same.

    A question is *taken* for one about the user if the reply declines (`untold.declines`) where the base model's does not, and
    it *leaks* if a value that was told stands in the reply.
    """
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    questions = list(GENERAL_QUESTIONS[: config.questions])
    reader = BatchReader(model, tokenizer)
    base: list[str] = []
    for start in range(0, len(questions), config.batch_size):
        tell("base model", start, len(questions))
        part = questions[start : start + config.batch_size]
        base += ask_with_history(reader, [], part, config.max_new_tokens).replies
    tell("base model", len(questions), len(questions))

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
    """Shares of the replies by the number of facts told; 95% Wilson intervals."""
    figure, (axes,) = panels(1, width=7.5, height=4.2)
    facts = labels_of(runs, "facts")
    for at, (key, (name, colour)) in enumerate(_KINDS.items()):
        for place, number in enumerate(facts):
            rows = [row for run in runs for row in run["rows"] if row["facts"] == number]
            total = sum(row["questions"] for row in rows)
            hits = round(sum(row[key] * row["questions"] for row in rows))
            low, high = wilson_interval(hits, total)
            x, share = place + (at - 1) * 0.27, hits / total
            axes.bar(x, 100 * share, 0.25, color=colour, label=name if place == 0 else None)
            whiskers = [[100 * max(0.0, share - low)], [100 * max(0.0, high - share)]]
            axes.errorbar([x], [100 * share], yerr=whiskers, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    axes.set_xticks(range(len(facts)), ["nothing told" if n == 0 else f"{n} facts told" for n in facts])
    axes.set(ylim=(0, 105), ylabel="replies to general questions (%)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    axes.set_title(title, loc="left", fontweight="bold")
    save(figure, path)


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

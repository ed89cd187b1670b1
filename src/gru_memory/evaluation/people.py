"""Two people in one conversation, who tell different values of the same things: whose is answered?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch

from ..data.facts import FactGenerator
from ..drawing import PALETTE, panels, save
from ..limits import at_least
from .asking import as_kept, ask_all
from .batched import BatchReader, Pair
from .outcome import Evaluation, Figure, Outcome, Progress, labels_of
from .scoring import contains

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack")


@dataclass(frozen=True)
class PeopleConfig:
    """What they tell."""

    facts: int = field(default=2, metadata={"help": "things that both tell of themselves, with different values"})
    between: int = field(default=6, metadata={"help": "unrelated turns between telling and asking"})
    sessions: int = field(default=16, metadata={"help": "sessions; each has its own people, facts and memory"})
    seed: int = field(default=1234, metadata={"help": "of the sessions"})
    max_new_tokens: int = field(default=24, metadata={"help": "longest reply, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "sessions, or questions, at once"})

    def __post_init__(self) -> None:
        at_least(self, 1, "facts", "sessions", "max_new_tokens", "batch_size")
        at_least(self, 0, "between")


@dataclass(frozen=True)
class Question:
    """Who asks, for what, and what the other one said of it."""

    person: int  # 0 speaks first, 1 second
    text: str
    value: str
    of_other: str


@torch.no_grad()
def evaluate_people(model: Any, tokenizer: Any, config: PeopleConfig, progress: Progress | None = None) -> Outcome:
    """Every message begins with who speaks ("Anna here."). Both tell the same things of themselves, with other values; then
    each asks for theirs. As a measure of the facts alone, each person's half is also told and asked in a conversation of its
    own, in the same words."""
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    sessions = make_sessions(config)
    reader = BatchReader(model, tokenizer)
    entries = [(number, question) for number, (_, _, questions) in enumerate(sessions) for question in questions]
    tell("conversations", 0, 2)
    together = _ask(reader, [(told, talk) for told, talk, _ in sessions], entries, config)
    tell("conversations", 1, 2)
    halves = [(told[person::2], talk) for told, talk, _ in sessions for person in (0, 1)]
    apart = _ask(reader, halves, [(2 * number + question.person, question) for number, question in entries], config)
    tell("conversations", 2, 2)

    rows, replies = [], []
    for name, found in (("both in one", together), ("each alone", apart)):
        for person, label in ((0, "first"), (1, "second")):
            mine = [(q, reply) for (_, q), reply in zip(entries, found, strict=True) if q.person == person]
            right = [contains(reply, question.value) for question, reply in mine]
            other = [
                contains(reply, question.of_other) and not ok for (question, reply), ok in zip(mine, right, strict=True)
            ]
            rows.append(
                {
                    "conversation": name,
                    "speaker": label,
                    "right": sum(right) / len(mine),
                    "confused": sum(other) / len(mine),
                    "questions": len(mine),
                }
            )
        for (number, q), reply in zip(entries, found, strict=True):
            replies.append({"conversation": name, "session": number, **vars(q), "reply": reply})
    return Outcome(config, rows, time.perf_counter() - began, {"replies": replies})


def make_sessions(config: PeopleConfig) -> list[tuple[list[Pair], list[Pair], list[Question]]]:
    """For every session the turns that tell (the two take turns), unrelated turns, and the questions."""
    generator = FactGenerator(config.seed, values="test", corrected=1.0)  # two values of each attribute
    rng = Random(f"people {config.seed}")
    sessions = []
    for _ in range(config.sessions):
        names = rng.sample(NAMES, 2)
        told: list[Pair] = []
        questions: list[Question] = []
        taken: set[str] = set()
        while len(questions) < 2 * config.facts:
            fact = generator.fact()
            if taken & {fact.attribute, fact.value, fact.old_value}:
                continue
            taken |= {fact.attribute, fact.value, fact.old_value}
            values = (fact.old_value, fact.value)
            for person, value in enumerate(values):
                own = generator.reworded(replace(fact, value=value, old_value=None))
                told.append((f"{names[person]} here. {own.tell.user}", own.tell.assistant))
                question = f"{names[person]} here. {own.ask.user}"
                questions.append(Question(person, question, value, values[1 - person]))
        talk = [(turn.user, turn.assistant) for turn in (generator.talk() for _ in range(config.between))]
        rng.shuffle(questions)
        sessions.append((told, talk, questions))
    return sessions


def _ask(
    reader: BatchReader,
    conversations: Sequence[tuple[list[Pair], list[Pair]]],
    entries: Sequence[tuple[int, Question]],
    config: PeopleConfig,
) -> list[str]:
    """Replies to every (conversation, question)."""
    replies: dict[int, str] = {}
    for start in range(0, len(conversations), config.batch_size):
        part = conversations[start : start + config.batch_size]
        states = as_kept(reader.read_all(reader.start(len(part)), [told + talk for told, talk in part]))
        here = [at for at, (number, _) in enumerate(entries) if start <= number < start + len(part)]
        rows = [entries[at][0] - start for at in here]
        found = ask_all(
            reader, states, rows, [entries[at][1].text for at in here], config.batch_size, config.max_new_tokens
        )  # fmt: skip
        replies.update(zip(here, found, strict=True))
    return [replies[at] for at in range(len(entries))]


def plot_people(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Right answers, and answers with the other's value, of the first and the second speaker."""
    figure, (axes,) = panels(1, width=7.5, height=4.2)
    groups = [(c, s) for c in labels_of(runs, "conversation") for s in labels_of(runs, "speaker")]
    for at, (key, name, colour) in enumerate(
        (("right", "own value", PALETTE[0]), ("confused", "the other's value", PALETTE[5]))
    ):
        for place, (conversation, speaker) in enumerate(groups):
            rows = [
                r for run in runs for r in run["rows"] if (r["conversation"], r["speaker"]) == (conversation, speaker)
            ]
            shares = [100 * row[key] for row in rows]
            mean = sum(shares) / len(shares)
            x = place + (at - 0.5) * 0.36
            axes.bar(x, mean, 0.34, color=colour, label=name if place == 0 else None)
            if len(shares) > 1:
                spread = [[mean - min(shares)], [max(shares) - mean]]
                axes.errorbar([x], [mean], yerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    axes.set_xticks(
        range(len(groups)), [f"{conversation},\n{speaker} speaker" for conversation, speaker in groups], fontsize=8
    )
    axes.set(ylim=(0, 103), ylabel="replies (%)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    axes.set_title(title, loc="left", fontweight="bold")
    save(figure, path)


PEOPLE = Evaluation(
    name="people",
    about="Two people tell different values of the same things in one conversation: whose is answered?",
    config=PeopleConfig,
    run=evaluate_people,
    labels={"conversation": "conversation", "speaker": "who spoke"},
    figures={
        "right": Figure("own value", "share"),
        "confused": Figure("the other's value", "share"),
        "questions": Figure("questions", "count"),
    },
    plot=plot_people,
)

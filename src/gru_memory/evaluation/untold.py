"""Questions about things never told: what the memory makes the model say, against the base model."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..data.facts import FactGenerator
from ..data.sessions import Turn
from ..drawing import PALETTE
from ..limits import at_least
from .asking import as_kept, ask_all, talked
from .batched import BatchReader
from .fact_bars import plot_by_facts
from .full_history import ask_alone
from .outcome import Evaluation, Figure, Outcome, Progress
from .scoring import contains

# A reply that says that it does not know, or asks back, invents nothing.
_DECLINES = re.compile(
    r"\b(?:do(?:n't| not) (?:have|know|remember|recall)|not (?:sure|aware|able|told|know)|no (?:information|record|idea|memory)"
    r"|unable|cannot|can't|can not|couldn't|could not|(?:haven't|have not|didn't|did not|hasn't|has not) (?:told|tell|mention\w*|"
    r"shar\w*|said|provid\w*|specif\w*|been)|as an ai|language model|without (?:more|further|any)|"
    r"(?:could|can|would) you (?:please )?(?:tell|provide|share|give|clarify|specify)|"
    r"please (?:tell|provide|share|give|clarify|specify)|i'm sorry|i am sorry|"
    r"i apologi[sz]e|unknown|i'd need|i would need|let me know (?:what|which|who\w*|where|when|how|your|more|the))\b"
)
# Unless it goes on to say something of the user all the same: "... but your boat is called the Marigold", "It's 47. Is that right?"
_CLAIMS = re.compile(
    r"\b(?:your [\w' -]+ (?:is|are|was|were)|it(?:'s| is)|that(?:'s| is))\b(?! (?:not|un\w+|a mystery)\b)"
)


@dataclass(frozen=True)
class UntoldConfig:
    """What is told, and what is not."""

    facts: tuple[int, ...] = field(default=(0, 3, 10), metadata={"help": "facts told before; 0: an empty memory"})
    between: int = field(default=6, metadata={"help": "unrelated turns between telling and asking"})
    questions: int = field(default=3, metadata={"help": "questions a session, about things never told in it"})
    sessions: int = field(default=16, metadata={"help": "sessions; each has its own facts, questions and memory"})
    seed: int = field(default=1234, metadata={"help": "of the sessions"})
    max_new_tokens: int = field(default=24, metadata={"help": "longest reply, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "sessions, or questions, at once"})

    def __post_init__(self) -> None:
        at_least(self, 0, "facts", "between")
        at_least(self, 1, "questions", "sessions", "max_new_tokens", "batch_size")


@torch.no_grad()
def evaluate_untold(model: Any, tokenizer: Any, config: UntoldConfig, progress: Progress | None = None) -> Outcome:
    """Ask for attributes that nobody told, after facts about others were, and compare with the base model asked the same.

    A reply *invents* unless it says that it does not know, or asks back (by `declines`, a list of phrases). It *leaks* if a
    value told in the session stands in it. The questions are the same whatever was told before.
    """
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    generator = FactGenerator(config.seed, values="test")
    most = max(config.facts)
    sessions = []
    for _ in range(config.sessions):
        session = generator.session(most + config.questions, config.between)
        tells = [turn for turn in session.turns if turn.kind == "tell"]
        untold = {turn.fact for turn in tells[most:]}
        asks = [turn for turn in session.turns if turn.kind == "ask" and turn.fact in untold]
        sessions.append((tells[:most], talked(session), asks))
    reader = BatchReader(model, tokenizer)
    entries = [(number, turn) for number, (_, _, asks) in enumerate(sessions) for turn in asks]
    questions = [turn.user for _, turn in entries]
    base = ask_alone(reader, questions, config.batch_size, config.max_new_tokens, partial(tell, "base model"))

    rows, replies = [], []
    for done, facts in enumerate(config.facts):
        tell("facts told", done, len(config.facts))
        found = _ask(reader, [(tells[:facts], talk) for tells, talk, _ in sessions], entries, config)
        values = [[turn.value for turn in tells[:facts]] for tells, _, _ in sessions]
        rows.append({"facts": facts, **_compare(found, base, [values[number] for number, _ in entries])})
        for (number, turn), reply, other in zip(entries, found, base, strict=True):
            replies.append({"facts": facts, "session": number, "question": turn.user, "memory": reply, "base": other})
    tell("facts told", len(config.facts), len(config.facts))
    return Outcome(config, rows, time.perf_counter() - began, {"replies": replies})


def declines(reply: str) -> bool:
    """Whether a reply says that it does not know, asks back, or says nothing."""
    text = reply.casefold().replace("\u2019", "'").strip()
    if not text:
        return True
    said = _DECLINES.search(text)
    if said is None:
        *before, last = re.split(r"(?<=[.!?])\s+", text)
        return last.endswith("?") and not any(
            _CLAIMS.search(sentence) for sentence in before if not sentence.endswith("?")
        )
    after = re.search(r"\b(?:but|however)\b(.*)", text[said.end() :], re.DOTALL)
    return after is None or not _CLAIMS.search(after[1])


def _ask(
    reader: BatchReader,
    sessions: Sequence[tuple[Sequence[Turn], Sequence]],
    entries: Sequence[tuple[int, Turn]],
    config: Any,
) -> list[str]:
    replies: list[str] = []
    for start in range(0, len(sessions), config.batch_size):
        part = sessions[start : start + config.batch_size]
        turns = [[*((turn.user, turn.assistant) for turn in tells), *talk] for tells, talk in part]
        states = as_kept(reader.read_all(reader.start(len(part)), turns))
        here = [(number - start, turn) for number, turn in entries if start <= number < start + len(part)]
        replies += ask_all(
            reader, states, [row for row, _ in here], [turn.user for _, turn in here],
            config.batch_size, config.max_new_tokens,
        )  # fmt: skip
    return replies


def _compare(memory: Sequence[str], base: Sequence[str], told: Sequence[Sequence[str]]) -> dict[str, float]:
    count = len(memory)
    invents, base_invents = (sum(not declines(reply) for reply in replies) / count for replies in (memory, base))
    return {
        "invents": invents,
        "base_invents": base_invents,
        "more": invents - base_invents,
        "leaks": sum(any(contains(r, v) for v in values) for r, values in zip(memory, told, strict=True)) / count,
        "same": sum(one == other for one, other in zip(memory, base, strict=True)) / count,
        "questions": count,
    }


def plot_untold(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Shares of replies that invent, of both models, and that leak."""
    bars = {
        "base_invents": ("base model invents", PALETTE[6]),
        "invents": ("with memory, invents", PALETTE[0]),
        "leaks": ("with memory, gives a value told of something else", PALETTE[1]),
    }
    plot_by_facts(runs, bars, "replies to questions about things never told (%)", path, title)


UNTOLD = Evaluation(
    name="untold",
    about="Questions about things never told: what is invented, against the base model.",
    config=UntoldConfig,
    run=evaluate_untold,
    labels={"facts": "facts told"},
    figures={
        "invents": Figure("invents", "share"),
        "base_invents": Figure("base invents", "share"),
        "more": Figure("more (points)", "points"),
        "leaks": Figure("leaks a told value", "share"),
        "same": Figure("same reply as base", "share"),
        "questions": Figure("questions", "count"),
    },
    plot=plot_untold,
)

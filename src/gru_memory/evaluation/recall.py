"""Recall: facts told, unrelated turns in between, then questions with none of it in the context."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ..data.facts import FactGenerator
from ..data.sessions import Session
from .asking import as_kept, ask_all, kept_bytes
from .batched import BatchReader, Pair
from .full_history import ask_alone, ask_with_history
from .scoring import Rate, contains

Progress = Callable[[str, int, int], None]  # (what is being done, done, in all)

VALUES = {
    "unseen": "unseen values",
    "seen": "seen values",
    "single": "unseen values of one token",
    "multi": "unseen values of several tokens",
}
SPLITS = {"unseen": "test", "seen": "train"}


@dataclass(frozen=True)
class RecallConfig:
    """What is told and asked; one row of a table."""

    facts: int = field(default=3, metadata={"help": "facts told in a session"})
    between: int = field(default=12, metadata={"help": "unrelated turns between telling and asking"})
    values: str = field(
        default="unseen",
        metadata={"help": "'unseen' in training, 'seen', or unseen and of one token ('single') or several ('multi')"},
    )
    phrasings: str = field(default="seen", metadata={"help": "wordings of facts and questions: 'seen' or 'unseen'"})
    attributes: str = field(default="seen", metadata={"help": "what the facts are about: 'seen' or 'unseen'"})
    corrected: bool = field(default=False, metadata={"help": "every fact is told with one value, then corrected"})
    sessions: int = field(default=100, metadata={"help": "sessions; each has its own facts and memory"})
    seed: int = field(default=1234, metadata={"help": "of the sessions"})
    max_new_tokens: int = field(default=32, metadata={"help": "longest reply, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "sessions at once"})

    def __post_init__(self) -> None:
        for name, allowed in (("values", VALUES), ("phrasings", SPLITS), ("attributes", SPLITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name in ("facts", "sessions", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.between < 0:
            raise ValueError(f"between is {self.between}: it must be at least 0")

    @property
    def label(self) -> str:
        """What sets this row apart, for tables and plots."""
        new = [name for name in ("phrasings", "attributes") if getattr(self, name) == "unseen"]
        parts = [
            f"{self.facts} facts",
            f"{self.between} turns between",
            VALUES[self.values],
            *(f"unseen {name}" for name in new),
        ]
        return ", ".join([*parts, "corrected"] if self.corrected else parts)

    def make_sessions(self, tokenizer: Any) -> list[Session]:
        """The sessions of this row; the same arguments give the same ones."""

        def accept(value: str) -> bool:
            if self.values not in ("single", "multi"):
                return True
            tokens = len(tokenizer(f" {value}", add_special_tokens=False)["input_ids"])
            return (tokens == 1) == (self.values == "single")

        generator = FactGenerator(
            self.seed,
            values="train" if self.values == "seen" else "test",
            phrasings=SPLITS[self.phrasings],
            attributes=SPLITS[self.attributes],
            corrected=float(self.corrected),
            accept=accept,
        )
        return [generator.session(self.facts, self.between) for _ in range(self.sessions)]


@dataclass
class Asked:
    """One question and every reply to it; a reply is None where its method was left out."""

    session: int
    question: str
    value: str
    old_value: str | None
    memory: str
    floor: str | None = None
    full_history: str | None = None


@dataclass
class RecallResult:
    """One row of a recall table. Rates are shares of replies that contain the value asked for."""

    config: RecallConfig
    memory: Rate
    floor: Rate | None  # the base model with the question alone
    full_history: Rate | None  # the base model with every turn in its context
    old_value: dict[str, Rate] | None  # corrected facts: replies that contain the value from before, by method
    state_bytes: int  # one conversation's state, as a file
    history_tokens: float | None  # mean a conversation
    kv_bytes: float | None  # keys and values of the full history, mean a conversation
    dropped_turns: int  # turns of full histories that the model has no positions for
    seconds: dict[str, float]
    replies: list[Asked]

    def to_json(self) -> dict[str, Any]:
        return {"label": self.config.label, **asdict(self)}


def evaluate_recall(
    model: Any,
    tokenizer: Any,
    config: RecallConfig,
    floor: bool = True,
    full_history: bool = True,
    progress: Progress | None = None,
) -> RecallResult:
    """Tell, talk, ask; every question is asked on its own, of the state after the last unrelated turn.

    Args:
        model: a causal LM with memory.
        tokenizer: its tokenizer.
        config: what is told and asked.
        floor, full_history: also ask the base model, with the question alone and with every turn in its context.
        progress: told (what, sessions done, sessions in all).
    """
    reader = BatchReader(model, tokenizer)
    sessions = config.make_sessions(tokenizer)
    told = [_told(session) for session in sessions]
    asked = [entry for number, session in enumerate(sessions) for entry in _questions(number, session)]
    seconds: dict[str, float] = {}
    tell = progress or (lambda *_: None)

    began = time.perf_counter()
    state_bytes = 0
    for start in range(0, len(sessions), config.batch_size):
        tell("memory", start, len(sessions))
        batch = range(start, min(start + config.batch_size, len(sessions)))
        states = reader.read_all(reader.start(len(batch)), [told[i] for i in batch])
        state_bytes = state_bytes or kept_bytes(states)
        here = [entry for entry in asked if entry.session in batch]
        replies = ask_all(
            reader, as_kept(states), [entry.session - start for entry in here], [entry.question for entry in here],
            config.batch_size, config.max_new_tokens,
        )  # fmt: skip
        for entry, reply in zip(here, replies, strict=True):
            entry.memory = reply
    tell("memory", len(sessions), len(sessions))
    seconds["memory"] = time.perf_counter() - began

    if floor:
        began = time.perf_counter()
        questions = [entry.question for entry in asked]
        found = ask_alone(reader, questions, config.batch_size, config.max_new_tokens, partial(tell, "floor"))
        for entry, reply in zip(asked, found, strict=True):
            entry.floor = reply
        seconds["floor"] = time.perf_counter() - began

    tokens, sizes, dropped = [], [], 0
    if full_history:
        began = time.perf_counter()
        for number, history in enumerate(told):
            tell("full history", number, len(sessions))
            here = [entry for entry in asked if entry.session == number]
            answers = ask_with_history(reader, history, [e.question for e in here], config.max_new_tokens)
            for entry, reply in zip(here, answers.replies, strict=True):
                entry.full_history = reply
            tokens.append(answers.history_tokens)
            sizes.append(answers.kv_bytes)
            dropped += answers.dropped_turns
        tell("full history", len(sessions), len(sessions))
        seconds["full_history"] = time.perf_counter() - began

    methods = ["memory", *(["floor"] if floor else []), *(["full_history"] if full_history else [])]

    def rate(method: str, wanted: str = "value") -> Rate | None:
        if method not in methods:
            return None
        return Rate.of([contains(getattr(entry, method), getattr(entry, wanted)) for entry in asked])

    return RecallResult(
        config=config,
        memory=rate("memory"),
        floor=rate("floor"),
        full_history=rate("full_history"),
        old_value={method: rate(method, "old_value") for method in methods} if config.corrected else None,
        state_bytes=state_bytes,
        history_tokens=sum(tokens) / len(tokens) if tokens else None,
        kv_bytes=sum(sizes) / len(sizes) if sizes else None,
        dropped_turns=dropped,
        seconds={method: round(value, 1) for method, value in seconds.items()},
        replies=asked,
    )


def standard_suite(sessions: int = RecallConfig.sessions, **settings: Any) -> list[RecallConfig]:
    """The rows of the standard table; `settings` go to every row (seed, batch_size, max_new_tokens)."""
    rows: list[dict[str, Any]] = [
        {},
        {"facts": 6},
        {"between": 50},
        {"values": "multi"},
        {"corrected": True},
        {"phrasings": "unseen"},
        {"attributes": "unseen"},
        {"attributes": "unseen", "phrasings": "unseen"},
        {"values": "seen"},
    ]
    return [RecallConfig(**{"facts": 3, "between": 12, **row}, sessions=sessions, **settings) for row in rows]


def _told(session: Session) -> list[Pair]:
    return [(turn.user, turn.assistant) for turn in session.turns if turn.kind != "ask"]


def _questions(number: int, session: Session) -> list[Asked]:
    first = {turn.fact: turn.value for turn in session.turns if turn.kind == "tell"}
    return [
        Asked(number, turn.user, turn.value, first[turn.fact] if first[turn.fact] != turn.value else None, memory="")
        for turn in session.turns
        if turn.kind == "ask"
    ]

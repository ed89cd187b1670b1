"""Doubt: what a memory that trusts itself more, or less, recalls, invents and does to books."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..data.books import text_paths
from ..data.facts import FactGenerator
from ..drawing import MARKERS, PALETTE, panels, save
from ..limits import at_least
from ..state import MemoryState
from .asking import as_kept, ask_all, asked, talked
from .batched import BatchReader
from .full_history import ask_alone
from .harm import Comparison, compare_book
from .outcome import Evaluation, Figure, Outcome, Progress, curve, labels_of
from .scoring import contains, wilson_interval
from .texts import SKIPPED, text_tokens
from .untold import declines


@dataclass(frozen=True)
class DoubtConfig:
    """By how much trust is shifted, and what is told and asked."""

    shifts: tuple[float, ...] = field(
        default=(-4.0, -2.0, 0.0, 2.0, 4.0, 8.0),
        metadata={"help": "added to the bias of trust, before its sigmoid; 0: as trained"},
    )
    facts: int = field(default=10, metadata={"help": "facts told in a session"})
    between: int = field(default=12, metadata={"help": "unrelated turns between telling and asking"})
    questions: int = field(default=5, metadata={"help": "facts asked for in a session, at most"})
    untold: int = field(default=3, metadata={"help": "questions a session about things never told in it"})
    sessions: int = field(default=12, metadata={"help": "sessions; each has its own facts, questions and memory"})
    books: str | None = field(
        default=None,
        metadata={"help": "folder of plain-text books (.txt), read after a session's facts; none: no books"},
    )
    tokens: int = field(default=1536, metadata={"help": "tokens of each book"})
    seed: int = field(default=1234, metadata={"help": "of the sessions"})
    max_new_tokens: int = field(default=24, metadata={"help": "longest reply, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "sessions, or questions, at once"})

    def __post_init__(self) -> None:
        at_least(self, 1, "facts", "questions", "untold", "sessions", "tokens", "max_new_tokens", "batch_size")
        at_least(self, 0, "between")
        if self.books is not None:
            text_paths(self.books)


@torch.no_grad()
def evaluate_doubt(model: Any, tokenizer: Any, config: DoubtConfig, progress: Progress | None = None) -> Outcome:
    """Tell facts once, then ask for some of them, and for things never told, with the bias of trust shifted each time.

    Trust does not change what is written, so all shifts ask the same states. An answer that was told is *recalled*, or is
    *declined* (the reply says that it does not know, see `untold`), or is *wrong*: with another value, or none. What is still
    wrong when hardly anything is declined was found in the wrong slot, and no doubt helps. Books are read by the memory of the
    first session, full of facts that they are not about; from an empty memory nothing is found, and trust changes nothing.

    Raises:
        ValueError: no site of the memory has a trust to shift (`signature_size` is 0).
    """
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    _trusts(model)
    reader, sessions = BatchReader(model, tokenizer), _sessions(config)
    states = [
        reader.read_all(reader.start(len(part)), [[*tells, *talk] for tells, talk, _, _ in part])
        for part in _parts(sessions, config.batch_size)
    ]
    # Of no memory in particular: with its trust shifted, it is another one.
    states = replace(as_kept(MemoryState.cat(states)), fingerprint=None)
    told = [(row, turn) for row, (_, _, asks, _) in enumerate(sessions) for turn in asks]
    untold = [(row, turn) for row, (_, _, _, asks) in enumerate(sessions) for turn in asks]
    questions = [turn.user for _, turn in untold]
    base = ask_alone(reader, questions, config.batch_size, config.max_new_tokens, partial(tell, "base model"))
    base_invents = sum(not declines(reply) for reply in base) / len(base)
    paths = [] if config.books is None else text_paths(config.books)
    books = [text_tokens(path, tokenizer, config.tokens, SKIPPED) for path in paths]

    rows, replies = [], []
    for number, shift in enumerate(config.shifts):
        tell("shifts", number, len(config.shifts))
        with trust_shifted(model, shift):
            found = [
                ask_all(
                    reader, states, [row for row, _ in part], [turn.user for _, turn in part], config.batch_size,
                    config.max_new_tokens,
                )
                for part in (told, untold)
            ]  # fmt: skip
            comparison = Comparison()
            for ids in books:
                compare_book(model, ids, comparison, state=states.select(0))
        right = [contains(reply, turn.value) for reply, (_, turn) in zip(found[0], told, strict=True)]
        declined = [not hit and declines(reply) for hit, reply in zip(right, found[0], strict=True)]
        low, high = wilson_interval(sum(right), len(right))
        row = {
            "shift": shift, "recall": sum(right) / len(right), "low": low, "high": high,
            "declined": sum(declined) / len(right), "wrong": 1 - (sum(right) + sum(declined)) / len(right),
            "invents": sum(not declines(reply) for reply in found[1]) / len(untold), "base_invents": base_invents,
            "questions": len(told), "untold": len(untold),
        }  # fmt: skip
        if books:
            result = comparison.result("books", 0.0)
            row["change"] = result.memory_loss - result.base_loss
        rows.append(row)
        for kind, asks, said in (("told", told, found[0]), ("untold", untold, found[1])):
            for (session, turn), reply in zip(asks, said, strict=True):
                about = {"shift": shift, "session": session, "kind": kind, "question": turn.user}
                replies.append({**about, "value": turn.value if kind == "told" else None, "reply": reply})
    tell("shifts", len(config.shifts), len(config.shifts))
    return Outcome(config, rows, time.perf_counter() - began, {"replies": replies})


@contextlib.contextmanager
def trust_shifted(model: Any, shift: float) -> Iterator[None]:
    """Within it, `shift` is added to the bias of trust (c_3) of every site that has one.

    Raises:
        ValueError: none has.
    """
    trusts = _trusts(model)
    before = [trust.detach().clone() for trust in trusts]
    try:
        with torch.no_grad():
            for trust in trusts:
                trust[2] += shift
        yield
    finally:
        with torch.no_grad():
            for trust, kept in zip(trusts, before, strict=True):
                trust.copy_(kept)


def _trusts(model: Any) -> list[torch.nn.Parameter]:
    trusts = [site.trust for site in model.memory_sites().values() if hasattr(site, "trust")]
    if not trusts:
        raise ValueError("this memory has no trust to shift: it needs a signature_size")
    return trusts


def _sessions(config: DoubtConfig) -> list[tuple[list, list, list, list]]:
    """Of each session: turns that tell, turns between, questions about what was told, and about what was not."""
    generator, sessions = FactGenerator(config.seed, values="test"), []
    for _ in range(config.sessions):
        session = generator.session(config.facts + config.untold, config.between)
        tells = [turn for turn in session.turns if turn.kind == "tell"][: config.facts]
        facts = {turn.fact for turn in tells}
        asks = [turn for turn in asked(session) if turn.fact in facts][: config.questions]
        untold = [turn for turn in asked(session) if turn.fact not in facts]
        sessions.append(([(turn.user, turn.assistant) for turn in tells], talked(session), asks, untold))
    return sessions


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def plot_doubt(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """What becomes of both kinds of questions, and of books, against the shift; and recall against inventions."""
    harm = any("change" in row for run in runs for row in run["rows"])
    figure, axes = panels(3 if harm else 2, width=4.6, height=4.2)
    for number, (key, name) in enumerate(
        (("recall", "recalled"), ("declined", "declined"), ("wrong", "wrong"), ("invents", "never told: invents"))
    ):
        x, mean, low, high = curve(runs, "shift", key)
        colour = PALETTE[number]
        axes[0].plot(x, [100 * y for y in mean], color=colour, marker=MARKERS[number], label=name)
        axes[0].fill_between(x, [100 * y for y in low], [100 * y for y in high], color=colour, alpha=0.15, linewidth=0)
    base = sum(run["rows"][0]["base_invents"] for run in runs) / len(runs)
    axes[0].axhline(100 * base, color="0.4", linestyle="--", linewidth=1, label="base model invents")
    axes[0].set(xlabel="added to the bias of trust", ylabel="replies (%)", ylim=(-3, 103))
    axes[0].legend(fontsize=8, frameon=False)
    axes[0].set_title(title, loc="left", fontweight="bold")
    invents, recall = ([100 * y for y in curve(runs, "shift", key)[1]] for key in ("invents", "recall"))
    axes[1].plot(invents, recall, color=PALETTE[0], marker=MARKERS[0])
    for shift, x, y in zip(sorted(labels_of(runs, "shift")), invents, recall, strict=True):
        axes[1].annotate(f"{shift:+g}", (x, y), textcoords="offset points", xytext=(4, -11), fontsize=8)
    axes[1].axvline(100 * base, color="0.4", linestyle="--", linewidth=1)
    axes[1].set(xlabel="never told: replies that invent (%)", ylabel="told: replies that contain the value (%)")
    if harm:
        x, mean, low, high = curve(runs, "shift", "change")
        axes[2].plot(x, mean, color=PALETTE[0], marker=MARKERS[0])
        axes[2].fill_between(x, low, high, color=PALETTE[0], alpha=0.15, linewidth=0)
        axes[2].axhline(0, color="0.4", linewidth=0.8)
        axes[2].set(xlabel="added to the bias of trust", ylabel="books after facts: change of loss (nats)")
    save(figure, path)


DOUBT = Evaluation(
    name="doubt",
    about="What a memory that trusts itself more, or less, recalls, invents and does to books.",
    config=DoubtConfig,
    run=evaluate_doubt,
    labels={"shift": "trust"},
    figures={
        "recall": Figure("recalled", "share"),
        "low": Figure("95% from", "share"),
        "high": Figure("to", "share"),
        "declined": Figure("declined", "share"),
        "wrong": Figure("wrong", "share"),
        "invents": Figure("never told: invents", "share"),
        "base_invents": Figure("base invents", "share"),
        "change": Figure("books after the facts (nats)", "change"),
        "questions": Figure("questions", "count"),
        "untold": Figure("never told", "count"),
    },
    plot=plot_doubt,
    interval=("recall", "questions", "low", "high"),
)

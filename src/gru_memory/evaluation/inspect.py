"""Inspection: what is read out of the slots, when it was written and how strong it still is; and whether the model agrees."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.facts import FactGenerator
from ..data.sessions import Session, Turn
from ..drawing import PALETTE, panels, save
from ..inspection import Trace, places_of, recalled_words, trace, words_at
from ..limits import at_least
from .asking import ask_all, asked, talked, told
from .batched import BatchReader
from .outcome import Evaluation, Figure, Outcome, Progress
from .scoring import contains
from .variants import memory_sites

_SHOWN = 0.05  # slots' worth: a slot that holds less of every token is left out of the list


@dataclass(frozen=True)
class InspectConfig:
    """What is told before the memory is opened."""

    facts: int = field(default=5, metadata={"help": "facts told in a session"})
    between: int = field(default=12, metadata={"help": "unrelated turns between telling and looking"})
    sessions: int = field(default=8, metadata={"help": "sessions; each has its own facts and memory"})
    site: str = field(default="top", metadata={"help": "which memory is looked into"})
    seed: int = field(default=1234, metadata={"help": "of the sessions"})
    max_new_tokens: int = field(default=24, metadata={"help": "longest reply, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "questions at once"})

    def __post_init__(self) -> None:
        at_least(self, 1, "facts", "sessions", "max_new_tokens", "batch_size")
        at_least(self, 0, "between")


@torch.no_grad()
def evaluate_inspect(model: Any, tokenizer: Any, config: InspectConfig, progress: Progress | None = None) -> Outcome:
    """Look into the memory after a conversation, then ask.

    Inspection *reads* a value if at every place where one of its tokens was written, that token is the likeliest of the
    vocabulary there now. Its *strength* is the share of the weakest token's write that is left. Both are taken without the
    question. While the model answers rightly, the memory's own likeliest word is compared with every token of the value.
    """
    if config.site not in memory_sites(model):
        raise ValueError(f"there is no memory at site {config.site!r}: it has {sorted(memory_sites(model))}")
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    generator = FactGenerator(config.seed, values="test")
    reader = BatchReader(model, tokenizer)
    facts: list[dict[str, Any]] = []
    slots: list[dict[str, Any]] = []
    for number in range(config.sessions):
        tell("sessions", number, config.sessions)
        session = generator.session(config.facts, config.between)
        seen = trace(model, tokenizer, told(session) + talked(session), site=config.site)
        if number == 0:
            slots = slot_list(model, tokenizer, seen, config.site)
        questions = asked(session)
        answers = ask_all(
            reader, seen.state, [0] * len(questions), [turn.user for turn in questions],
            config.batch_size, config.max_new_tokens,
        )  # fmt: skip
        for turn, answer in zip(questions, answers, strict=True):
            found = _look_for(model, tokenizer, seen, session, turn, config.site)
            if found is None:
                continue
            right = contains(answer, turn.value)
            spoken = _while_answering(model, tokenizer, seen, turn, answer, config.site) if right else None
            facts.append(
                {
                    "value": turn.value,
                    **found,
                    "question": turn.user,
                    "reply": answer,
                    "answered": right,
                    "spoken": spoken,
                }
            )
    tell("sessions", config.sessions, config.sessions)
    if not facts:
        raise ValueError("none of the values stands in the turn that told it: draw others with --seed")
    row = {"facts": config.facts, "between": config.between, **_agreement(facts)}
    return Outcome(config, [row], time.perf_counter() - began, {"facts": facts, "slots_of_first_session": slots})


def slot_list(model: Any, tokenizer: Any, seen: Trace, site: str = "top", top: int = 3) -> list[dict[str, Any]]:
    """For every slot that holds something: the tokens it is made of, when each was written, and what is left of it."""
    found = []
    weights, positions = seen.left.topk(min(top, len(seen.tokens)), dim=0)  # (k, N, S)
    for head, slot in (weights[0] > _SHOWN).nonzero().tolist():
        made = [
            {"token": seen.tokens[i], "turn": seen.turns[i], "left": round(weight, 4)}
            for i, weight in zip(positions[:, head, slot].tolist(), weights[:, head, slot].tolist(), strict=True)
            if weight > _SHOWN
        ]
        found.append(
            {"head": head, "slot": slot, "left": round(float(seen.left[:, head, slot].sum()), 4), "made_of": made}
        )
    return found


def _look_for(
    model: Any, tokenizer: Any, seen: Trace, session: Session, asked_for: Turn, site: str
) -> dict[str, Any] | None:
    """What inspection says of a fact; None if its value cannot be found in the turn that told it."""
    turns = [turn for turn in session.turns if turn.kind in ("tell", "correct")]
    number = max(i for i, turn in enumerate(turns) if turn.fact == asked_for.fact)
    of_turn = [i for i, turn in enumerate(seen.turns) if turn == number]
    places = [of_turn[i] for i in places_of([seen.tokens[i] for i in of_turn], asked_for.value)]
    if not places:
        return None
    said = words_at(model, tokenizer, seen.state, seen.address[places], top=1, site=site)
    words = [word for ((word, _),) in said]
    return {
        "turn": number,
        "tokens": [seen.tokens[i] for i in places],
        "read": words,
        "said": words == [seen.tokens[i] for i in places],
        "strength": float(_left(seen, places).min()),
    }


def _left(seen: Trace, places: Sequence[int]) -> Tensor:
    """(M,) what is left of tokens: slots' worth, mean over the heads."""
    return seen.left[list(places)].sum(dim=2).mean(dim=1)


def _while_answering(
    model: Any, tokenizer: Any, seen: Trace, turn: Turn, answer: str, site: str
) -> list[tuple[str, str]] | None:
    """For every token of the value in a reply: the token, and the memory's own likeliest word before it."""
    again = trace(model, tokenizer, [(turn.user, answer)], seen.state, site=site)
    question = len(BatchReader(model, tokenizer).renderer.prompt(turn.user))
    places = [question + i for i in places_of(again.tokens[question:], turn.value)]
    pairs = [(again.tokens[i], recalled_words(model, tokenizer, again, i - 1, 1)[0][0]) for i in places if i]
    return pairs or None


def _agreement(facts: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    count = len(facts)
    spoken = [token == word for fact in facts for token, word in fact["spoken"] or ()]

    def share(said: bool, answered: bool) -> float:
        return sum(fact["said"] == said and fact["answered"] == answered for fact in facts) / count

    return {
        "asked": count,
        "agree": share(True, True) + share(False, False),
        "both": share(True, True),
        "said_only": share(True, False),
        "answered_only": share(False, True),
        "neither": share(False, False),
        "ranking": ranking([f["strength"] for f in facts if f["answered"]], [f["strength"] for f in facts if not f["answered"]]),
        "strength": sum(fact["strength"] for fact in facts) / count,
        "spoken": sum(spoken) / len(spoken) if spoken else None,
    }  # fmt: skip


def ranking(higher: Sequence[float], lower: Sequence[float]) -> float | None:
    """Share of pairs in which the first is larger, ties half: the area under the ROC curve. None without pairs."""
    if not higher or not lower:
        return None
    wins = sum((one > other) + 0.5 * (one == other) for one in higher for other in lower)
    return wins / (len(higher) * len(lower))


def plot_inspect(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Strength of every fact, by whether it was answered and read; and the slots of the first session by when written."""
    figure, (left, right) = panels(2, width=5.8, height=4.4)
    facts = [fact for run in runs for fact in run["details"]["facts"]]
    for said, colour, name in ((True, PALETTE[0], "inspection reads it"), (False, PALETTE[5], "inspection does not")):
        chosen = [fact for fact in facts if fact["said"] == said]
        heights = [fact["answered"] + 0.3 * ((37 * i % 23) / 23 - 0.5) for i, fact in enumerate(chosen)]
        marker = "o" if said else "X"
        left.scatter(
            [f["strength"] for f in chosen], heights, color=colour, marker=marker, s=30, alpha=0.75, label=name
        )
    left.set_yticks([0, 1], ["not\nanswered", "answered"])
    left.set(xlabel="strength that is left of the value's weakest token", ylim=(-0.5, 1.7))
    left.legend(fontsize=8, frameon=False, loc="upper left")
    slots = runs[0]["details"]["slots_of_first_session"]
    turns = [slot["made_of"][0]["turn"] + 1 for slot in slots]
    right.scatter(
        turns, [slot["made_of"][0]["left"] for slot in slots], color=PALETTE[0], s=14, alpha=0.4, linewidths=0
    )
    right.set(
        xlabel="turn that wrote most of a slot (0: system prompt)",
        ylabel="share of the slot that is left of that token",
    )
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_title(f"{len(slots)} slots that hold something", fontsize=9)
    left.set_title(title, loc="left", fontweight="bold")
    save(figure, path)


INSPECT = Evaluation(
    name="inspect",
    about="What inspection reads out of the slots, and whether the model then answers so.",
    config=InspectConfig,
    run=evaluate_inspect,
    labels={"facts": "facts", "between": "turns between"},
    figures={
        "asked": Figure("facts asked", "count"),
        "agree": Figure("agree", "share"),
        "both": Figure("read and answered", "share"),
        "said_only": Figure("read only", "share"),
        "answered_only": Figure("answered only", "share"),
        "neither": Figure("neither", "share"),
        "ranking": Figure("strength ranks answers", "share"),
        "strength": Figure("strength left", "share"),
        "spoken": Figure("memory's word is the reply's", "share"),
    },
    plot=plot_inspect,
)

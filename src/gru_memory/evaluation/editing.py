"""Editing: what a memory answers before and after it was told to forget, to remember, and to take another one in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.facts import FactGenerator
from ..data.sessions import Session, Turn
from ..drawing import PALETTE, panels, save
from ..editing import diff, same_slots
from ..inspection import places_of, trace
from ..limits import at_least
from ..state import MemoryState
from .asking import as_kept, ask_all, asked, talked
from .batched import BatchReader, Pair
from .outcome import Evaluation, Figure, Outcome, Progress, labels_of
from .scoring import contains
from .variants import memory_sites

EDITS = {
    "forget text": "forget(text)",
    "forget slots": "forget(slot), every slot of the value",
    "remember": "remember(text)",
    "merge": "merge(other)",
    "one conversation": "both read in one conversation",
}


@dataclass(frozen=True)
class EditingConfig:
    """What is told before it is edited."""

    facts: int = field(
        default=4, metadata={"help": "facts in the state that is edited; as many in the one merged into it"}
    )
    between: int = field(default=6, metadata={"help": "unrelated turns after they were told"})
    sessions: int = field(default=8, metadata={"help": "sessions; each has its own facts and memory"})
    words: int = field(default=10, metadata={"help": "words of a difference that are looked at"})
    seed: int = field(default=1234, metadata={"help": "of the sessions"})
    max_new_tokens: int = field(default=24, metadata={"help": "longest reply, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "sessions, or questions, at once"})

    def __post_init__(self) -> None:
        at_least(self, 2, "facts")
        at_least(self, 1, "sessions", "words", "max_new_tokens", "batch_size")
        at_least(self, 0, "between")


@dataclass(frozen=True)
class _Told:
    """A session as this evaluation takes it: own facts, then those of another conversation."""

    own: list[Turn]  # the turns that tell, fact by fact
    other: list[Turn]
    talk: list[Pair]
    asks: dict[str, Turn]  # by fact

    @classmethod
    def of(cls, session: Session, facts: int) -> _Told:
        tells = [turn for turn in session.turns if turn.kind == "tell"]
        return cls(tells[:facts], tells[facts:], talked(session), {turn.fact: turn for turn in asked(session)})


@torch.no_grad()
def evaluate_editing(model: Any, tokenizer: Any, config: EditingConfig, progress: Progress | None = None) -> Outcome:
    """Tell facts; edit the state in each of the ways; ask for what the edit was about, and for the others, before and after.

    Forgetting is about one of the facts told, remembering about the first of another conversation, merging about all of it.
    `named` is the share of the tokens of a value that stand among the words of the difference that the edit made.
    """
    site = "top" if "top" in memory_sites(model) else next(iter(memory_sites(model)))
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    generator = FactGenerator(config.seed, values="test")
    sessions = [
        _Told.of(generator.session(2 * config.facts, config.between), config.facts) for _ in range(config.sessions)
    ]
    reader = BatchReader(model, tokenizer)
    own = _read(reader, [_pairs(one.own) + one.talk for one in sessions], config.batch_size)
    other = _read(reader, [_pairs(one.other) + one.talk for one in sessions], config.batch_size)

    def forgotten(number: int) -> Turn:
        return sessions[number].own[number % config.facts]

    def forget_text(number: int) -> MemoryState:
        turn = forgotten(number)
        return own.select(number).forget(turn.user, model, tokenizer, turn.assistant)

    def forget_slots(number: int) -> MemoryState:
        state = own.select(number)
        for slot in slots_of(model, tokenizer, forgotten(number), state, site):
            state = state.forget(slot, site=site)
        return state

    def remember(number: int) -> MemoryState:
        turn, before = sessions[number].other[0], model.memory_state
        try:
            model.memory_state = own.select(number)
            model.remember(turn.user, tokenizer, turn.assistant)
            return model.memory_state
        finally:
            model.memory_state = before

    def merge(number: int) -> MemoryState:
        return own.select(number).merge(other.select(number))

    def read_on(number: int) -> MemoryState:
        one = sessions[number]
        return reader.read_all(own.select(number), [_pairs(one.other) + one.talk])

    edits: dict[str, tuple[Callable[[int], MemoryState], Callable[[int], list[Turn]]]] = {
        "forget text": (forget_text, lambda number: [forgotten(number)]),
        "forget slots": (forget_slots, lambda number: [forgotten(number)]),
        "remember": (remember, lambda number: sessions[number].other[:1]),
        "merge": (merge, lambda number: sessions[number].other),
        "one conversation": (read_on, lambda number: sessions[number].other),
    }
    right: dict[tuple[str, int, str], bool] = {}  # (edit or "own", session, fact)
    replies = []

    def ask(name: str, states: MemoryState, turns: Callable[[int], list[Turn]]) -> None:
        entries = [(number, turn.fact) for number in range(len(sessions)) for turn in turns(number)]
        asks = [sessions[number].asks[fact] for number, fact in entries]
        found = ask_all(
            reader, as_kept(states), [number for number, _ in entries], [turn.user for turn in asks],
            config.batch_size, config.max_new_tokens,
        )  # fmt: skip
        for (number, fact), turn, reply in zip(entries, asks, found, strict=True):
            right[name, number, fact] = contains(reply, turn.value)
            replies.append(
                {"edit": name, "session": number, "question": turn.user, "value": turn.value, "reply": reply}
            )

    tell("edits", 0, len(edits) + 1)
    ask("own", own, lambda number: sessions[number].own + sessions[number].other)
    rows = []
    for done, (name, (edit, about)) in enumerate(edits.items(), start=1):
        tell("edits", done, len(edits) + 1)
        changed = [edit(number) for number in range(len(sessions))]

        def others(number: int, about: Callable[[int], list[Turn]] = about) -> list[Turn]:
            edited = {turn.fact for turn in about(number)}
            return [turn for turn in sessions[number].own if turn.fact not in edited]

        ask(name, MemoryState.cat(changed), lambda number, about=about, others=others: about(number) + others(number))
        named = None
        if name in ("forget text", "forget slots", "remember"):
            shares = [
                _named(
                    model, tokenizer, own.select(number), changed[number], about(number)[0], name, config.words, site
                )
                for number in range(len(sessions))
            ]
            found = [share for share in shares if share is not None]
            named = sum(found) / len(found) if found else None
        rows.append(
            {
                "edit": EDITS[name],
                "before": _rate(right, "own", sessions, about),
                "after": _rate(right, name, sessions, about),
                "others_before": _rate(right, "own", sessions, others),
                "others_after": _rate(right, name, sessions, others),
                "named": named,
            }
        )
    tell("edits", len(edits) + 1, len(edits) + 1)
    return Outcome(config, rows, time.perf_counter() - began, {"replies": replies})


def slots_of(model: Any, tokenizer: Any, turn: Turn, state: MemoryState, site: str = "top") -> list[tuple[int, int]]:
    """The (head, slot) of a state of one conversation in which the tokens of a turn's value lie, as each head wrote them."""
    seen = trace(model, tokenizer, [(turn.user, turn.assistant)], site=site)
    of_turn = [i for i, number in enumerate(seen.turns) if number == 0]
    places = [of_turn[i] for i in places_of([seen.tokens[i] for i in of_turn], turn.value)]
    found = {(head, slot) for i in places for head, slot in enumerate(seen.address[i].argmax(dim=-1).tolist())}
    if state.addressing == "content":  # read into an empty memory they lie elsewhere than in the conversation
        same, place = same_slots(*(s.sites[site]["slots"].cpu() for s in (state, seen.state)))
        found = {(head, int(place[0, head, slot])) for head, slot in found if same[0, head, slot]}
    return sorted(found)


def _named(
    model: Any, tokenizer: Any, before: MemoryState, after: MemoryState, turn: Turn, edit: str, words: int, site: str
) -> float | None:
    """Share of the value's tokens among the words that a difference names; None if the value is not in the turn."""
    difference = diff(model, tokenizer, before, after, top=words, site=site)
    found = difference.gained if edit == "remember" else difference.lost
    tokens = [tokenizer.decode([token]) for token in BatchReader(model, tokenizer).renderer.turn(turn.user, None).ids]
    wanted = {tokens[i] for i in places_of(tokens, turn.value)}
    return len(wanted & {word for word, _ in found}) / len(wanted) if wanted else None


def _rate(
    right: dict[tuple[str, int, str], bool],
    name: str,
    sessions: Sequence[_Told],
    turns: Callable[[int], list[Turn]],
) -> float | None:
    flags = [right[name, number, turn.fact] for number in range(len(sessions)) for turn in turns(number)]
    return sum(flags) / len(flags) if flags else None


def _read(reader: BatchReader, conversations: Sequence[list[Pair]], batch_size: int) -> MemoryState:
    parts = [conversations[start : start + batch_size] for start in range(0, len(conversations), batch_size)]
    return MemoryState.cat([reader.read_all(reader.start(len(part)), part) for part in parts])


def _pairs(turns: Sequence[Turn]) -> list[Pair]:
    return [(turn.user, turn.assistant) for turn in turns]


def plot_editing(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Bars before and after every edit: what it was about, and the others."""
    figure, axes = panels(2, width=5.6, height=4.0)
    edits = labels_of(runs, "edit")
    groups = (
        (axes[0], "before", "after", "what the edit is about"),
        (axes[1], "others_before", "others_after", "the others"),
    )
    for place, before, after, name in groups:
        for at, (key, colour) in enumerate(((before, PALETTE[6]), (after, PALETTE[0]))):
            means, least, most = [], [], []
            for edit in edits:
                found = [
                    100 * row[key]
                    for run in runs
                    for row in run["rows"]
                    if row["edit"] == edit and row[key] is not None
                ]
                mean = sum(found) / len(found) if found else 0.0
                means.append(mean)
                least.append(mean - min(found, default=mean))
                most.append(max(found, default=mean) - mean)
            places = [row + (at - 0.5) * 0.36 for row in range(len(edits))]
            place.barh(places, means, 0.34, color=colour, label=("before", "after")[at])
            if len(runs) > 1:
                place.errorbar(means, places, xerr=[least, most], fmt="none", ecolor="black", elinewidth=1, capsize=2)
        place.set_yticks(range(len(edits)), edits if place is axes[0] else [""] * len(edits), fontsize=8)
        place.invert_yaxis()
        place.set(xlim=(0, 102), xlabel=f"{name}: replies that contain the value (%)")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    save(figure, path)


EDITING = Evaluation(
    name="editing",
    about="Recall before and after an edit, of what it is about and of the other facts.",
    config=EditingConfig,
    run=evaluate_editing,
    labels={"edit": "edit"},
    figures={
        "before": Figure("before", "share"),
        "after": Figure("after", "share"),
        "others_before": Figure("others before", "share"),
        "others_after": Figure("others after", "share"),
        "named": Figure("named by diff", "share"),
    },
    plot=plot_editing,
)

"""The turns that sessions are drawn from: to train on, and held out for validation and calibration."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from ..data.books import read_books
from ..data.facts import FactGenerator, FactPool, FactTurns
from ..data.general_talk import general_questions
from ..data.sessions import Session, Turn, numbered_sessions
from .frozen import FrozenModel
from .request import TrainRequest

_PLAIN = 0.25  # share of questions in the plainest words: what people ask most often
_ALIKE = 0.3  # share of sessions whose values are all of one kind
_BEGUN_ALIKE = 0.2  # share of sessions in which two values begin with the same letters
_SILENT = 0.7  # share of told turns without a reply: replies to them are all alike, facts are not
_NAMED = 3  # values that an error names
_VALIDATION_GENERAL = 30  # general questions beside the 60 unrelated turns
_GENERAL_TOKENS = 24  # of a reply to a general question: memory is tempted to speak where replies begin
_VALIDATION = {
    "values": {"values": "test"},
    "phrasings": {"values": "test", "phrasings": "test"},
    "attributes": {"values": "test", "attributes": "test"},
    "corrections": {"values": "test", "corrected": 1.0},
}


class FilePool:
    """Sessions of a JSONL file, drawn whole.

    Raises:
        ValueError: a line is no session, nothing is to be learned, nothing is told and asked for, or what is said to be does not
            stand in its turn.
    """

    def __init__(self, path: str | Path) -> None:
        numbered = list(numbered_sessions(path))
        self.sessions = [session for _, session in numbered]
        if not any(turn.learn == "answer" for s in self.sessions for turn in s.turns):
            raise ValueError(f'{path} marks nothing to learn: give the replies to learn "learn": "answer"')
        if not any(map(_asks_for_what_it_tells, self.sessions)):
            raise ValueError(
                f'{path} does not say what is told and asked for: give "value" and "fact" to the messages of users that tell '
                "something and to those that ask for it"
            )
        lost = [f"line {number}: {words}" for number, session in numbered for words in _not_in_their_turns(session)]
        if lost:
            more = f"; and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
            raise ValueError(
                f"{path} marks values where they are not, {'; '.join(lost[:_NAMED])}{more}: write them as the message that tells "
                "them does, and as the reply that is learned does"
            )

    def __len__(self) -> int:
        return len(self.sessions)

    def turns(self) -> Iterator[Turn]:
        return iter(dict.fromkeys(turn for session in self.sessions for turn in session.turns))

    def session(
        self, rng: random.Random, num_facts: int, between: int, shuffle: bool = True, num_untold: int = 0
    ) -> Session:
        return rng.choice(self.sessions)


def _asks_for_what_it_tells(session: Session) -> bool:
    learned = [turn for turn in session.turns if turn.learn == "answer"]
    told = {mark.fact for turn in session.turns if turn not in learned for mark in turn.marks}
    told |= {mark.fact for turn in learned for mark in turn.notes}
    return any(mark.fact in told for turn in learned for mark in turn.marks)


def _not_in_their_turns(session: Session) -> Iterator[str]:
    """Which values, or texts at which they are to be written, are not where training looks for them."""
    for turn in session.turns:
        whole = f"{turn.user or ''}\n{turn.assistant or ''}"
        for marks, text in ((turn.marks, turn.assistant if turn.learn == "answer" else whole), (turn.notes, whole)):
            for mark in marks:
                wanted = mark.written or mark.value
                if wanted not in text:
                    yield f'"{wanted}" is not in "{shorten(text, 60, placeholder="...")}"'


def session_pools(request: TrainRequest, frozen: FrozenModel) -> tuple[Any, dict[str, Any]]:
    """What to draw sessions from in training, and by name in validations and calibration."""
    seed = request.training.seed
    if request.data != "facts":
        pool = FilePool(request.data)
        return pool, {"sessions": pool}
    facts = FactGenerator(seed, corrected=request.corrected, silent=_SILENT, plain=_PLAIN)
    pool = FactPool(facts, request.pool_facts, request.pool_talk, 1, 1, request.pool_untold, _ALIKE, _BEGUN_ALIKE)
    rng = random.Random(f"run {seed}")
    if request.replied:
        _with_own_replies(pool, rng, request.replied, frozen)
    if request.pool_general:
        pool.talk += _general_talk(frozen, seed, request.pool_general, "train")
    if request.books:
        pool.talk += [Turn(None, page, learn="base") for page in book_pages(request.books, request.pages, rng)]
    pools = {name: FactPool(FactGenerator(seed + 1, **kind), 150, 60, 1, 1, 60) for name, kind in _VALIDATION.items()}
    if request.pool_general:
        held_out = _general_talk(frozen, seed, _VALIDATION_GENERAL, "test")
        for kept in pools.values():
            kept.talk += held_out
    return pool, pools


def _general_talk(frozen: FrozenModel, seed: int, count: int, split: str) -> list[Turn]:
    """General questions of one side of the split, with what the model itself replies."""
    users = general_questions(random.Random(f"general {seed} {split}"), count, split)
    replies = frozen.replies("general questions", users, max_new_tokens=_GENERAL_TOKENS)
    return [Turn(user, reply, learn="base") for user, reply in zip(users, replies, strict=True)]


def _with_own_replies(pool, rng, count: int, frozen: FrozenModel) -> None:
    """Give a share of the tells, corrections and unrelated turns the reply that the model itself would give."""
    tells = [turn for fact in pool.facts for turn in (*fact.tells, *fact.corrections)]
    chosen = rng.sample(tells, min(len(tells), count * 2 // 3))
    talk = rng.sample(range(len(pool.talk)), min(len(pool.talk), count // 3))
    users = [turn.user for turn in chosen] + [pool.talk[i].user for i in talk]
    replies = frozen.replies("told and talk", users)
    replied = {
        turn: replace(turn, assistant=reply, learn="base")
        for turn, reply in zip(chosen, replies[: len(chosen)], strict=True)
    }
    pool.facts = [
        FactTurns(
            turns.fact,
            tuple(replied.get(t, t) for t in turns.tells),
            tuple(replied.get(t, t) for t in turns.corrections),
            turns.asks,
            turns.early_asks,
        )
        for turns in pool.facts
    ]
    for i, reply in zip(talk, replies[len(chosen) :], strict=True):
        pool.talk[i] = replace(pool.talk[i], assistant=reply)


def book_pages(folder: str | Path, count: int, rng: random.Random) -> list[str]:
    """`count` passages of 200 to 1,500 characters from the .txt files of a folder."""
    books = read_books(folder)
    pages = []
    while len(pages) < count:
        book = rng.choice(books)
        start = rng.randrange(max(1, len(book) - 2000))
        page = " ".join(book[start : start + int(200 * 7.5 ** rng.random())].split())
        if len(page) > 100:
            pages.append(page)
    return pages

"""Turns and sessions, and their JSONL form: chat messages, each tagged with the turn it belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LEARN = (None, "answer", "base")
KINDS = ("tell", "correct", "ask", "talk")
_EVERY = ("role", "content", "turn", "learn")  # keys of any message
_FIRST = ("kind", "value", "fact", "more", "notes")  # of the first one of a turn


class Mark(NamedTuple):
    """A value that a turn tells or asks for."""

    fact: str  # ties what is told to what is asked
    value: str
    written: str | None = None  # text of the turn at whose last tokens the value is to be written, if not at its own


@dataclass(frozen=True)
class Turn:
    """One attention window: nothing of it is visible to a later turn except through the memory."""

    user: str | None  # None: `assistant` is plain text outside any chat, such as a page of a book
    assistant: str | None = None
    learn: str | None = None  # "answer": loss on the reply; "base": stay close to the base model
    kind: str = "talk"
    value: str | None = None
    fact: str | None = None  # ties a tell or a correction to its ask
    more: tuple[Mark, ...] = ()  # what it tells or asks for besides `value`
    notes: tuple[Mark, ...] = ()  # what a reply that is learned tells, for later turns to ask for

    @property
    def marks(self) -> tuple[Mark, ...]:
        """All that this turn tells or asks for."""
        return (*((Mark(self.fact, self.value),) if self.fact and self.value else ()), *self.more)

    def __post_init__(self):
        if self.learn not in LEARN:
            raise ValueError(f"learn is {self.learn!r}; use one of {LEARN}")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; use one of {KINDS}")
        if self.learn == "answer" and self.assistant is None:
            raise ValueError('a turn with learn="answer" needs an assistant reply to learn from')
        if self.user is None and self.assistant is None:
            raise ValueError("a turn needs a user message, or plain text")


@dataclass(frozen=True)
class Session:
    """Turns in the order in which one memory reads them."""

    turns: tuple[Turn, ...]
    meta: dict = field(default_factory=dict)

    def to_json(self) -> dict:
        """A JSON-ready dict of chat messages; marks that are None are left out."""
        return {
            "messages": [message for i, turn in enumerate(self.turns) for message in _messages(i, turn)],
            "meta": self.meta,
        }

    @classmethod
    def from_json(cls, data: dict) -> Session:
        """The session of `to_json`. Keys whose value is None count as missing.

        Raises:
            ValueError: it has another form, or keys that mean nothing where they stand.
        """
        if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
            raise ValueError('a session needs a list under "messages"')
        by_turn: dict[int, dict[str, dict]] = {}
        for message in data["messages"]:
            _add_message(by_turn, message)
        return cls(tuple(_turn(i, by_turn[i]) for i in by_turn), data.get("meta") or {})


def write_jsonl(path: str | Path, sessions: Iterable[Session]) -> None:
    """One session a line."""
    with open(path, "w", encoding="utf-8") as file:
        for session in sessions:
            file.write(json.dumps(session.to_json(), ensure_ascii=False) + "\n")


def read_jsonl(path: str | Path) -> Iterator[Session]:
    """Sessions of a file, blank lines skipped; a line that is not one raises ValueError with its number."""
    return (session for _, session in numbered_sessions(path))


def numbered_sessions(path: str | Path) -> Iterator[tuple[int, Session]]:
    """The same, each after the number of its line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, Session.from_json(json.loads(text))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not UTF-8 (byte {error.start + 1} of the line): save the file as UTF-8"
                ) from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error.msg}): a session stands on one line"
                ) from error
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _messages(index: int, turn: Turn) -> list[dict]:
    marks = {"kind": turn.kind, "value": turn.value, "fact": turn.fact}
    if turn.user is None:
        messages = [{"role": "text", "content": turn.assistant, "turn": index} | marks]
    else:
        messages = [{"role": "user", "content": turn.user, "turn": index} | marks]
    if turn.user is not None and turn.assistant is not None:
        messages.append({"role": "assistant", "content": turn.assistant, "turn": index})
    messages[-1]["learn"] = turn.learn
    for name in ("more", "notes"):
        if marks := getattr(turn, name):
            messages[0][name] = [list(mark) for mark in marks]
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _add_message(by_turn: dict[int, dict[str, dict]], message: dict) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise ValueError('every message needs a text under "content"')
    index, role = message.get("turn"), message.get("role")
    if not isinstance(index, int):
        raise ValueError('every message needs its turn number under "turn"')
    if by_turn and index < max(by_turn):
        raise ValueError(f"turn {index} comes after turn {max(by_turn)}; messages must be in order of turns")
    turn = by_turn.setdefault(index, {})
    given = {name for name, value in message.items() if value is not None}
    if unknown := sorted(given - {*_EVERY, *_FIRST}):
        raise ValueError(f"turn {index} has a message with {_named(unknown)}; use {_named((*_EVERY, *_FIRST))} alone")
    if role == "assistant" and (misplaced := sorted(given & {*_FIRST})):
        raise ValueError(f"turn {index} has {_named(misplaced)} on its reply: give that to the user's message")
    if role == "text" and not turn:
        turn[role] = message
        return
    expected = "assistant" if "user" in turn else "user"
    if role != expected or role in turn or "text" in turn:
        raise ValueError(
            f"turn {index} has a {role!r} message; a turn is one user message, then at most one reply, or one text and nothing else"
        )
    turn[role] = message


def _turn(index: int, messages: dict[str, dict]) -> Turn:
    text = messages.get("text")
    user = text or messages["user"]
    reply = text or messages.get("assistant")
    if reply and reply is not user and user.get("learn") is not None:
        raise ValueError(
            f'turn {index} has "learn" on the user\'s message: give it to the reply, the last one of the turn'
        )
    for name in ("value", "fact"):
        if user.get(name) is not None and not _is_text(user[name]):
            raise ValueError(f'turn {index}: "{name}" is {user[name]!r}: give a text, which is not empty')
    try:
        return Turn(
            user=None if text else user["content"],
            assistant=reply["content"] if reply else None,
            learn=(reply or user).get("learn"),
            kind=user.get("kind") or "talk",
            value=user.get("value"),
            fact=user.get("fact"),
            more=_marks("more", user.get("more")),
            notes=_marks("notes", user.get("notes")),
        )
    except ValueError as error:
        raise ValueError(f"turn {index}: {error}") from error


def _marks(name: str, found: object) -> tuple[Mark, ...]:
    if found is None:
        return ()
    if not isinstance(found, list) or not all(map(_is_mark, found)):
        raise ValueError(f'"{name}" is {found!r}: give a list of [fact, value] or [fact, value, text]')
    return tuple(Mark(*mark) for mark in found)


def _is_mark(mark: object) -> bool:
    whole = isinstance(mark, list) and len(mark) in (2, 3) and all(map(_is_text, mark[:2]))
    return whole and all(text is None or _is_text(text) for text in mark[2:])


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _named(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)

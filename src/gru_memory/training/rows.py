"""Sessions as training rows: the cached turns of a session, one after the other, in one sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.sessions import Mark, Session, Turn
from ..memory import GRUMemoryWithDecay
from .features import PREFIX, FeatureCache, Text

_RUN = 6  # tokens
_BEGINNING = 3  # positions in which a reply of the model itself begins, where a memory is most tempted to speak


@dataclass
class Batch:
    """R sessions of at most T tokens, padded on the right.

    What is told of a value is its tokens and the one after it: that one says where the value ends.
    """

    features: Tensor  # (R, T, width) float32
    tokens: Tensor  # (R, T) int64
    mask: Tensor  # (R, T) bool, False at padding
    turn_starts: Tensor  # (R, T) bool
    labels: Tensor  # (R, T) the next token where it is to be learned, else -100
    base: Tensor  # (R, T) bool, positions at which to stay close to the base model
    stands_for: Tensor  # (R, T) float32, positions that this one stands for, more than 1 where others were left out
    unknown: Tensor  # (R, T) bool, positions of answers that say that nothing was told
    begins: Tensor  # (R, T) bool, those of them at which a reply begins
    told: Tensor  # (R, T) int64, which token of which value this is where it is told, 0 for none
    asked: Tensor  # (R, T) int64, the same number where that token is the one to come in an answer
    fact: Tensor  # (R, T) int64, the fact that `told` is about, 0 for none
    value: Tensor  # (R, T) int64, its value: a corrected fact has two
    asked_fact: Tensor  # (R, T) int64, the fact that `asked` is about, which a reply may tell at the same position
    asked_value: Tensor  # (R, T) int64, its value

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(getattr(self, column.name).to(device) for column in fields(self)))

    def inputs(self, memory: GRUMemoryWithDecay, head: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What a memory is given of these tokens: hidden states, output embeddings and key states, if it has any."""
        own, extra = self.features[..., : memory.hidden_size], self.features[..., memory.hidden_size :]
        return own, F.embedding(self.tokens, head), extra if memory.key_size else None


def turn_text(turn: Turn) -> Text:
    """The cache's name for a turn."""
    return (None, turn.assistant) if turn.user is None else (turn.user, turn.assistant)


def make_batch(sessions: Sequence[Session], cache: FeatureCache, keep: float = 1.0, rng: Random | None = None) -> Batch:
    """Look up every turn of every session; see `Batch`.

    With `keep` below 1 only so much of what is neither told nor answered stays in, in runs of `_RUN` tokens drawn by
    `rng`: most of a session is text that memory has to leave alone, and a part of it teaches that as well.
    """
    rows = [_row(session, cache) for session in sessions]
    if keep < 1:
        rows = [_thin(row, keep, rng or Random(0)) for row in rows]
    return pad_rows(rows)


def pad_rows(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """The columns of `Batch`, one dict a row, padded on the right."""
    longest = max(len(row["tokens"]) for row in rows)
    columns = {}
    for name in rows[0]:
        fill = -100 if name == "labels" else 0
        parts = [row[name] for row in rows]
        column = np.full((len(rows), longest, *parts[0].shape[1:]), fill, dtype=parts[0].dtype)
        for r, part in enumerate(parts):
            column[r, : len(part)] = part
        columns[name] = torch.from_numpy(column)
    columns["features"] = columns["features"].float()
    return Batch(**columns)


def _row(session: Session, cache: FeatureCache) -> dict[str, np.ndarray]:
    """The columns of a batch for one session, T tokens long."""
    prefix = cache.find(PREFIX)
    turns = [(prefix, None), *((cache.find(turn_text(turn)), turn) for turn in session.turns)]
    turns = [(i, turn) for i, turn in turns if len(cache.tokens(i))]
    length = sum(len(cache.tokens(i)) for i, _ in turns)
    row = {name: np.zeros(length, dtype=bool) for name in ("turn_starts", "base", "unknown", "begins")}
    columns = ("told", "asked", "fact", "value", "asked_fact", "asked_value")
    row |= {name: np.zeros(length, dtype=np.int64) for name in columns}
    row |= {"mask": np.ones(length, dtype=bool), "labels": np.full(length, -100, dtype=np.int64)}
    row["stands_for"] = np.ones(length, dtype=np.float32)
    row["tokens"] = np.concatenate([cache.tokens(i) for i, _ in turns]).astype(np.int64)
    row["features"] = np.concatenate([cache.features(i) for i, _ in turns])
    start = 0
    numbers: dict[tuple, int] = {}  # of facts, of their values, of the tokens of those
    for i, turn in turns:
        stop = start + len(cache.tokens(i))
        row["turn_starts"][start] = start == 0 or turns[0][1] is not None or start != len(cache.tokens(prefix))
        learn = turn.learn if turn else None
        if learn == "answer":
            first = start + cache.reply_start(i)
            row["labels"][first - 1 : stop - 1] = row["tokens"][first:stop]
            row["unknown"][first - 1 : stop - 1] = not (turn.marks or turn.notes)
        elif learn == "base":
            row["base"][start : stop - 1] = True
            first = start + cache.reply_start(i) - 1
            row["begins"][first : min(first + _BEGINNING, stop - 1)] = True
        for mark, asks, said in _marks(turn, cache.reply_start(i)):
            first, last = cache.value_span(i, mark.written or mark.value, **said)
            last = min(last + 1, stop - start) if last else 0
            span = slice(start + first - asks, start + last - asks)  # of asking: the position that predicts the token
            blank = last > first and cache.is_blank(i, first)  # told at the beginning of a message there is none
            counted = range(-blank, last - first - blank)
            names = [(mark.fact,), (mark.fact, mark.value), *((mark.fact, mark.value, k) for k in counted)]
            fact, value, *tokens = (numbers.setdefault(name, len(numbers) + 1) for name in names)
            told = ("asked_fact", "asked_value", "asked") if asks else ("fact", "value", "told")
            for name, numbered in zip(told, (fact, value, tokens), strict=True):
                row[name][span] = numbered
        start = stop
    return row


def _marks(turn: Turn | None, reply: int) -> Iterator[tuple[Mark, bool, dict[str, int]]]:
    """What a turn asks for (True) and tells (False), and which of its tokens to look at (see `FeatureCache.value_span`).

    What is asked for is where the reply, which begins at token `reply`, says it first. What is told is where the user says it
    last, for a reply may say it again; a note is where the reply says it last.
    """
    if turn is not None:
        asks = turn.learn == "answer"
        yield from ((mark, asks, {"after" if asks else "before": reply}) for mark in turn.marks)
        yield from ((mark, False, {}) for mark in turn.notes)


def _thin(row: dict[str, np.ndarray], keep: float, rng: Random) -> dict[str, np.ndarray]:
    """What is told, with the positions before and after it; answers; where replies begin; all turns' first positions; and runs of
    the rest."""
    needed = (row["told"] > 0) | (row["labels"] >= 0) | (row["asked"] > 0) | row["turn_starts"] | row["begins"]
    needed[:-1] |= row["told"][1:] > 0
    needed[1:] |= row["told"][:-1] > 0
    starts = np.flatnonzero(row["turn_starts"])
    needed[: starts[1] if len(starts) > 1 else 0] = True
    length, spare = len(needed), ~needed
    runs = round(keep * spare.sum() / _RUN)
    while runs > 0 or spare.any() and not needed[spare].any():  # something has to stand for the rest
        begin = rng.randrange(length)
        needed[begin : begin + _RUN] = True
        runs -= 1
    kept = spare & needed
    row["stands_for"][kept] = spare.sum() / max(1, kept.sum())  # runs overlap, and fall on what stays in anyway
    return {name: column[needed] for name, column in row.items()}

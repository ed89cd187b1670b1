"""Sessions as training rows: the cached turns of a session, one after the other, in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.sessions import Session, Turn
from .features import PREFIX, FeatureCache, Text


@dataclass
class Batch:
    """R sessions of at most T tokens, padded on the right."""

    features: Tensor  # (R, T, width) float32
    tokens: Tensor  # (R, T) int64
    mask: Tensor  # (R, T) bool, False at padding
    turn_starts: Tensor  # (R, T) bool
    labels: Tensor  # (R, T) the next token where it is to be learned, else -100
    base: Tensor  # (R, T) bool, positions at which to stay close to the base model
    told: Tensor  # (R, T) int64, which part of which value a token told is, 0 for none
    asked: Tensor  # (R, T) int64, the same number where that token is the one to come in an answer
    fact: Tensor  # (R, T) int64, the fact that `told` or `asked` is about, 0 for none
    value: Tensor  # (R, T) int64, its value: a corrected fact has two

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())


def turn_text(turn: Turn) -> Text:
    """The cache's name for a turn."""
    return (None, turn.assistant) if turn.user is None else (turn.user, turn.assistant)


def make_batch(sessions: Sequence[Session], cache: FeatureCache) -> Batch:
    """Look up every turn of every session; see `Batch`."""
    prefix = cache.find(PREFIX)
    rows = [[(prefix, None), *((cache.find(turn_text(turn)), turn) for turn in s.turns)] for s in sessions]
    lengths = [sum(len(cache.tokens(i)) for i, _ in row) for row in rows]
    shape = (len(rows), max(lengths))
    features = np.zeros((*shape, cache.width), dtype=np.float32)
    tokens = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, -100, dtype=np.int64)
    mask, turn_starts, base = (np.zeros(shape, dtype=bool) for _ in range(3))
    told, asked, fact, value = (np.zeros(shape, dtype=np.int64) for _ in range(4))
    for r, row in enumerate(rows):
        start = 0
        numbers: dict[tuple, int] = {}  # of facts, of their values, of the tokens of those
        for i, turn in row:
            learn = turn.learn if turn else None
            ids = cache.tokens(i)
            stop = start + len(ids)
            if stop == start:
                continue
            tokens[r, start:stop] = ids
            features[r, start:stop] = cache.features(i)
            turn_starts[r, start] = True
            if learn == "answer":
                first = start + cache.reply_start(i)
                labels[r, first - 1 : stop - 1] = tokens[r, first:stop]
            elif learn == "base":
                base[r, start : stop - 1] = True
            if turn and turn.fact and turn.value:
                first, last = cache.value_span(i, turn.value)
                before = learn == "answer"  # the position that predicts the token, not the token's own
                span = slice(start + first - before, start + last - before)
                names = [
                    (turn.fact,),
                    (turn.fact, turn.value),
                    *((turn.fact, turn.value, k) for k in range(last - first)),
                ]
                fact[r, span], value[r, span], *tokens_of = (numbers.setdefault(n, len(numbers) + 1) for n in names)
                (asked if before else told)[r, span] = tokens_of
            start = stop
        mask[r, :start] = True
        turn_starts[r, 0] = True
        # The system prompt and the first user message are one turn.
        turn_starts[r, len(cache.tokens(prefix))] = len(cache.tokens(prefix)) == 0
    return Batch(
        *(torch.from_numpy(a) for a in (features, tokens, mask, turn_starts, labels, base, told, asked, fact, value))
    )

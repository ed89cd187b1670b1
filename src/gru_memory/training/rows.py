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

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())


def turn_text(turn: Turn) -> Text:
    """The cache's name for a turn."""
    return (None, turn.assistant) if turn.user is None else (turn.user, turn.assistant)


def make_batch(sessions: Sequence[Session], cache: FeatureCache) -> Batch:
    """Look up every turn of every session; see `Batch`."""
    prefix = cache.find(PREFIX)
    rows = [[(prefix, None), *((cache.find(turn_text(turn)), turn.learn) for turn in s.turns)] for s in sessions]
    lengths = [sum(len(cache.tokens(i)) for i, _ in row) for row in rows]
    shape = (len(rows), max(lengths))
    features = np.zeros((*shape, cache.width), dtype=np.float32)
    tokens = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, -100, dtype=np.int64)
    mask, turn_starts, base = (np.zeros(shape, dtype=bool) for _ in range(3))
    for r, row in enumerate(rows):
        start = 0
        for i, learn in row:
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
            start = stop
        mask[r, :start] = True
        turn_starts[r, 0] = True
        # The system prompt and the first user message are one turn.
        turn_starts[r, len(cache.tokens(prefix))] = len(cache.tokens(prefix)) == 0
    return Batch(*(torch.from_numpy(a) for a in (features, tokens, mask, turn_starts, labels, base)))

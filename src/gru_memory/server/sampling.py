"""Choosing a token from logits, one conversation at a time, with the parameters that OpenAI's interface has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_COLD = 1e-5  # a lower temperature takes the likeliest token, as 0 does; logits divided by it could become infinite


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability are drawn from.
        frequency_penalty: taken off a token's logit for every time it was generated already.
        presence_penalty: taken off once, if it was.
        seed: makes a draw repeatable.
        stop: texts that end a reply and are not part of it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def generator(self) -> torch.Generator:
        """The source of chance of one reply."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed % (1 << 63))
        return generator

    def choose(self, logits: Tensor, generated: Sequence[int], generator: torch.Generator) -> int:
        """The next token, from logits (V,) and the tokens generated so far."""
        if (self.frequency_penalty or self.presence_penalty) and generated:
            logits = logits.clone()
            tokens, counts = torch.tensor(generated, device=logits.device).unique(return_counts=True)
            logits[tokens] -= (self.frequency_penalty * counts + self.presence_penalty).to(logits)
        if self.temperature < _COLD:
            return int(logits.argmax())
        scaled = logits.double().cpu() / self.temperature
        chances = (scaled - scaled.max()).softmax(dim=-1)
        if self.top_p < 1:
            ordered, places = chances.sort(descending=True)
            ordered[ordered.cumsum(dim=-1) - ordered >= self.top_p] = 0  # the likeliest always stays
            chances = torch.zeros_like(chances).scatter_(0, places, ordered)
        return int(torch.multinomial(chances, 1, generator=generator))

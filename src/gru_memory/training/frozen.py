"""The frozen model of a training run: what is read from it once, and where that is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import backbones
from ..data.sessions import Turn
from ..rendering import TurnRenderer
from .features import PREFIX, FeatureCache, build_feature_cache
from .replies import own_replies
from .rows import turn_text

Progress = Callable[[str, int, int], None]  # (what is being done, done, in all)


@dataclass
class FrozenModel:
    """The frozen model, and where its hidden states are kept."""

    model: Any
    renderer: TurnRenderer
    folder: Path
    key_layers: tuple[int, ...]
    fingerprint: str
    progress: Progress | None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self.model.disable_memory(), without_denormals():
            yield

    def features(self, name: str, turns: Iterator[Turn]) -> FeatureCache:
        model = self.model
        texts = [PREFIX, *dict.fromkeys(turn_text(turn) for turn in turns)]
        return build_feature_cache(
            self.folder, model, backbones.before_head_of(model), backbones.blocks_of(model), self.renderer, texts,
            self.key_layers, self.fingerprint, self._tell(f"hidden states: {name}"),
        )  # fmt: skip

    def replies(self, name: str, users: Sequence[str], **settings: Any) -> list[str]:
        """The model's own; see `own_replies`."""
        settings |= {"fingerprint": self.fingerprint, "progress": self._tell(f"the model's own replies: {name}")}
        return own_replies(self.folder, self.model, self.renderer, users, **settings)

    def _tell(self, what: str) -> Callable[[int, int], None] | None:
        return None if self.progress is None else partial(self.progress, what)


def weights_sum(model: torch.nn.Module) -> str:
    """Names a set of weights by a few numbers of each tensor: cheap, and enough to tell caches apart."""
    memory = {id(p) for p in model.memory_parameters()} if hasattr(model, "memory_parameters") else set()
    own = (p for p in model.parameters() if id(p) not in memory)
    return str(round(sum(float(p.detach().double().abs().sum()) for p in own), 3))


@contextlib.contextmanager
def without_denormals() -> Iterator[None]:
    """Sharp addresses and long decays make numbers so small that a processor computes them a hundred times slower."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)

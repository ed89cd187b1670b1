"""The memory's state inside a transformers cache, so that whatever happens to the cache happens to the memory too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticCache,
)

from .state import MemoryState


@dataclass(frozen=True)
class Stretch:
    """One forward pass that can be taken back: tokens fed, the state before them, and the state after the first n."""

    length: int
    before: MemoryState
    until: Callable[[int], MemoryState]


class MemoryCacheLayer(CacheLayerMixin):
    """A cache layer behind the attention layers that carries a `MemoryState` instead of keys and values.

    Beam search, `num_return_sequences` and batch selection act on caches layer by layer, and so reach the memory.
    A recurrent state does not hold the states before it. After `activate_past_recording` the layer keeps what it takes
    to compute them, so `crop(-n)` can take tokens back, as many as were fed since the last `crop`.

    With `static`, for caches of fixed size, the state stays in the same tensors and is overwritten in place: code that
    `torch.compile` made for one step then fits the next. No tokens can be taken back there.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, static: bool = False) -> None:
        super().__init__()
        self.is_compileable = static
        self.state: MemoryState | None = None
        self.record_past = False
        self._past: list[Stretch] = []

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a cache cannot take tokens back: what computes earlier states leads to the whole model.
        return {**self.__dict__, "_past": []}

    def lazy_initialization(self, key_states, value_states) -> None:
        raise RuntimeError("a memory layer holds no keys and values")

    def update(self, key_states, value_states, *args, **kwargs):
        raise RuntimeError(
            "an attention layer wrote into the memory's place in the cache: pass a cache made for this model "
            "(DynamicCache(config=model.config)), not one made for another"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def offload(self) -> None:
        """Nothing to do: a state is kilobytes."""

    def prefetch(self) -> None:
        """Nothing to do: a state is kilobytes."""

    def reset(self) -> None:
        self.set(None)

    @property
    def records(self) -> bool:
        """Whether the next forward pass has to say how it can be taken back."""
        return self.record_past and not self.is_compileable

    def set(self, state: MemoryState | None) -> None:
        """Another state, with no way back from it."""
        self._past = []
        if not self.is_compileable or state is None:
            self.state = state
        elif not _overwrite(self.state, state):
            self.state = _own_tensors(state)

    def advance(self, state: MemoryState, stretch: Stretch | None = None) -> MemoryState:
        """Go on to the state after a forward pass, which `stretch` can take back. Returns it, apart from the cache."""
        if not self.is_compileable or any(t.requires_grad for t in state._tensors()):  # no gradient flows in place
            self.state = state
        else:
            shared = [] if self.state is None else self.state._tensors()
            state = state._map(lambda t: t.clone() if any(t is other for other in shared) else t)
            self.set(state)
        if stretch is not None:
            self._past.append(stretch)
        return state

    def pass_by(self, length: int) -> None:
        """Tokens were fed that the memory did not take in: `crop` counts them, and they left the state as it was."""
        if self.records and self.state is not None:
            state = self.state
            self._past.append(Stretch(length, state, lambda _: state))

    def activate_past_recording(self) -> None:
        """From the next forward pass on, keep what it takes to go back."""
        self.record_past = True

    def stop_recording(self) -> None:
        self.record_past = False
        self._past = []

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back: -n goes to the state n tokens ago.

        Raises:
            ValueError: a positive number.
            RuntimeError: more tokens than were recorded since the last crop.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, that of the tokens to take back")
        missing, state = -tokens_to_remove, self.state
        recorded = sum(stretch.length for stretch in self._past)
        if missing > recorded and state is not None:
            raise RuntimeError(
                f"the memory is to take {missing} token(s) back and has recorded {recorded} since the last crop: call "
                "cache.activate_past_recording() before the forward pass that feeds them"
            )
        for stretch in reversed(self._past):
            if not missing:
                break
            kept = max(0, stretch.length - missing)
            state = stretch.until(kept) if kept else stretch.before
            missing -= stretch.length - kept
        self.set(state)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.state is not None:
            self.set(self.state.select(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.set(self.state.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.state is not None:
            self.set(self.state.select(indices))


def _own_tensors(state: MemoryState) -> MemoryState:
    """A copy laid out like any other: compiled code also looks at strides, and at which tensors are one and the same."""
    rates = {site: rate.clone() for site, rate in state.decay_rates.items()}
    state = state._map(lambda t: t.detach().clone(memory_format=torch.contiguous_format))
    return replace(state, decay_rates=rates)


def _overwrite(kept: MemoryState | None, state: MemoryState) -> bool:
    """Write `state` into the tensors of `kept`, if they can hold it."""
    if kept is None or kept.fingerprint != state.fingerprint:
        return False
    olds, news = kept._named(), state._named()
    if [_kind(*old) for old in olds] != [_kind(*new) for new in news] or any(old.requires_grad for _, old in olds):
        return False
    for (_, old), (_, new) in zip(olds, news):
        old.copy_(new)
    return True


def _kind(name: str, tensor: torch.Tensor) -> tuple:
    return name, tuple(tensor.shape), tensor.dtype, tensor.device


def keeps_every_token(model: Any) -> bool:
    """Whether all layers of a cache for this model keep every key and value: rows of different lengths can share it then."""
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def find_layer(cache: Cache | None) -> MemoryCacheLayer | None:
    """The memory layer of a cache, or None."""
    layers = getattr(_self_attention(cache), "layers", ())
    return next((layer for layer in reversed(layers) if isinstance(layer, MemoryCacheLayer)), None)


def attach(cache: Cache, num_layers: int) -> MemoryCacheLayer:
    """The cache's memory layer, added behind the `num_layers` attention layers if there is none yet.

    A bare `DynamicCache()` makes its layers one by one as they are asked for; it is filled up first, or the memory
    would take the place of an attention layer.
    """
    layer = find_layer(cache)
    if layer is None:
        cache = _self_attention(cache)
        while len(cache.layers) < num_layers:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = MemoryCacheLayer(static=isinstance(cache, StaticCache))
        layer.record_past = any(getattr(other, "record_past", False) for other in cache.layers)
        cache.layers.append(layer)
    return layer


def _self_attention(cache: Cache | None) -> Cache | None:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache

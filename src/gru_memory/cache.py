"""The memory's state inside a transformers cache, so that whatever happens to the cache happens to the memory too."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from .state import MemoryState


class MemoryCacheLayer(CacheLayerMixin):
    """A cache layer behind the attention layers that carries a `MemoryState` instead of keys and values.

    Beam search, `num_return_sequences` and batch selection act on caches layer by layer, and so reach the memory.
    It cannot drop its last tokens: a recurrent state does not hold the states before it.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, state: MemoryState | None = None) -> None:
        super().__init__()
        self.state = state

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
        self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError(
                "the memory cannot forget its last tokens: decode without an assistant model or prompt lookup, "
                "or inside `with model.disable_memory():`"
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(indices)


def find_layer(cache: Cache | None) -> MemoryCacheLayer | None:
    """The memory layer of a cache, or None."""
    layers = getattr(_self_attention(cache), "layers", ())
    return next((layer for layer in layers if isinstance(layer, MemoryCacheLayer)), None)


def attach(cache: Cache, state: MemoryState | None, num_layers: int) -> MemoryCacheLayer:
    """The cache's memory layer, holding `state`; added behind the `num_layers` attention layers if there is none yet.

    A bare `DynamicCache()` makes its layers one by one as they are asked for; it is filled up first, or the memory
    would take the place of an attention layer.
    """
    layer = find_layer(cache)
    if layer is None:
        cache = _self_attention(cache)
        while len(cache.layers) < num_layers:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = MemoryCacheLayer()
        cache.layers.append(layer)
    layer.state = state
    return layer


def _self_attention(cache: Cache | None) -> Cache | None:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache

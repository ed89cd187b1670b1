"""The system prompt that attention sees in every turn: run once, and its keys and values kept.

Memory takes a prefix in with the first turn of a conversation. In every later one it is there for attention alone, and its keys and
values are the same each time where memory acts above all blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from .cache import MemoryCacheLayer, keeps_every_token
from .fingerprints import optimizer_steps
from .placement import fed_on
from .state import MemoryState

_MOST_TOKENS = 4096  # kept for a model, of the prefixes used last: 190 MB with SmolLM2 in float32


@dataclass(frozen=True)
class KeptPrefix:
    """Keys and values of P tokens for every layer, (1, H, P, d), and what the model was when they were computed."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    model: tuple

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2]


_kept: WeakKeyDictionary[nn.Module, OrderedDict[tuple[int, ...], KeptPrefix]] = WeakKeyDictionary()


def kept_prefix(model: Any, ids: Sequence[int]) -> KeptPrefix | None:
    """What attention needs of a prefix, computed at most once for a model as it is; None where it has to be fed each time.

    That is in training, with sites below the top (what they recall at a prefix depends on the conversation), where a cache
    does not keep every key and value, and for one that is too long to keep.
    """
    if not 0 < len(ids) <= _MOST_TOKENS or model.training or set(model.memory_sites()) != {"top"}:
        return None
    # GPT-Neo's windows would count the padding between a prefix and a turn.
    if "local" in getattr(model.config, "attention_layers", ()) or not keeps_every_token(model):
        return None
    looks = _looks_of(model)
    if looks is None:
        return None
    known, key = _kept.setdefault(model, OrderedDict()), tuple(ids)
    found = known.get(key)
    if found is None or found.model != looks:
        found = known[key] = KeptPrefix(_run(model, key), looks)
    known.move_to_end(key)
    while sum(map(len, known)) > _MOST_TOKENS:
        known.popitem(last=False)
    return found


def cache_of(model: Any, rows: Sequence[KeptPrefix | None]) -> tuple[DynamicCache, Tensor]:
    """A cache that begins with the prefix of each row, padded on the left to the longest, and its mask (B, P).

    None is a row without one.
    """
    length = max(0 if row is None else row.length for row in rows)
    longest = next(row for row in rows if row is not None and row.length == length)
    cache = DynamicCache(config=model.config.get_text_config())
    for number, (keys, values) in enumerate(longest.layers):
        both = tuple(t.expand(len(rows), -1, -1, -1) for t in (keys, values))
        if any(row is not longest for row in rows):
            nothing = torch.zeros_like(keys), torch.zeros_like(values)
            given = [nothing if row is None else row.layers[number] for row in rows]
            both = tuple(torch.cat([padded(t, length) for t in part]) for part in zip(*given))
        cache.update(*both, number)
    lengths = torch.tensor([0 if row is None else row.length for row in rows], device=fed_on(model))
    return cache, (torch.arange(length, device=fed_on(model)) >= length - lengths[:, None]).long()


def turn_begun(state: MemoryState) -> MemoryState:
    """The state after a prefix that attention alone has seen: a turn has begun, and the clock waits for its first token."""
    return replace(state, pending=torch.ones_like(state.pending))


def _run(model: Any, ids: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    # Outside inference mode: what is kept may be used by code that is not in it.
    with torch.inference_mode(False), torch.no_grad(), model.disable_memory():
        cache = DynamicCache(config=model.config.get_text_config())
        model(torch.tensor([ids], device=fed_on(model)), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return tuple((layer.keys, layer.values) for layer in cache.layers if not isinstance(layer, MemoryCacheLayer))


def _looks_of(model: nn.Module) -> tuple | None:
    """Changes whenever what the model computes may have: weights, where they lie, adapters, hooks, autocast. None: who knows."""
    try:
        weights = tuple((p.data_ptr(), p._version, p.dtype) for p in (*model.parameters(), *model.buffers()))
    except RuntimeError:  # weights that are not at hand, or keep no count of what was written into them
        return None
    modules = []
    for module in model.modules():
        about = vars(module)
        hooks = (*about["_forward_hooks"], *about["_forward_pre_hooks"])
        if "_disable_adapters" in about:  # a layer of peft's
            hooks += (about["_disable_adapters"], repr(about.get("_active_adapter")), repr(about.get("scaling")))
            hooks += (repr(about.get("merged_adapters")),)
        modules.append(hooks)
    device = fed_on(model).type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return optimizer_steps(), weights, tuple(modules), autocast


def padded(tensor: Tensor, length: int) -> Tensor:
    """Keys or values (B, H, L, d) with zeros before, up to this length, which the mask hides."""
    return F.pad(tensor, (0, 0, length - tensor.shape[2], 0))

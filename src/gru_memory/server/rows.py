"""Conversations that decode in one batch: rows that join and leave while the others go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..cache import MemoryCacheLayer, attach, find_layer
from ..prefix import KeptPrefix, cache_of, padded, turn_begun
from ..state import MemoryState


class RoomyLayer(DynamicLayer):
    """Keys and values with room for tokens to come, so that one more does not copy all those before it.

    What it returns are views of the room, (B, H, L, d) like those of any other layer.
    """

    _MORE = 64  # tokens, and half as many again as there are

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self._append("keys", key_states), self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: Tensor) -> Tensor:
        old, (room, view) = getattr(self, name), self._rooms.get(name, (None, None))
        length = old.shape[2] + new.shape[2]
        if old is not view or room.shape[2] < length:  # something else was put here, or it is full
            room = old.new_empty(*old.shape[:2], length + length // 2 + self._MORE, old.shape[3])
            room[:, :, : old.shape[2]] = old
        room[:, :, old.shape[2] : length] = new
        return self._seen(name, room, length)

    def _seen(self, name: str, room: Tensor, length: int) -> Tensor:
        view = room[:, :, :length]
        self._rooms[name] = room, view
        return view

    def take_back(self, count: int) -> None:
        """Forget the last `count` tokens, of those that the last `update` put into the room, and keep it."""
        for name, (room, view) in list(self._rooms.items()):
            setattr(self, name, self._seen(name, room, view.shape[2] - count))


class Rows:
    """A batch in the middle of decoding: cache, mask and memory state of B rows, padded on the left to L columns.

    Attributes:
        cache: of a forward pass.
        mask: (B, L) 1 where a row has a token.
        state: of B conversations.
    """

    def __init__(self, cache: Any, mask: Tensor, state: MemoryState) -> None:
        self.cache, self.mask, self.state = cache, mask, state

    def __len__(self) -> int:
        return self.mask.shape[0]

    @torch.inference_mode()
    def step(self, model: Any, tokens: Sequence[Sequence[int]], ends: bool = False) -> Tensor | None:
        """Feed K tokens to every row; returns the logits (B, K, V) of the next ones. All but the first can be taken back.

        None where it `ends` every row: then the head is spared, an eighth of a pass of SmolLM2.
        """
        input_ids = torch.tensor(tokens, device=self.mask.device)  # (B, K)
        count = input_ids.shape[1]
        # Where the tokens come to stand:
        position_ids = self.mask.sum(dim=1, keepdim=True) + torch.arange(count, device=self.mask.device)
        self.mask = F.pad(self.mask, (0, count), value=1)
        if count > 1:
            attach(self.cache, len(_attention(self.cache))).activate_past_recording()
        output = model(
            input_ids=input_ids, attention_mask=self.mask, position_ids=position_ids, past_key_values=self.cache,
            memory_state=self.state, use_cache=True, logits_to_keep=input_ids.new_empty(0) if ends else count,
        )  # fmt: skip
        self.cache, self.state = output.past_key_values, output.memory_state
        return None if ends else output.logits

    @torch.inference_mode()
    def take_back(self, count: int) -> None:
        """Forget the last `count` tokens of every row, fewer than the last step fed."""
        memory = find_layer(self.cache)
        if count:
            for layer in _attention(self.cache):
                layer.take_back(count)
            self.mask = self.mask[:, :-count]
            memory.crop(-count)
            self.state = memory.state
        memory.stop_recording()

    def select(self, rows: Sequence[int]) -> Rows:
        """Some of the rows, in the given order, without the columns in which none of them has a token."""
        if list(rows) == list(range(len(self))):
            return self
        index = torch.tensor(list(rows), device=self.mask.device)
        mask = self.mask.index_select(0, index)
        first = int(mask.any(dim=0).long().argmax())
        cache = DynamicCache()
        cache.layers = [_part(layer, index, first) for layer in _attention(self.cache)]
        return Rows(cache, mask[:, first:], self.state.select(index))

    def join(self, other: Rows) -> Rows:
        """The rows of both."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        cache = DynamicCache()
        cache.layers = [
            _layer(
                *(
                    torch.cat([padded(a, length), padded(b, length)])
                    for a, b in ((x.keys, y.keys), (x.values, y.values))
                )
            )
            for x, y in zip(_attention(self.cache), _attention(other.cache), strict=True)
        ]
        masks = [F.pad(mask, (length - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        return Rows(cache, torch.cat(masks), MemoryState.cat([self.state, other.state]))


@torch.inference_mode()
def prefill(
    model: Any,
    rows: Sequence[dict[str, Tensor]],
    states: Sequence[MemoryState],
    pad: int,
    prefixes: Sequence[KeptPrefix | None] = (),
) -> tuple[Rows, Tensor]:
    """One forward pass over a stretch of tokens a row; the rows after it, and the logits (B, V) of their next tokens.

    Each of `rows` is what `Conversation.inputs` and `Conversation.prompt` return, and each of `prefixes`, if there are any, what
    `kept_prefix` has of its beginning, which is not run again then.
    """
    prefixes = list(prefixes) or [None] * len(rows)
    spared = [0 if prefix is None else prefix.length for prefix in prefixes]
    length = max(row["input_ids"].shape[1] - begin for row, begin in zip(rows, spared, strict=True))

    def batch(name: str, value: int) -> Tensor:
        new = [row[name][:, begin:] for row, begin in zip(rows, spared, strict=True)]
        return torch.cat([F.pad(part, (length - part.shape[1], 0), value=value) for part in new])

    mask, cached = batch("attention_mask", 0), {}
    if any(spared):
        cached["past_key_values"], before = cache_of(model, prefixes)
        mask = torch.cat([before, mask], dim=1)
        states = [
            state if prefix is None else turn_begun(state) for state, prefix in zip(states, prefixes, strict=True)
        ]
    output = model(
        input_ids=batch("input_ids", pad), attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0)[:, -length:], memory_mask=batch("memory_mask", False),
        memory_state=MemoryState.cat(states), use_cache=True, logits_to_keep=1, **cached,
    )  # fmt: skip
    return Rows(_with_room(output.past_key_values), mask, output.memory_state), output.logits[:, -1]


def _with_room(cache: Any) -> Any:
    """The same cache, whose layers that keep every key and value take one more token without a copy."""
    cache.layers = [
        _layer(x.keys, x.values) if type(x) is DynamicLayer and x.is_initialized else x for x in cache.layers
    ]
    return cache


def _attention(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if not isinstance(layer, MemoryCacheLayer)]


def _part(layer: Any, index: Tensor, first: int) -> Any:
    return _layer(*(t.index_select(0, index.to(t.device))[:, :, first:] for t in (layer.keys, layer.values)))


def _layer(keys: Tensor, values: Tensor) -> RoomyLayer:
    layer = RoomyLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer

"""What a frozen model says of each turn, computed once and kept on disk.

A memory at the top reads hidden states that no gradient has to pass, and each turn's hidden states depend on that turn
alone. So the frozen model runs once over every distinct turn of a data set; training then reads this cache.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ..rendering import RenderedTurn, TurnRenderer
from ..whole_files import replacing

_TOKENS_PER_BATCH = 4096
_TURNS_PER_SHARD = 2048

Text = tuple[str | None, str | None]  # (user message, reply); (None, text) is plain text outside any template
PREFIX: Text = (None, None)  # the system prompt by itself


class FeatureCache:
    """Final hidden states (and those of further layers) for the tokens of many turns, memory-mapped from one folder.

    `features(i)` is (tokens, width of the head + layers * hidden size) in float16; `tokens(i)` the token ids; `reply_start(i)`
    where the reply begins. Where those of the layers do not fit into float16, they are a multiple of what they should be.
    """

    def __init__(self, folder: Path, shards: Sequence[str], texts: Sequence[Text], width: int, tokenizer: Any) -> None:
        self.folder, self.width, self.tokenizer = folder, width, tokenizer
        self._pieces: dict[int, str] = {}
        self._spans: dict[tuple, tuple[int, int]] = {}
        self._index = {text: i for i, text in enumerate(texts)}
        parts = [np.load(folder / f"{shard}.npz") for shard in shards]
        self._ids = np.concatenate([part["ids"] for part in parts])
        lengths = np.concatenate([part["lengths"] for part in parts])
        self._reply_starts = np.concatenate([part["reply_starts"] for part in parts])
        self._offsets = np.concatenate([[0], lengths.cumsum()])
        per_shard = [int(part["lengths"].sum()) for part in parts]
        self._shard_starts = np.concatenate([[0], np.cumsum(per_shard)])
        self._features = [
            np.memmap(folder / f"{shard}.bin", dtype=np.float16, mode="r", shape=(tokens, width))
            for shard, tokens in zip(shards, per_shard, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._reply_starts)

    def find(self, text: Text) -> int:
        """Number of a turn. Raises KeyError if the cache was built without it."""
        return self._index[text]

    def tokens(self, i: int) -> np.ndarray:
        return self._ids[self._offsets[i] : self._offsets[i + 1]]

    def reply_start(self, i: int) -> int:
        return int(self._reply_starts[i])

    def value_span(self, i: int, value: str, after: int | None = None, before: int | None = None) -> tuple[int, int]:
        """Which tokens of turn `i` spell `value`, as (start, stop); (0, 0) if none do.

        Its last occurrence, or with `after` the first one that begins at that token or later; with `before` the last one
        that ends before that token, if there is one. A space before it belongs to it: tokenizers that take digits one by one make
        it a token of its own, and that is what has to be recalled first.
        """
        name = (i, value, after, before)
        if name not in self._spans:
            ids = self.tokens(i).tolist()
            span = (0, 0) if before is None else self._find(ids[:before], value, None)
            self._spans[name] = span if span[1] else self._find(ids, value, after)
        return self._spans[name]

    def is_blank(self, i: int, token: int) -> bool:
        """Whether that token of turn `i` is nothing but white space."""
        return not self._piece(int(self.tokens(i)[token])).strip()

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self.tokenizer.decode([token])
        return self._pieces[token]

    def _find(self, ids: list[int], value: str, after: int | None) -> tuple[int, int]:
        pieces = [self._piece(token) for token in ids]
        ends = np.cumsum([0, *map(len, pieces)])  # of each token, in characters
        text = "".join(pieces)
        if value not in text:  # a character that is spread over several tokens, such as the euro sign: do without it
            value = max(re.findall(r"[ -~]+", value), key=len, default="")
        start = text.rfind(value) if after is None else text.find(value, int(ends[after]))
        if start < 0 or not value:
            return 0, 0
        begin = start - (text[:start].endswith(" ") and start - 1 >= (0 if after is None else ends[after]))
        first, last = np.searchsorted(ends[1:], [begin, start + len(value) - 1], side="right")
        return int(first), int(last) + 1

    def features(self, i: int) -> np.ndarray:
        start, stop = self._offsets[i], self._offsets[i + 1]
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        base = self._shard_starts[shard]
        return self._features[shard][start - base : stop - base]


def build_feature_cache(
    folder: str | Path,
    model: torch.nn.Module,
    final_norm: torch.nn.Module,
    blocks: Sequence[torch.nn.Module],
    renderer: TurnRenderer,
    texts: Sequence[Text],
    key_layers: Sequence[int] = (),
    fingerprint: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> FeatureCache:
    """Compute (or finish, or simply open) the cache of `texts` in `folder`.

    Shards are written whole and renamed into place, so an interrupted run goes on where it stopped. Another model,
    chat template or other layers get a folder of their own; in it a shard is named by its texts, so that data sets which begin
    alike share their work.

    Args:
        folder: parent folder; the cache lives in a sub-folder named by the model, the chat template and the layers.
        model: the frozen causal LM, `final_norm` and `blocks` its final norm and its list of blocks.
        texts: distinct turns.
        key_layers: blocks whose output is kept beside the final hidden state.
        fingerprint: of the model's weights.
        progress: called with (turns done, turns in all).

    Raises:
        ValueError: the model's hidden states are not finite, or its final ones do not fit into float16.
    """
    folder = Path(folder) / _digest([fingerprint, list(key_layers), renderer.prefix_ids, template_ids(renderer)])
    folder.mkdir(parents=True, exist_ok=True)
    head = model.get_output_embeddings().weight.shape[1]  # a projection may come before it
    width = head + model.config.get_text_config().hidden_size * len(key_layers)
    shards = []
    for start in range(0, len(texts), _TURNS_PER_SHARD):
        part = texts[start : start + _TURNS_PER_SHARD]
        shards.append(_digest(part))
        paths = [folder / f"{shards[-1]}.bin", folder / f"{shards[-1]}.npz"]
        if not paths[1].exists():
            with in_eval_mode(model):
                _write_shard(paths, model, final_norm, blocks, renderer, part, key_layers, width)
        if progress:
            progress(start + len(part), len(texts))
    return FeatureCache(folder, shards, texts, width, renderer.tokenizer)


def template_ids(renderer: TurnRenderer) -> list[int]:
    """A turn with a reply, which tells chat templates apart, and tokenizers."""
    return renderer.turn("Well?", "Fine.").ids


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


@contextlib.contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Within it no part of the model is in training mode; those that were are so again after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _write_shard(paths, model, final_norm, blocks, renderer, texts, key_layers, width) -> None:
    turns = [_render(renderer, text) for text in texts]
    lengths = np.array([len(turn.ids) for turn in turns])
    offsets = np.concatenate([[0], lengths.cumsum()])
    features = np.empty((int(offsets[-1]), width), dtype=np.float16)
    captured: dict[int, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda _m, _a, out, layer=layer: captured.__setitem__(layer, out[0] if isinstance(out, tuple) else out)
        )
        for layer, module in ((-1, final_norm), *((layer, blocks[layer]) for layer in key_layers))
    ]
    try:
        # The prefix is the same for every templated turn: its keys and values are computed once.
        prefix = _prefix_cache(model, renderer.prefix_ids)
        for templated in (False, True):
            order = sorted((i for i, text in enumerate(texts) if (text[0] is not None) == templated), key=lengths.item)
            while order:
                longest = max(1, int(lengths[order[-1]]))
                rows = [order.pop() for _ in range(min(len(order), max(1, _TOKENS_PER_BATCH // longest)))]
                ids = torch.zeros(len(rows), longest, dtype=torch.long)
                for row, i in enumerate(rows):
                    ids[row, : lengths[i]] = torch.tensor(turns[i].ids)
                past = copy.deepcopy(prefix) if templated else None
                if past is not None:
                    past.batch_repeat_interleave(len(rows))
                # Rows end in padding that no causal position sees, so no mask is needed.
                model.get_decoder()(input_ids=ids.to(model.device), past_key_values=past, use_cache=past is not None)
                found = {layer: out.float().cpu() for layer, out in captured.items()}
                states = _in_range(found[-1], {layer: found[layer] for layer in key_layers})
                for row, i in enumerate(rows):
                    features[offsets[i] : offsets[i + 1]] = states[row, : lengths[i]].numpy()
    finally:
        for hook in hooks:
            hook.remove()
    with replacing(paths[0]) as part:
        features.tofile(part)
    with replacing(paths[1]) as part, part.open("wb") as file:  # of a bare name numpy would make another one
        np.savez(
            file,
            ids=np.concatenate([np.array(turn.ids, dtype=np.int32) for turn in turns]),
            lengths=lengths,
            reply_starts=np.array([turn.reply_start for turn in turns]),
        )


def _in_range(final: torch.Tensor, layers: dict[int, torch.Tensor]) -> torch.Tensor:
    """Final hidden states and those of layers, each (R, T, size), side by side, with nothing too large for float16.

    Blocks may have massive activations. A memory norms what it gets of the layers, so its scale says nothing and is brought
    down where it has to be; that of final states does.
    """
    most = torch.finfo(torch.float16).max
    if not (final.abs() <= most).all():
        raise ValueError(
            f"the model's final hidden states are beyond {most:.0f}, the most that this cache holds, or not finite: load the model "
            "in float32 or bfloat16, or train with transformers.Trainer, which needs no cache (docs/training.md)"
        )
    for layer, found in layers.items():
        if not found.isfinite().all():
            raise ValueError(
                f"what comes out of block {layer} is not finite: choose other key_layers (`--key-layers`), or load the model in "
                "float32 or bfloat16"
            )
    if not layers:
        return final
    keys = torch.cat([*layers.values()], dim=-1)
    return torch.cat([final, keys * (most / keys.abs().amax(dim=-1, keepdim=True)).clamp_max(1)], dim=-1)


def _prefix_cache(model: torch.nn.Module, ids: list[int]) -> DynamicCache | None:
    if not ids:
        return None
    cache = DynamicCache(config=model.config)
    model.get_decoder()(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    return cache


def _render(renderer: TurnRenderer, text: Text) -> RenderedTurn:
    user, reply = text
    if user is not None:
        return renderer.turn(user, reply)
    ids = renderer.prefix_ids if reply is None else renderer.tokenizer(reply, add_special_tokens=False)["input_ids"]
    return RenderedTurn(ids, len(ids))

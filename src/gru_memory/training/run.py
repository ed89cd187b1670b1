"""One training run from start to finish: sessions, features of the frozen model, training, the memory on disk."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .. import backbones
from ..base_identity import weights_digest
from ..config import MemoryConfig
from ..data.books import text_paths
from ..data.sessions import Session
from ..embedded import load_model
from ..models import add_memory
from ..placement import device_for
from ..rendering import TurnRenderer
from .alignment import collect, fit_addresses, fit_read_gates, fit_strengths, fit_trust, fit_values
from .calibration import calibrate
from .features import PREFIX, FeatureCache
from .frozen import FrozenModel, Progress, weights_sum, without_denormals
from .passages import PASSAGES, PassagePool, PassageTrainer, held_out_passages
from .pools import FilePool, session_pools
from .request import BOOKS, POOLS, TrainRequest, conversation_memory
from .rows import Batch, make_batch
from .trainer import MemoryTrainer, check_resumable

_ALIGNED_SESSIONS = 3600  # of three facts each: what addresses and strengths begin with
_ALIGNED_SHARE = 8  # sessions of a member of a small pool: more would say the same again
_TRUSTED_SESSIONS = 160  # what trust begins with
_VALIDATION_SESSIONS = 32
_CALIBRATED_BATCHES = 3  # of so many sessions, for each kind of question
_CALIBRATED_BETWEEN = 12  # turns of talk: trust falls as they wear away what is stored


def train(
    request: TrainRequest, report: Callable[[dict], None] | None = None, progress: Progress | None = None
) -> Path:
    """Train a memory as `request` says and write it to `request.out` with `save_memory`. Interrupted runs are resumed.

    Args:
        request: see `TrainRequest`. The memory needs `sites=("top",)`: only there can hidden states be cached.
        report: receives a dict after every step and every validation (see `MemoryTrainer`).
        progress: told how far the preparations are.

    Returns:
        the folder of the memory.

    Raises:
        ValueError: the request cannot be trained, or its folder holds a run of another model, other data or other settings.
    """
    _check(request)
    out = Path(request.out)
    device = device_for(request.device)
    base, tokenizer = load_model(request.model)
    train_loaded(base.to(device), tokenizer, request, report, progress).save_memory(out, dtype=torch.float16)
    return out


def train_loaded(
    base: Any,
    tokenizer: Any,
    request: TrainRequest,
    report: Callable[[dict], None] | None = None,
    progress: Progress | None = None,
) -> Any:
    """`train` for a model that is loaded, on its device: gives it the memory, in place, and returns it.

    What `request.model` and `request.device` say does not matter.

    With `request.bfloat16` the model's weights are rounded to bfloat16.
    """
    _check(request)
    about = _about(request, weights_digest(base))
    check_resumable(request.out, request.training, about)
    out = Path(request.out)
    out.mkdir(parents=True, exist_ok=True)
    config = _memory_config(request, len(backbones.blocks_of(base)))
    hidden_size, width = base.config.get_text_config().hidden_size, base.get_output_embeddings().weight.shape[1]
    keys = len(config.key_layers) * hidden_size + 2 * width
    config.address_rank = min(config.address_rank, keys)  # a key of a small model has no more directions
    fingerprint = f"{weights_sum(base)} {'bfloat16' if request.bfloat16 else 'float32'}"
    head = base.get_output_embeddings().weight.detach().float().cpu().clone()
    torch.manual_seed(request.training.seed)
    model = add_memory(base, config)
    memory = model.memory_sites()["top"]
    home = memory.gate.device
    memory.float().cpu()  # it is small, and its sessions come from a cache in this machine's memory
    memory.match_embeddings(head)
    if config.gate_init == 0:
        torch.nn.init.constant_(memory.gate, _training_gate(head, memory.output.in_features))
    if request.bfloat16:
        model.to(torch.bfloat16)
    folder = Path(request.cache) if request.cache else out / "cache"
    frozen = FrozenModel(model, TurnRenderer(tokenizer), folder, config.key_layers, fingerprint, progress)
    train_on = _train_on_books if request.data == BOOKS else _train_on_sessions
    train_on(request, about, memory, head, frozen, report)
    memory.to(home)
    return model


def _train_on_sessions(request: TrainRequest, about: dict, memory, head, frozen: FrozenModel, report) -> None:
    with frozen.running():
        pool, validation_pools = session_pools(request, frozen)
        cache = frozen.features("training", pool.turns())
        kept = {name: (p, frozen.features(name, p.turns())) for name, p in validation_pools.items()}
        validation = {name: [_validation_batch(*pair)] for name, pair in kept.items()}
    memory.float()
    with without_denormals():
        # The generator's answers are one wording around one value; those of a file may be anything.
        by_replies = request.data != "facts"
        settings = request.training, request.out, report, by_replies, about
        trainer = MemoryTrainer(memory, head, pool, cache, validation, *settings)
        if memory.address_rank and not trainer.resume():
            _align(memory, head, pool, cache, len(frozen.key_layers), request.training.seed, frozen.progress)
        trainer.train()
        if memory.signature_size:
            calibrate(memory, head, _calibration_batches(kept.values()))


def _train_on_books(request: TrainRequest, about: dict, memory, head, frozen: FrozenModel, report) -> None:
    pool, held_out = _passages(request)
    with frozen.running():
        cache = frozen.features("training", pool.turns())
        kept = frozen.features("held-out passages", held_out.turns())
    memory.float()
    with without_denormals():
        settings = request.training, request.out, report, False, about
        trainer = PassageTrainer(memory, head, pool, cache, {"held_out": (held_out, kept)}, *settings)
        if not trainer.resume():
            trainer.begin(len(frozen.key_layers), frozen.progress)
        trainer.train()


def _check(request: TrainRequest) -> None:
    """Refuse what cannot be trained before anything is loaded."""
    config = _memory_config(request, 1)
    if tuple(config.sites) != ("top",):
        raise ValueError(f"training on cached hidden states is for sites=('top',), not {config.sites}")
    if request.data == BOOKS:
        if request.books is None:
            raise ValueError("there is nothing to learn from: name a folder of plain-text books with --books")
        if config.addressing != "content":
            raise ValueError("a memory of books finds its slots by their content: leave out --addressing learned")
        if request.passages < PASSAGES:
            raise ValueError(f"passages is {request.passages}: {PASSAGES} make a stretch, so take at least as many")
        _passages(request)
    elif request.data != "facts":
        FilePool(request.data)
    check_resumable(request.out, request.training, _about(request))


def _passages(request: TrainRequest) -> tuple[PassagePool, PassagePool]:
    """To train on, and held out."""
    seed = request.training.seed
    pool = PassagePool(request.books, request.passages, random.Random(f"passages {seed}"))
    return pool, held_out_passages(request.books, random.Random(f"held-out passages {seed}"))


def _about(request: TrainRequest, weights: str | None = None) -> dict[str, Any]:
    """What makes another run of it, besides how long it trains and how fast; `weights` is a digest of the model's."""
    books = [path.name for path in text_paths(request.books)] if request.books else []
    about = {"data": request.data, "memory": request.memory, "books": books, "bfloat16": request.bfloat16}
    if request.data == BOOKS:
        about["passages"] = request.passages
    elif request.data == "facts":
        about |= {name: getattr(request, name) for name in POOLS}
        if books:
            about["pages"] = request.pages
    else:
        about["sessions"] = hashlib.sha256(Path(request.data).read_bytes()).hexdigest()[:32]
    if weights is not None:
        about["model"] = weights
    return json.loads(json.dumps(about))  # tuples come back as lists


def _memory_config(request: TrainRequest, num_blocks: int) -> MemoryConfig:
    """What `conversation_memory` is, but with books nothing that is known by heart: passages have no wording in common."""
    by_heart = {"persistent_slots": 0} if request.data == BOOKS else {}
    return conversation_memory(num_blocks, **{**by_heart, **request.memory})


def _align(memory, head, pool, cache, layers: int, seed: int, progress: Progress | None) -> None:
    """Addresses, strengths and, where values are written elsewhere, values in closed form, from whole sessions of the pool."""
    rng, count = random.Random(f"align {seed}"), min(_ALIGNED_SESSIONS, _ALIGNED_SHARE * len(pool))

    def batches(count: int, untold: int = 0) -> Iterator[Batch]:
        for done in range(0, count, 16):
            if progress:
                progress("aligning addresses", done, count)
            yield make_batch([pool.session(rng, 3, 1, shuffle=False, num_untold=untold) for _ in range(16)], cache)

    views = collect(memory, head, batches(count))
    fit_addresses(memory, views, layers=layers)
    fit_strengths(memory, head, views, _alone(pool, cache, rng, progress))
    fit_read_gates(memory, views)
    if any(mark.written for turn in pool.turns() for mark in (*turn.marks, *turn.notes)):
        fit_values(memory, views, head)
    if memory.signature_size:
        fit_trust(memory, head, batches(min(_TRUSTED_SESSIONS, count), untold=2))


def _alone(pool, cache, rng: random.Random, progress: Progress | None) -> Iterator[Batch]:
    """Every turn of a pool on its own, but questions that tell nothing, of which a tenth does."""
    turns = [turn for turn in pool.turns() if turn.learn != "answer" or turn.notes or rng.random() < 0.1]
    turns.sort(key=lambda turn: len(turn.user or "") + len(turn.assistant or ""))  # little padding
    prefix = len(cache.tokens(cache.find(PREFIX)))
    for start in range(0, len(turns), 64):
        if progress:
            progress("fitting strengths", start, len(turns))
        batch = make_batch([Session((turn,)) for turn in turns[start : start + 64]], cache)
        yield Batch(*(getattr(batch, column.name)[:, prefix:] for column in fields(batch)))


def _calibration_batches(kept: Iterable[tuple[Any, FeatureCache]]) -> Iterator[Batch]:
    for pair in kept:
        yield from (_validation_batch(*pair, _CALIBRATED_BETWEEN, seed) for seed in range(_CALIBRATED_BATCHES))


def _validation_batch(pool: Any, cache: FeatureCache, between: int = 3, seed: int = 5) -> Batch:
    rng = random.Random(seed)
    return make_batch(
        [pool.session(rng, 3, between, shuffle=False, num_untold=1) for _ in range(_VALIDATION_SESSIONS)], cache
    )


def _training_gate(head: torch.Tensor, width: int) -> float:
    """An initial gate at which a token that is read whole gains some 160 nats (tanh leaves 0.65 of a value's size).

    That much is needed: less than half of the heads find a token at first, the model's own likeliest one is some 10 nats
    ahead, and what the other heads find is heard as well.
    """
    return 160 / (0.65 * width * float(head.pow(2).mean().sqrt()))

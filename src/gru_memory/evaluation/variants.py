"""A model changed for a while: another decay, no bound on what is added up, tokens left unwritten, blocks that run once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backbones
from ..config import check_decay
from ..memory import GRUMemoryWithDecay, Prepared

_MOST_ADDED = 0.999  # of a content at once, by the naive accumulator


def memory_sites(model: Any) -> dict[str, GRUMemoryWithDecay]:
    """The sites that evaluations of traces know. Raises ValueError if there is none."""
    sites = model.memory_sites() if hasattr(model, "memory_sites") else {}
    found = {name: site for name, site in sites.items() if isinstance(site, GRUMemoryWithDecay)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no GRUMemoryWithDecay: give it one with gru_memory.add_memory(model)"
        )
    return found


@contextlib.contextmanager
def with_decay(model: Any, decay: float | list) -> Iterator[None]:
    """Every site keeps `decay` at a tick of its clock, as its config would say."""
    sites = memory_sites(model).values()
    before = [site.decay_table for site in sites]
    try:
        for site in sites:
            _set_decay(site, check_decay(decay, site.num_heads, site.num_slots))
        yield
    finally:
        for site, table in zip(sites, before, strict=True):
            _set_decay(site, table)


@contextlib.contextmanager
def accumulating(model: Any) -> Iterator[None]:
    """Every site adds what it writes to its slots, H_s = H~_s + b a_s C, instead of mixing it in: the naive accumulator.

    With H~ = keep / (1 - z) H and z = b a, the update H~ + z (C - H~) of the scan is keep H + z C. (The gru cell then sees
    that H~ as well.) A z of 1 would leave nothing to scale up: there 0.999 is written of a C that is as much larger.
    """

    def unbounded(prepared: Prepared, mask: Tensor | None) -> Prepared:
        inputs = prepared.inputs
        write = inputs.write.clamp_max(_MOST_ADDED)  # (B, T, N, S)
        louder = inputs.write.sum(-1, keepdim=True) / write.sum(-1, keepdim=True).clamp_min(1e-12)
        values = torch.where(write.sum(-1, keepdim=True) > 0, louder, 1.0) * inputs.values
        return prepared._replace(inputs=inputs._replace(values=values, write=write, keep=inputs.keep / (1 - write)))

    with _prepared(model, unbounded):
        yield


@contextlib.contextmanager
def unwritten(model: Any, columns: Sequence[Sequence[int]]) -> Iterator[None]:
    """Let a forward pass write nothing at the given columns of each row; everything else about those tokens stays."""

    def wrap(original: Any) -> Any:
        def write_strength(told: Tensor) -> Tensor:
            strength = original(told).clone()  # (B, T, N)
            for row, places in enumerate(columns):
                strength[row, list(places)] = 0
            return strength

        return write_strength

    with _wrapped(model, "write_strength", wrap):
        yield


@contextlib.contextmanager
def same_blocks(model: Any) -> Iterator[None]:
    """Within it every forward pass is over the same tokens, and those after the first take from it what the blocks said.

    Only where all of the memory is at the top, so that what it holds changes nothing of that; otherwise they run every time.
    """
    blocks = [] if set(model.memory_sites()) != {"top"} else list(backbones.blocks_of(model))
    before = [vars(block).get("forward") for block in blocks]  # others may have put one of their own there
    try:
        for block in blocks:
            block.forward = _once(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _once(function: Any) -> Any:
    """What it says the first time it says always."""
    said: list[Any] = []

    @functools.wraps(function)
    def once(*args, **kwargs):
        if not said:
            said.append(function(*args, **kwargs))
        return said[0]

    return once


@contextlib.contextmanager
def _prepared(model: Any, change: Any) -> Iterator[None]:
    """Let `change` have what every site prepared before the recurrence runs.

    For stretches of at least two tokens: decoding takes a path of its own past `prepare`.
    """

    def wrap(original: Any) -> Any:
        def prepare(hidden_states, token_embeds, state, mask, *rest, **further):
            return change(original(hidden_states, token_embeds, state, mask, *rest, **further), mask)

        return prepare

    with _wrapped(model, "prepare", wrap):
        yield


@contextlib.contextmanager
def _wrapped(model: Any, method: str, wrap: Any) -> Iterator[None]:
    """Let every site's method of that name be `wrap` of it. Decoding a single token takes a path of its own past all of them."""
    sites = memory_sites(model).values()
    try:
        for site in sites:
            setattr(site, method, wrap(getattr(site, method)))
        yield
    finally:
        for site in sites:
            vars(site).pop(method, None)


def _set_decay(site: GRUMemoryWithDecay, table: list[list[float]]) -> None:
    site.decay_table, site._decay = table, None


def half_life(decay: float | torch.Tensor) -> float:
    """Ticks after which half of a trace is left."""
    rate = torch.as_tensor(decay, dtype=torch.float64)
    return float((torch.log(torch.tensor(0.5, dtype=torch.float64)) / torch.log(rate)).mean())

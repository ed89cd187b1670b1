"""A model with its memory changed for a while: another decay, no bound on what is added up, tokens left unwritten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import check_decay
from ..memory import GRUMemoryWithDecay, Prepared


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
    that H~ as well.)
    """

    def unbounded(prepared: Prepared, mask: Tensor | None) -> Prepared:
        inputs = prepared.inputs
        return prepared._replace(inputs=inputs._replace(keep=inputs.keep / (1 - inputs.write).clamp_min(1e-6)))

    with _prepared(model, unbounded):
        yield


@contextlib.contextmanager
def unwritten(model: Any, columns: Sequence[Sequence[int]]) -> Iterator[None]:
    """Let a forward pass write nothing at the given columns of each row; everything else about those tokens stays."""

    def silent(prepared: Prepared, mask: Tensor | None) -> Prepared:
        write = prepared.inputs.write.clone()  # (B, T, N, S)
        for row, places in enumerate(columns):
            write[row, list(places)] = 0
        return prepared._replace(inputs=prepared.inputs._replace(write=write))

    with _prepared(model, silent):
        yield


@contextlib.contextmanager
def _prepared(model: Any, change: Any) -> Iterator[None]:
    """Let `change` have what every site prepared before the recurrence runs.

    For stretches of at least two tokens: decoding takes a path of its own past `prepare`.
    """
    sites = memory_sites(model).values()

    def wrap(original: Any) -> Any:
        def prepare(hidden_states, token_embeds, state, mask, *rest, **further):
            return change(original(hidden_states, token_embeds, state, mask, *rest, **further), mask)

        return prepare

    try:
        for site in sites:
            site.prepare = wrap(site.prepare)
        yield
    finally:
        for site in sites:
            vars(site).pop("prepare", None)


def _set_decay(site: GRUMemoryWithDecay, table: list[list[float]]) -> None:
    site.decay_table, site._decay = table, None


def half_life(decay: float | torch.Tensor) -> float:
    """Ticks after which half of a trace is left."""
    rate = torch.as_tensor(decay, dtype=torch.float64)
    return float((torch.log(torch.tensor(0.5, dtype=torch.float64)) / torch.log(rate)).mean())

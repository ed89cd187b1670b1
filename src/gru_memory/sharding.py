"""Parameters that FSDP2 (torch's `fully_shard`) has spread over several processes, as `DTensor`s."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of `tensor` only."""
    return hasattr(tensor, "full_tensor")


def has_shards(module: nn.Module) -> bool:
    return any(is_sharded(p) for p in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it where nothing is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, with gradients. For a sharded one every process has to ask, or those that do wait for ever."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@contextmanager
def one_writes(module: nn.Module) -> Iterator[bool]:
    """Whether this process is to write what was gathered of `module`. All go on together, when it is written."""
    sharded = has_shards(module)
    try:
        yield not sharded or torch.distributed.get_rank() == 0
    finally:  # where writing failed, too: the others would wait for ever
        if sharded:
            torch.distributed.barrier()

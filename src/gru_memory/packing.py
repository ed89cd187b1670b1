"""Slots in four bits a number: what is kept of a conversation between two turns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEPS = 7  # codes 1 to 15 stand for -1 to 1 in steps of 1/7; code 0 is not used


def pack_int4(numbers: Tensor) -> Tensor:
    """Numbers in [-1, 1] of any shape as (ceil(count / 2),) uint8, two a byte; they come back within 1/14."""
    codes = ((numbers.detach().float().clamp(-1, 1) * _STEPS).round() + _STEPS + 1).to(torch.uint8).flatten()
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return codes[0::2] | (codes[1::2] << 4)


def unpack_int4(packed: Tensor, shape: list[int]) -> Tensor:
    """Inverse of `pack_int4`, in float32.

    Raises:
        KeyError: that many bytes do not hold that many numbers.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or min(shape, default=0) < 0 or len(packed) != (count + 1) // 2:
        raise KeyError(f"{tuple(packed.shape)} bytes are not {shape} numbers")
    codes = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:count]
    return ((codes.float() - (_STEPS + 1)) / _STEPS).clamp(-1, 1).reshape(shape)

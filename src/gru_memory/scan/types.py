"""What a scan takes in. Shapes: B batch, T tokens, N heads, S slots a head, d slot size."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class CellWeights(NamedTuple):
    """Recurrent half of a GRU cell for each head, gates in the order of `torch.nn.GRUCell`: reset, update, new."""

    weight: Tensor  # (N, 3d, d)
    bias: Tensor  # (N, 3d)


class ScanInputs(NamedTuple):
    """What a scan consumes. Positions that must hold the state have `write` 0 and `keep` 1 (any `values`)."""

    values: Tensor  # mingru: (B, T, N, d) content in [-1, 1]; gru: (B, T, N, 3d) input half of the cell
    address: Tensor  # (B, T, N, S) where to write, sums to 1
    write: Tensor  # (B, T, N, S) update gate z in [0, 1]
    keep: Tensor  # (B, T, N, S) decay of this step in (0, 1]
    query: Tensor  # (B, T, N, S) where to read, sums to 1


def precision(tensors: Iterable[Tensor]) -> tuple[torch.dtype, torch.dtype]:
    """The type that a scan of these tensors gives, and the one it computes in: float32 at least."""
    result = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return result, torch.promote_types(result, torch.float32)

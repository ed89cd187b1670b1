"""What the forms with a backward of their own share: types, what is saved, and the gradients of the cell's weights."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .types import CellWeights, ScanInputs, precision

MIN_CHUNK_TOKENS = 16


class Backend(Protocol):
    """Two functions over tensors of one floating type, contiguous but for `keep`: (B, T, N or 1, S or 1)."""

    def forward(
        self, tensors: list[Tensor | None], reads: Tensor, after: Tensor, saved: Tensor, borders: Tensor, chunk: int
    ) -> None:
        """Fill reads (B, T, N, d) and after (B, N, S, d); unless they are empty also saved and borders.

        tensors: values, address, write, keep, query, slots, weight, bias, the last two None for `mingru`.
        saved (B, T, N, 6, d) is for the backward of the gru cell: content, stored, reset, update, new, and the
        recurrent half of new. borders (B*N, chunks, ...) holds the state before each chunk.
        """

    def backward(
        self, tensors: list[Tensor | None], saved: Tensor, borders: Tensor, chunk: int, grads: list[Tensor]
    ) -> None:
        """Fill grads[2:] given grads[:2], those of reads and after.

        They are those of values, address, write, keep (empty if nobody asks), query, slots, and for `gru` of
        `weight @ stored + bias` (B, T, N, 3d); that of address is filled for `gru` alone.
        """


def run_fused(backend: Backend, inputs: ScanInputs, slots: Tensor, cell: CellWeights | None) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `scan_reference`. Computes in float32, or in float64 where an input is float64."""
    weight, bias = (None, None) if cell is None else cell
    tensors = [*inputs, slots, weight, bias]
    given = [tensor for tensor in tensors if tensor is not None]
    result, dtype = precision(given)
    tensors[3] = without_copies(inputs.keep)
    tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        reads, after = _Fused.apply(backend, *tensors)
    else:
        reads, after, *_ = _forward(backend, [_plain(tensor) for tensor in tensors], save=False)
    return reads.to(result), after.to(result)


def without_copies(keep: Tensor) -> Tensor:
    """Axes of heads and slots along which an expanded tensor repeats itself, cut to one: (B, T, N or 1, S or 1)."""
    if keep.requires_grad:
        return keep
    for axis in (2, 3):
        if keep.stride(axis) == 0:
            keep = keep.narrow(axis, 0, 1)
    return keep


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().contiguous()


def _forward(backend: Backend, tensors: list[Tensor | None], save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    write, slots, weight = tensors[2], tensors[5], tensors[6]
    batch, length, heads, count = write.shape
    size = slots.shape[-1]
    chunk = max(MIN_CHUNK_TOKENS, math.isqrt(length))
    reads = slots.new_empty(batch, length, heads, size)
    after = torch.empty_like(slots)
    borders = slots.new_empty(batch * heads, -(-length // chunk) if save else 0, count, size)
    saved = slots.new_empty(batch if save and weight is not None else 0, length, heads, 6, size)
    backend.forward(tensors, reads, after, saved, borders, chunk)
    return reads, after, saved, borders, chunk


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        plain = [_plain(tensor) for tensor in tensors]
        reads, after, saved, borders, ctx.chunk = _forward(backend, plain, save=True)
        ctx.backend = backend
        ctx.save_for_backward(*plain, saved, borders)
        return reads, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_reads: Tensor, grad_after: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, saved, borders = ctx.saved_tensors
        values, address, write, _, query, slots, weight, _ = tensors
        wants_keep = ctx.needs_input_grad[4]
        grad_keep = torch.empty_like(write) if wants_keep else write.new_empty(0, 0, 0, 0)
        found = [
            torch.empty_like(values),
            None if weight is None else torch.empty_like(address),
            torch.empty_like(write),
            grad_keep,
            torch.empty_like(query),
            torch.empty_like(slots),
        ]
        recurrent = None if weight is None else torch.empty_like(values)
        ctx.backend.backward(
            tensors, saved, borders, ctx.chunk, [grad_reads.contiguous(), grad_after.contiguous(), *found, recurrent]
        )
        grad_weight = grad_bias = None
        if weight is not None:
            grad_weight = torch.einsum("btnk,btnd->nkd", recurrent, saved[:, :, :, 1])  # of weight @ stored
            grad_bias = recurrent.sum(dim=(0, 1))
        found[3] = grad_keep if wants_keep else None
        return (None, *found, grad_weight, grad_bias)

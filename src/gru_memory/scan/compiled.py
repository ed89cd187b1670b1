"""Both cells in machine code on a CPU, with gradients: `scan_compiled`. Needs numba."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .threads import share
from .types import CellWeights, ScanInputs

MIN_CHUNK_TOKENS = 16
SMALL_WEIGHT_BYTES = 16_384
WORK_PER_THREAD = 100_000  # updates of a number in a slot; below it a second thread costs more than it brings


def scan_compiled(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None = None) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `scan_reference`. Computes in float32, or in float64 where an input is float64."""
    weight, bias = (None, None) if cell is None else cell
    tensors = [*inputs, slots, weight, bias]
    given = [tensor for tensor in tensors if tensor is not None]
    result = given[0].dtype
    for tensor in given[1:]:
        result = torch.promote_types(result, tensor.dtype)
    dtype = torch.promote_types(result, torch.float32)
    keep = _without_copies(inputs.keep)
    tensors = [None if tensor is None else tensor.to(dtype) for tensor in (*inputs[:3], keep, *tensors[4:])]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        reads, after = _Scan.apply(*tensors)
    else:
        reads, after, *_ = _forward([_plain(tensor) for tensor in tensors], save=False)
    return reads.to(result), after.to(result)


def _without_copies(keep: Tensor) -> Tensor:
    """Axes of heads and slots along which an expanded tensor repeats itself, cut to one: (B, T, N or 1, S or 1)."""
    if keep.requires_grad:
        return keep
    for axis in (2, 3):
        if keep.stride(axis) == 0:
            keep = keep.narrow(axis, 0, 1)
    return keep


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().contiguous()


def _share(kernel, arrays: list, batch: int, heads: int, work_per_head: int) -> None:
    arrays = [array.numpy() if isinstance(array, Tensor) else array for array in arrays]
    share(lambda first, last: kernel(*arrays, first, last), batch * heads, -(-WORK_PER_THREAD // work_per_head))


def _heads_together(weight: Tensor) -> int:
    """As many heads as there are if the weights of all fit the cache nearest to the core, else one after the other."""
    return len(weight) if weight.numel() * weight.element_size() <= SMALL_WEIGHT_BYTES else 1


def _forward(tensors: list[Tensor | None], save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """reads, slots afterwards, what to save of the gru cell, the state at the borders of chunks, and their length."""
    values, address, write, keep, query, slots, weight, bias = tensors
    batch, length, heads, _ = write.shape
    size = slots.shape[-1]
    chunk = max(MIN_CHUNK_TOKENS, math.isqrt(length))
    reads = slots.new_empty(batch, length, heads, size)
    after = torch.empty_like(slots)
    borders = slots.new_empty(batch * heads, -(-length // chunk) if save else 0, size, slots.shape[2])
    saved = slots.new_empty(batch if save and weight is not None else 0, length, heads, 6, size)
    work = length * slots.shape[2] * size
    if weight is None:
        arrays = [values, write, keep, query, slots, reads, after, borders, chunk]
        _share(kernels.mingru_forward, arrays, batch, heads, work)
    else:
        arrays = [values, address, write, keep, query, slots, weight, bias, reads, after, saved, borders, chunk]
        arrays.append(_heads_together(weight))
        _share(kernels.gru_forward, arrays, batch, heads, work + 3 * length * size * size)
    return reads, after, saved, borders, chunk


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        tensors = [_plain(tensor) for tensor in tensors]
        reads, after, saved, borders, ctx.chunk = _forward(tensors, save=True)
        ctx.save_for_backward(*tensors, saved, borders)
        return reads, after

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_reads, grad_after):
        values, address, write, keep, query, slots, weight, _bias, saved, borders = ctx.saved_tensors
        batch, length, heads, count = write.shape
        size = slots.shape[-1]
        grad_reads, grad_after = grad_reads.contiguous(), grad_after.contiguous()
        grad_values, grad_write, grad_query, grad_slots = map(torch.empty_like, (values, write, query, slots))
        wants_keep = ctx.needs_input_grad[3]
        grad_keep = torch.empty_like(write) if wants_keep else write.new_empty(0, 0, 0, 0)
        work = length * count * size
        if weight is None:
            grad_address = grad_weight = grad_bias = None
            arrays = [values, write, keep, query, borders, ctx.chunk, grad_reads, grad_after]
            arrays += [grad_values, grad_write, grad_keep, grad_query, grad_slots]
            _share(kernels.mingru_backward, arrays, batch, heads, 4 * work)
        else:
            grad_address, grad_recurrent = torch.empty_like(address), torch.empty_like(values)
            arrays = [values, address, write, keep, query, weight, saved, borders, ctx.chunk, grad_reads, grad_after]
            arrays += [grad_values, grad_address, grad_write, grad_keep, grad_query, grad_slots, grad_recurrent]
            arrays.append(_heads_together(weight))
            _share(kernels.gru_backward, arrays, batch, heads, 6 * work + 3 * length * size * size)
            stored = saved[:, :, :, 1]  # (B, T, N, d)
            grad_weight = torch.einsum("btnk,btnd->nkd", grad_recurrent, stored)
            grad_bias = grad_recurrent.sum(dim=(0, 1))
        grad_keep = grad_keep if wants_keep else None
        return grad_values, grad_address, grad_write, grad_keep, grad_query, grad_slots, grad_weight, grad_bias

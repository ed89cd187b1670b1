"""Both cells in Triton on a GPU, with gradients: `scan_triton`. Needs triton, which torch brings along for CUDA."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .fused import run_fused
from .reference import scan_reference
from .types import CellWeights, ScanInputs

MAX_STATE = 4_096  # numbers of a state, rounded up to powers of two, that stay in the registers of a program
MAX_GRU_SIZE = 128  # largest size of a slot, likewise, with which the weights of a gru cell stay in the nearest cache
COLUMNS = 8  # numbers of every slot in a program without a gru cell, or fewer if there are many slots


def scan_triton(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None = None) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `scan_reference`. Computes in float32, or in float64 where an input is float64."""
    return run_fused(_Triton(), inputs, slots, cell)


def fits(slots: Tensor, cell: CellWeights | None) -> bool:
    """Whether the state that a program has stays in registers, and the weights of its cell are not too large."""
    count, size = _block(slots, cell is not None)
    return count * size <= MAX_STATE and (cell is None or size <= MAX_GRU_SIZE)


@functools.cache
def works(device: torch.device, gru: bool) -> bool:
    """Whether this device gives what the reference gives, outputs and gradients: found out once, on a small example."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    batch, length, heads, count, size = 2, 19, 2, 5, 12
    fields = [2 * random(batch, length, heads, 3 * size if gru else size) - 1]
    fields += [random(batch, length, heads, count) for _ in range(4)]
    tensors = [*fields, random(batch, heads, count, size)]
    if gru:
        tensors += [random(heads, 3 * size, size) - 0.5, random(heads, 3 * size) - 0.5]

    def both() -> list[list[Tensor]]:
        with torch.enable_grad():
            return [_outputs_and_gradients(form, tensors) for form in (scan_triton, scan_reference)]

    return agree(both, device)


def agree(both: Callable[[], Iterable[Iterable[Tensor]]], device: torch.device) -> bool:
    """Whether the two results that `both` returns, the second the reference's, are the same up to rounding.

    A GPU too old, or a triton too new, is a warning and the plain form, not an error in the middle of a conversation.
    """
    try:
        error = max((a - b).abs().max().item() / (1 + b.abs().max().item()) for a, b in zip(*both(), strict=True))
        if error <= 1e-4:
            return True
        reason = f"its results are off by {error:.1e}"
    except Exception as problem:  # whatever a compiler or a driver may raise
        reason = f"{type(problem).__name__}: {problem}"
    warnings.warn(
        f"the Triton form of the memory does not work on {device}, the plain form runs instead ({reason}). Another "
        "version of triton may help",
        RuntimeWarning,
        stacklevel=3,
    )
    return False


def _outputs_and_gradients(form, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = form(ScanInputs(*leaves[:5]), leaves[5], CellWeights(*leaves[6:]) if leaves[6:] else None)
    gradients = torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs], allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None)]


class _Triton:
    def forward(
        self, tensors: list[Tensor | None], reads: Tensor, after: Tensor, saved: Tensor, borders: Tensor, chunk: int
    ) -> None:
        from .triton_kernels import scan_forward

        values, address, write, keep, query, slots, weight, bias = _no_holes(tensors)
        if tensors[6] is not None:
            weight = weight.transpose(1, 2).contiguous()
        grid, options = grid_and_options(slots, gru=tensors[6] is not None)
        with torch.cuda.device_of(slots):
            scan_forward[grid](
                values, address, write, keep, query, slots, weight, bias, reads, after, saved, borders,
                write.shape[1], slots.shape[1], chunk, *keep.expand_as(write).stride(),
                SAVE=borders.shape[1] > 0, **options,
            )  # fmt: skip

    def backward(
        self, tensors: list[Tensor | None], saved: Tensor, borders: Tensor, chunk: int, grads: list[Tensor]
    ) -> None:
        from .triton_kernels import scan_backward

        values, address, write, keep, query, slots, weight, _ = _no_holes(tensors)
        grid, options = grid_and_options(slots, gru=tensors[6] is not None)
        held = slots.new_empty(slots.shape[0] * slots.shape[1], chunk, *slots.shape[2:])
        wants_keep = grads[5].numel() > 0
        parts = list(grads)
        for i in (4, 5, 6):  # of write, keep and query: every block of columns has its share
            parts[i] = grads[i] if grid[1] == 1 else grads[i].new_empty(grid[1], *grads[i].shape)
        with torch.cuda.device_of(slots):
            scan_backward[grid](
                values, address, write, keep, query, weight, saved, borders, held, *_no_holes(parts),
                write.shape[1], slots.shape[1], chunk, *keep.expand_as(write).stride(), KEEP=wants_keep, **options,
            )  # fmt: skip
        for whole, part in zip(grads, parts, strict=True):
            if part is not whole:
                torch.sum(part, dim=0, out=whole)


def _no_holes(tensors: list[Tensor | None]) -> list[Tensor]:
    """Some tensor, which will not be looked at, where there is None."""
    return [tensors[0] if tensor is None else tensor for tensor in tensors]


def grid_and_options(slots: Tensor, gru: bool) -> tuple[tuple[int, int], dict[str, int | bool]]:
    """How many programs there are, along B*N and along the columns of a state, and the options of each."""
    batch, heads, number, width = slots.shape
    count, size = _block(slots, gru)
    # As few threads as hold the state, or a third of the cell's weights, in registers without spilling, since they wait for
    # each other at every sum: checked with `cuobjdump -res-usage` on what triton makes of these kernels for sm_90.
    warps = max(1, count * size // 512, size * size // 4_096 if gru else 0)
    options = {"GRU": gru, "S": number, "d": width, "BS": count, "BD": size, "num_warps": warps}
    return (batch * heads, -(-width // size)), options


def _block(slots: Tensor, gru: bool) -> tuple[int, int]:
    """Slots and numbers of each that a program has."""
    count, size = (power_of_two(n) for n in slots.shape[2:])
    return count, size if gru else max(1, min(size, COLUMNS, MAX_STATE // count))


def power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()

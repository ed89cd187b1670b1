"""Both cells in Triton on a GPU, with gradients: `scan_triton`. Needs triton, which torch brings along for CUDA."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from .fused import run_fused
from .reference import scan_reference
from .types import CellWeights, ScanInputs

MAX_STATE = 8_192  # numbers of a head's state, rounded up to powers of two, that stay in registers
MAX_GRU_SIZE = 128  # likewise for the 3 d x d weights of a gru cell


def scan_triton(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None = None) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `scan_reference`. Computes in float32, or in float64 where an input is float64."""
    return run_fused(_Triton(), inputs, slots, cell)


def fits(slots: Tensor, cell: CellWeights | None) -> bool:
    """Whether the state of a head, and the weights of its cell, stay in registers."""
    count, size = (_power_of_two(n) for n in slots.shape[2:])
    return count * size <= MAX_STATE and (cell is None or size <= MAX_GRU_SIZE)


@functools.cache
def works(device: torch.device, gru: bool) -> bool:
    """Whether this device gives what the reference gives, outputs and gradients: found out once, on a small example.

    A GPU too old, or a triton too new, is a warning and the plain form, not an error in the middle of a conversation.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    batch, length, heads, count, size = 2, 19, 2, 5, 12
    fields = [2 * random(batch, length, heads, 3 * size if gru else size) - 1]
    fields += [random(batch, length, heads, count) for _ in range(4)]
    tensors = [*fields, random(batch, heads, count, size)]
    if gru:
        tensors += [random(heads, 3 * size, size) - 0.5, random(heads, 3 * size) - 0.5]
    try:
        with torch.enable_grad():
            got, wanted = (_outputs_and_gradients(form, tensors) for form in (scan_triton, scan_reference))
        error = max((a - b).abs().max().item() / (1 + b.abs().max().item()) for a, b in zip(got, wanted))
        if error <= 1e-4:
            return True
        reason = f"its results are off by {error:.1e}"
    except Exception as problem:  # whatever a compiler or a driver may raise
        reason = f"{type(problem).__name__}: {problem}"
    warnings.warn(
        f"the Triton form of the memory does not work on {device}, the plain form runs instead ({reason}). Another "
        "version of triton may help",
        RuntimeWarning,
        stacklevel=2,
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
        options = _options(slots, gru=tensors[6] is not None)
        with torch.cuda.device_of(slots):
            scan_forward[slots.shape[0] * slots.shape[1],](
                values, address, write, keep, query, slots, weight, bias, reads, after, saved, borders,
                write.shape[1], slots.shape[1], chunk, *keep.expand_as(write).stride(),
                SAVE=borders.shape[1] > 0, **options,
            )  # fmt: skip

    def backward(
        self, tensors: list[Tensor | None], saved: Tensor, borders: Tensor, chunk: int, grads: list[Tensor]
    ) -> None:
        from .triton_kernels import scan_backward

        values, address, write, keep, query, slots, weight, _ = _no_holes(tensors)
        options = _options(slots, gru=tensors[6] is not None)
        held = slots.new_empty(slots.shape[0] * slots.shape[1], chunk, *slots.shape[2:])
        wants_keep = grads[5].numel() > 0
        with torch.cuda.device_of(slots):
            scan_backward[slots.shape[0] * slots.shape[1],](
                values, address, write, keep, query, weight, saved, borders, held, *_no_holes(grads),
                write.shape[1], slots.shape[1], chunk, *keep.expand_as(write).stride(), KEEP=wants_keep, **options,
            )  # fmt: skip


def _no_holes(tensors: list[Tensor | None]) -> list[Tensor]:
    """Some tensor, which will not be looked at, where there is None."""
    return [tensors[0] if tensor is None else tensor for tensor in tensors]


def _options(slots: Tensor, gru: bool) -> dict[str, int | bool]:
    count, size = (_power_of_two(n) for n in slots.shape[2:])
    # As few threads as hold the state, or a third of the cell's weights, in registers without spilling: checked with
    # `cuobjdump -res-usage` on what triton makes of these kernels for sm_90.
    warps = max(count * size // 512, size * size // 1024 if gru else 0)
    return {
        "GRU": gru, "S": slots.shape[2], "d": slots.shape[3], "BS": count, "BD": size, "num_warps": min(16, max(1, warps)),
    }  # fmt: skip


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()

"""Both cells in machine code on a CPU, with gradients: `scan_compiled`. Needs numba."""

from __future__ import annotations

from torch import Tensor

from . import kernels
from .fused import run_fused
from .threads import share
from .types import CellWeights, ScanInputs

SMALL_WEIGHT_BYTES = 16_384
WORK_PER_THREAD = 100_000  # updates of a number in a slot; below it a second thread costs more than it brings


def scan_compiled(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None = None) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `scan_reference`. Computes in float32, or in float64 where an input is float64."""
    return run_fused(_Numba(), inputs, slots, cell)


class _Numba:
    def forward(
        self, tensors: list[Tensor | None], reads: Tensor, after: Tensor, saved: Tensor, borders: Tensor, chunk: int
    ) -> None:
        values, address, write, keep, query, slots, weight, bias = tensors
        borders = borders.view(*borders.shape[:2], slots.shape[3], slots.shape[2])  # these kernels turn states round
        if weight is None:
            arrays = [values, write, keep, query, slots, reads, after, borders, chunk]
            _share(kernels.mingru_forward, arrays, slots, write.shape[1])
        else:
            arrays = [values, address, write, keep, query, slots, weight, bias, reads, after, saved, borders, chunk]
            _share(kernels.gru_forward, [*arrays, _heads_together(weight)], slots, write.shape[1])

    def backward(
        self, tensors: list[Tensor | None], saved: Tensor, borders: Tensor, chunk: int, grads: list[Tensor]
    ) -> None:
        values, address, write, keep, query, slots, weight, _ = tensors
        grad_reads, grad_after, grad_values, grad_address, *rest, grad_recurrent = grads
        borders = borders.view(*borders.shape[:2], slots.shape[3], slots.shape[2])
        if weight is None:
            arrays = [values, write, keep, query, borders, chunk, grad_reads, grad_after, grad_values, *rest]
            _share(kernels.mingru_backward, arrays, slots, write.shape[1])
        else:
            arrays = [values, address, write, keep, query, weight, saved, borders, chunk, grad_reads, grad_after]
            arrays += [grad_values, grad_address, *rest, grad_recurrent, _heads_together(weight)]
            _share(kernels.gru_backward, arrays, slots, write.shape[1])


def _share(kernel, arrays: list, slots: Tensor, length: int) -> None:
    arrays = [array.numpy() if isinstance(array, Tensor) else array for array in arrays]
    batch, heads, count, size = slots.shape
    work = length * count * size
    share(lambda first, last: kernel(*arrays, first, last), batch * heads, -(-WORK_PER_THREAD // work))


def _heads_together(weight: Tensor) -> int:
    """As many heads as there are if the weights of all fit the cache nearest to the core, else one after the other."""
    return len(weight) if weight.numel() * weight.element_size() <= SMALL_WEIGHT_BYTES else 1

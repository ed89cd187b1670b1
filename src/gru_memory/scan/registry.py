"""Which form of the recurrence runs: the first in the table that can."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from .chunked import scan_chunked
from .reference import scan_one, scan_reference
from .types import CellWeights, ScanInputs

_warned: set[str] = set()


class Form(NamedTuple):
    """One way to run the recurrence."""

    can: Callable[[ScanInputs, Tensor, CellWeights | None], bool]
    run: Callable[[ScanInputs, Tensor, CellWeights | None], tuple[Tensor, Tensor]]


def _is_one_token(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None) -> bool:
    return inputs.address.shape[1] == 1


def can_compile(tensor: Tensor) -> bool:
    """Whether compiled code can work on this tensor; warns once if only numba is missing, or does not work here."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or tensor.numel() == 0:
        return False
    if find_spec("numba") is None:
        _warn_once("the memory runs slowly on this CPU without numba: pip install 'gru-memory[fast]'")
        return False
    return _numba_works()


@functools.cache
def _numba_works() -> bool:
    """Whether numba can be imported and compiles: found out once, on the smallest kernel."""
    try:
        from .kernels import try_out

        try_out()
    except Exception as error:  # whatever a numba does that does not fit this NumPy, this LLVM or this machine
        _warn_once(f"the memory runs slowly on this CPU: numba does not work here ({type(error).__name__}: {error})")
        return False
    return True


def _can_compile(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None) -> bool:
    return can_compile(slots)


def _run_compiled(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None) -> tuple[Tensor, Tensor]:
    from .compiled import scan_compiled  # numba takes half a second to import

    return scan_compiled(inputs, slots, cell)


def can_triton(tensor: Tensor) -> bool:
    """Whether Triton is there and can work on this tensor; warns once if only Triton is missing."""
    if tensor.device.type != "cuda" or torch.compiler.is_compiling() or tensor.numel() == 0:
        return False
    if find_spec("triton") is None:
        _warn_once("the memory runs slowly on this GPU without triton: pip install 'gru-memory[gpu]'")
        return False
    return True


def _can_triton(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None) -> bool:
    if not can_triton(slots):
        return False
    from .triton_form import MAX_GRU_SIZE, MAX_STATE, fits, works

    if fits(slots, cell):
        return works(slots.device, cell is not None)
    if cell is not None:
        _warn_once(
            f"the memory runs token by token on this GPU: {tuple(slots.shape[2:])} numbers of slots are more than the "
            f"Triton form of the gru cell holds ({MAX_STATE:,} a head, {MAX_GRU_SIZE} a slot)"
        )
    return False


def _run_triton(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None) -> tuple[Tensor, Tensor]:
    from .triton_form import scan_triton

    return scan_triton(inputs, slots, cell)


def _is_mingru(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None) -> bool:
    return cell is None


def _always(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None) -> bool:
    return True


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


FORMS: dict[str, Form] = {
    "one": Form(_is_one_token, scan_one),
    "compiled": Form(_can_compile, _run_compiled),
    "triton": Form(_can_triton, _run_triton),
    "chunked": Form(_is_mingru, scan_chunked),
    "reference": Form(_always, scan_reference),
}


def pick_form(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None = None) -> str:
    """Name of the first form in `FORMS` that can run these inputs."""
    return next(name for name, form in FORMS.items() if form.can(inputs, slots, cell))


def scan(
    inputs: ScanInputs, slots: Tensor, cell: CellWeights | None = None, form: str | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, in the fastest form for these inputs or in the one named. Otherwise as `scan_reference`."""
    if form is not None and form not in FORMS:
        raise ValueError(f"form is {form!r}: choose one of {tuple(FORMS)}")
    if inputs.address.shape[1] == 0:
        return slots.new_empty(*inputs.address.shape[:3], slots.shape[-1]), slots
    return FORMS[form or pick_form(inputs, slots, cell)].run(inputs, slots, cell)

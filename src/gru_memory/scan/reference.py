"""The recurrence step by step: what every other form must equal, and the shortest form for a single token."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import CellWeights, ScanInputs


def gru_cell(values: Tensor, content: Tensor, cell: CellWeights) -> Tensor:
    """`torch.nn.GRUCell` with the input half already applied. values (B, N, 3d), content (B, N, d) -> (B, N, d)."""
    recurrent = torch.einsum("bnd,nkd->bnk", content, cell.weight) + cell.bias  # (B, N, 3d)
    reset_in, update_in, new_in = values.chunk(3, dim=-1)
    reset_h, update_h, new_h = recurrent.chunk(3, dim=-1)
    update = torch.sigmoid(update_in + update_h)
    new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_h) * new_h)
    return new + update * (content - new)


def step(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None) -> tuple[Tensor, Tensor]:
    """One step. Every field of `inputs` without its T axis; slots (B, N, S, d). Returns (read (B, N, d), slots)."""
    held = inputs.keep.unsqueeze(-1) * slots  # H~ (B, N, S, d)
    if cell is None:
        content = inputs.values
    else:
        stored = torch.einsum("bns,bnsd->bnd", inputs.address, held)
        content = gru_cell(inputs.values, stored, cell)
    slots = held + inputs.write.unsqueeze(-1) * (content.unsqueeze(-2) - held)
    return torch.einsum("bns,bnsd->bnd", inputs.query, slots), slots


def scan_reference(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None = None) -> tuple[Tensor, Tensor]:
    """Step by step.

    Args:
        inputs: see `ScanInputs`.
        slots: (B, N, S, d) state before the first token.
        cell: weights of the `gru` cell, or None for `mingru`.

    Returns:
        reads (B, T, N, d) and the state after the last token (B, N, S, d).
    """
    reads = []
    # Not field[:, t], whose gradient is a tensor as large as all of `field` at every step.
    for fields in zip(*(field.unbind(1) for field in inputs), strict=True):
        read, slots = step(ScanInputs(*fields), slots, cell)
        reads.append(read)
    return torch.stack(reads, dim=1), slots


def scan_one(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None = None) -> tuple[Tensor, Tensor]:
    """The same for a single token, T = 1."""
    read, slots = step(ScanInputs(*(field[:, 0] for field in inputs)), slots, cell)
    return read.unsqueeze(1), slots

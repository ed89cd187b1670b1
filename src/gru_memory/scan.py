"""The recurrence of one memory site: a plain reference and fast forms, one signature.

This is the only module that knows how the recurrence is run. Shapes: B batch, T tokens, N heads, S slots a head,
d slot size. For every head on its own, with `keep` the decay of the step (1 where the clock does not tick):

    H~_s = keep_{t,s} * H_{t-1,s}                       decay
    C_t  = cell(value_t, sum_s a_{t,s} H~_s)            new content, given what is stored where we write
    H_s  = H~_s + z_{t,s} (C_t - H~_s)                  convex update, z = strength * address: |H| <= 1 for ever
    o_t  = sum_s r_{t,s} H_{t,s}                        read

The `gru` cell is a GRU cell on the addressed content, i.e. on what a Neural Turing Machine (arXiv:1410.5401) would
read where it is about to write. The `mingru` cell is `C_t = tanh(value_t)` with z as its update gate: no gate looks at
H (arXiv:2410.01201), so the recurrence is linear in H and runs in chunks of matrix products, as gated linear attention
does (arXiv:2312.06635).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_TOKENS = 8
BLOCK_TOKENS = 1024  # bounds the memory of the chunked form


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
    """Step by step: what every other form must equal.

    Args:
        inputs: see `ScanInputs`.
        slots: (B, N, S, d) state before the first token.
        cell: weights of the `gru` cell, or None for `mingru`.

    Returns:
        reads (B, T, N, d) and the state after the last token (B, N, S, d).
    """
    reads = []
    for t in range(inputs.address.shape[1]):
        read, slots = step(ScanInputs(*(field[:, t] for field in inputs)), slots, cell)
        reads.append(read)
    return torch.stack(reads, dim=1), slots


def scan_chunked(inputs: ScanInputs, slots: Tensor, cell: None = None) -> tuple[Tensor, Tensor]:
    """`mingru` in chunks of matrix products. Same arguments and results as `scan_reference`.

    Inside a chunk the weight of token u's content in token t's read is `sum_s r_ts exp(L_ts - L_us) z_us` with L the
    running sum of log kept. The differences are taken before the exponential, so nothing overflows whatever the decay.
    """
    if cell is not None:
        raise ValueError("the chunked form is for cell='mingru'; the gru cell depends on its state at every step")
    reads = []
    fields = (inputs.values, inputs.write, inputs.keep, inputs.query)
    for block in zip(*(field.split(BLOCK_TOKENS, dim=1) for field in fields), strict=True):
        read, slots = _scan_block(*block, slots)
        reads.append(read)
    return (reads[0] if len(reads) == 1 else torch.cat(reads, dim=1)), slots


def _scan_block(values: Tensor, write: Tensor, keep: Tensor, query: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """All chunks of a block at once; only the slots at the K chunk borders are computed one after the other."""
    length = values.shape[1]
    # log1p: rounding 1 - write, the same way at every step, would add up to |H| > 1. A write of 1 keeps one ulp of
    # what was there, so that the logarithm stays finite.
    log_kept = keep.log() + torch.log1p(-write.clamp_max(1 - torch.finfo(write.dtype).eps / 2))  # (B, T, N, S)
    log_kept, write, query, values = (_into_chunks(field) for field in (log_kept, write, query, values))
    total = log_kept.cumsum(dim=3)  # L (B, N, K, c, S)
    past = torch.ones(total.shape[3], total.shape[3], dtype=torch.bool, device=total.device).tril()
    between = total.unsqueeze(4) - total.unsqueeze(3)  # L_t - L_u (B, N, K, c, c, S)
    between = torch.where(past.unsqueeze(-1), between, -torch.inf).exp()
    weights = torch.einsum("bnktus,bnkts,bnkus->bnktu", between, query, write)
    left = (total[..., -1:, :] - total).exp() * write  # what of each token is left at the chunk's end (B, N, K, c, S)
    added = left.transpose(3, 4) @ values  # (B, N, K, S, d)
    kept = total[..., -1, :].exp().unsqueeze(-1)  # (B, N, K, S, 1)
    starts = []
    for chunk_kept, chunk_added in zip(kept.unbind(2), added.unbind(2), strict=True):
        starts.append(slots)
        slots = chunk_kept * slots + chunk_added
    reads = weights @ values + (query * total.exp()) @ torch.stack(starts, dim=2)  # (B, N, K, c, d)
    return reads.flatten(2, 3)[:, :, :length].movedim(1, 2), slots


def _into_chunks(field: Tensor) -> Tensor:
    """(B, T, N, X) -> (B, N, K, c, X); zeros fill the last chunk: kept whole (log 0) and never written."""
    short = -field.shape[1] % CHUNK_TOKENS
    return F.pad(field, (0, 0, 0, 0, 0, short)).movedim(1, 2).unflatten(2, (-1, CHUNK_TOKENS))


def scan(inputs: ScanInputs, slots: Tensor, cell: CellWeights | None = None) -> tuple[Tensor, Tensor]:
    """The fastest form for these shapes. Arguments and results as in `scan_reference`."""
    if inputs.address.shape[1] == 1:
        read, slots = step(ScanInputs(*(field[:, 0] for field in inputs)), slots, cell)
        return read.unsqueeze(1), slots
    if cell is None:
        return scan_chunked(inputs, slots)
    return scan_reference(inputs, slots, cell)

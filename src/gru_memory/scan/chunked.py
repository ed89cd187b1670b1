"""`mingru` in chunks of matrix products, in plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .types import ScanInputs, precision

CHUNK_TOKENS = 8
BLOCK_TOKENS = 1024  # bounds the memory of the chunked form


def scan_chunked(inputs: ScanInputs, slots: Tensor, cell: None = None) -> tuple[Tensor, Tensor]:
    """`mingru` in chunks of matrix products. Same arguments and results as `scan_reference`, in float32 at least.

    Inside a chunk the weight of token u's content in token t's read is `sum_s r_ts exp(L_ts - L_us) z_us` with L the
    running sum of log kept. The differences are taken before the exponential, so nothing overflows whatever the decay.
    """
    if cell is not None:
        raise ValueError("the chunked form is for cell='mingru'; the gru cell depends on its state at every step")
    result, dtype = precision((*inputs, slots))
    reads, slots = [], slots.to(dtype)
    fields = [field.to(dtype) for field in (inputs.values, inputs.write, inputs.keep, inputs.query)]
    for block in zip(*(field.split(BLOCK_TOKENS, dim=1) for field in fields), strict=True):
        read, slots = _scan_block(*block, slots)
        reads.append(read)
    return (reads[0] if len(reads) == 1 else torch.cat(reads, dim=1)).to(result), slots.to(result)


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

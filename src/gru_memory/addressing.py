"""Addressing by content: a memory that finds the place for every write, and what every read is closest to, in its own slots.

The signature of a slot says under which key it was written. A write goes, whole, to the slot that holds least (the least
used one, as in Santoro et al. 2016, arXiv:1605.06065, and Graves et al., "Hybrid computing using a neural network with dynamic
external memory", 2016). The first token of what is told takes away what was written under the same key before it, as a
correction does, and the tokens after it go on with that; others replace nothing, since the key of a later token says little
more than the token before it. A read is attention over the signatures.

With K_s the signature of slot s, k_t what is written at token t (both in [-1, 1]^f), q_t what is asked for there, b_t the
strength and p_t how surely the token is told, the head's index left out:

    fade       K~_s = lambda K_s
    replace    e_t = b_t m_{t-1} clamp((cos(K~_o, k_t) - c_0) / (c_1 - c_0), 0, 1),  o = argmax_s cos(K~_s, k_t);  K~_o *= 1 - e_t
               (the first of those that are alike to one part in 65,536)
               m_t = max(1 - p_t, e_t)
    write      s* = argmin_s |K~_s|;  K_{s*} = K~_{s*} + b_t (k_t - K~_{s*})
    read       r_t = softmax_s(sharpness * K_s . q_t)

All of it becomes inputs of the recurrence in `scan`: a write address that is 1 at s*, a decay that counts what was replaced,
and a read address. An empty slot has the logit 0 and holds nothing. No gradient goes through the choice of a place.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .scan import can_compile, can_triton
from .scan.fused import without_copies
from .scan.threads import share

SAME_KEY = (0.84, 0.92)  # c_0 and c_1: the cosines between which two keys are more and more the same one
# One part of this many of a cosine, and slots that differ by less are alike, of which the first is replaced: after a token that
# came twice, which of its slots is likest would be a matter of rounding.
ALIKE = 65_536
NO_WRITE = 0.05  # strength up to which nothing is written at all
_MOST_ON_A_GPU = 32_768  # numbers of a head's signatures, rounded up to powers of two, that stay in registers of a GPU
_NO_DIRECTION = 1e-12  # product of two squared lengths, up to which nothing is said to point the same way


class Places(NamedTuple):
    """Where a stretch of tokens writes and reads: three fields of `scan.ScanInputs`, each (B, T, N, S), and m after it."""

    address: Tensor
    keep: Tensor
    query: Tensor
    replacing: Tensor  # (B, N)


class Lookup(NamedTuple):
    """What has to be placed."""

    written: Tensor  # (B, T, N, f) signatures of what is written
    strength: Tensor  # (B, T, N) in [0, 1]; 0 writes nothing
    told: Tensor  # (B, T, N) in [0, 1], how surely each token is told
    mask: Tensor  # (B, T) bool, False where the memory holds; the strength is 0 and the decay 1 there
    keep: Tensor  # (B, T, N, S) decay of every step
    asked: Tensor  # (B, T, N, f) signatures that are asked for
    sharpness: Tensor  # of reading, a scalar


def find_places(lookup: Lookup, signatures: Tensor, replacing: Tensor) -> Places:
    """Places for every token, in the fastest form.

    Args:
        lookup: see `Lookup`.
        signatures: (B, N, S, f) of the slots before the first token.
        replacing: (B, N) m before the first token.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*lookup, signatures)):
        return find_places_in_parallel(lookup, signatures, replacing)
    if can_compile(signatures):
        return find_places_compiled(lookup, signatures, replacing)
    if can_triton(signatures) and fits_a_gpu(signatures) and works_on(signatures.device):
        return find_places_triton(lookup, signatures, replacing)
    return find_places_step_by_step(lookup, signatures, replacing)


def find_places_step_by_step(lookup: Lookup, signatures: Tensor, replacing: Tensor) -> Places:
    """The equations above, as they stand: what every other form must equal."""
    places = []
    for written, strength, told, mask, keep, asked in zip(*(field.unbind(1) for field in lookup[:-1]), strict=True):
        address, keep, replaced = _place(written, strength * replacing, keep, signatures)
        replacing = torch.where(mask.unsqueeze(-1), torch.maximum(1 - told.detach(), replaced), replacing)
        write = (strength.unsqueeze(-1) * address).unsqueeze(-1)  # (B, N, S, 1)
        held = keep.unsqueeze(-1) * signatures
        signatures = held + write * (written.unsqueeze(-2) - held)
        logits = lookup.sharpness * torch.einsum("bnsf,bnf->bns", signatures, asked)
        places.append((address, keep, logits.softmax(dim=-1)))
    return Places(*(torch.stack(field, dim=1) for field in zip(*places, strict=True)), replacing)


@torch.no_grad()
def _place(written: Tensor, replaces: Tensor, keep: Tensor, signatures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Address and decay (B, N, S) of one token, and how much it replaced (B, N)."""
    held = keep.unsqueeze(-1) * signatures
    product = torch.einsum("bnsf,bnf->bns", held, written)
    sizes = held.pow(2).sum(-1) * written.pow(2).sum(-1, keepdim=True)
    likeness = product * sizes.clamp_min(_NO_DIRECTION).rsqrt()
    old = torch.floor(likeness * ALIKE + 0.5).argmax(dim=-1)
    likeness = likeness.gather(-1, old.unsqueeze(-1)).squeeze(-1)
    first, last = SAME_KEY
    replaced = replaces * ((likeness - first) / (last - first)).clamp(0, 1)
    stays = 1 - F.one_hot(old, keep.shape[-1]).to(keep.dtype) * replaced.unsqueeze(-1)
    amount = (held * stays.unsqueeze(-1)).pow(2).sum(-1)
    address = F.one_hot(amount.argmin(dim=-1), amount.shape[-1]).to(keep.dtype)
    return address, keep * stays, replaced


def find_places_compiled(lookup: Lookup, signatures: Tensor, replacing: Tensor) -> Places:
    """The same in machine code, on a CPU and without gradients."""
    from .scan.place_kernels import find  # numba takes half a second to import

    dtype = signatures.dtype
    written, strength, told, asked = (
        field.detach().to(dtype).contiguous() for field in (lookup.written, lookup.strength, lookup.told, lookup.asked)
    )
    keep, signatures = without_copies(lookup.keep.detach()).to(dtype), signatures.detach().contiguous()
    batch, heads, count = signatures.shape[:3]
    replacing = replacing.detach().to(dtype).clone()
    places = [signatures.new_empty(*strength.shape, count) for _ in range(3)]
    numbers = signatures.numpy().dtype.type(lookup.sharpness.detach().item()), rules(dtype).numpy()
    arrays = [tensor.numpy() for tensor in (written, strength, told, lookup.mask, keep, asked)]
    outcomes = [tensor.numpy() for tensor in (*places, replacing)]
    share(lambda first, last: find(*arrays, *numbers, signatures.numpy(), *outcomes, first, last), batch * heads)
    return Places(*places, replacing)


def find_places_triton(lookup: Lookup, signatures: Tensor, replacing: Tensor) -> Places:
    """The same in one launch on a GPU, without gradients."""
    from .scan.triton_place_kernels import find

    dtype = signatures.dtype
    written, strength, told, asked, mask = (
        field.detach().to(dtype).contiguous()
        for field in (lookup.written, lookup.strength, lookup.told, lookup.asked, lookup.mask)
    )
    keep, sharpness = lookup.keep.detach().to(dtype), lookup.sharpness.detach().to(dtype)
    batch, heads, count = signatures.shape[:3]
    replacing = replacing.detach().to(dtype).clone()
    address, kept, query = (signatures.new_empty(*strength.shape, count) for _ in range(3))
    with torch.cuda.device_of(signatures):
        find[batch * heads,](
            written, strength, told, mask, keep, asked, sharpness, signatures.detach().transpose(2, 3).contiguous(),
            address, kept, query, replacing, strength.shape[1], heads, *keep.expand_as(address).stride(),
            **launch_options(signatures),
        )  # fmt: skip
    return Places(address, kept, query, replacing)


def launch_options(signatures: Tensor) -> dict[str, int | float]:
    """Of the kernel on a GPU, for signatures (B, N, S, f): as few threads as hold them in registers without spilling."""
    from .scan.triton_form import power_of_two

    count, size = signatures.shape[2:]
    block, width = power_of_two(count), power_of_two(size)
    return {
        "S": count, "f": size, "BS": block, "BF": width, "BEGINS": SAME_KEY[0], "ENDS": SAME_KEY[1], "LEAST": _NO_DIRECTION,
        "ALIKE": ALIKE,
        "num_warps": min(16, max(1, block * width // 4_096)),
    }  # fmt: skip


def fits_a_gpu(signatures: Tensor) -> bool:
    """Whether the signatures of a head (B, N, S, f) stay in registers there."""
    from .scan.triton_form import power_of_two

    return power_of_two(signatures.shape[2]) * power_of_two(signatures.shape[3]) <= _MOST_ON_A_GPU


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether this device finds the places that are found step by step: found out once, on a small example."""
    from .scan.triton_form import agree

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    written = 2 * random(2, 19, 2, 12) - 1
    written[:, 10:] = written[:, :9]
    mask = random(2, 19) < 0.9
    strength, told = (random(2, 19, 2) * mask.unsqueeze(-1) for _ in range(2))
    keep = torch.where(mask[..., None, None], 0.9, 1.0).expand(2, 19, 2, 5)
    lookup = Lookup(
        written, strength, told, mask, keep, 2 * random(2, 19, 2, 12) - 1, torch.tensor([3.0], device=device)
    )
    before = torch.zeros(2, 2, 5, 12, device=device), torch.ones(2, 2, device=device)
    return agree(lambda: [form(lookup, *before) for form in (find_places_triton, find_places_step_by_step)], device)


def rules(dtype: torch.dtype) -> Tensor:
    """What compiled code goes by: c_0, c_1, the least product of two squared lengths that have a direction, `NO_WRITE`, `ALIKE`."""
    return torch.tensor([*SAME_KEY, _NO_DIRECTION, NO_WRITE, ALIKE], dtype=dtype, device="cpu")


def find_places_in_parallel(lookup: Lookup, signatures: Tensor, replacing: Tensor) -> Places:
    """The same with gradients, in matrix products over all tokens once it is known which slot each is written to.

    A slot is a weighted sum of what was written to it, so its logit is that sum of the products of keys and queries.
    """
    with torch.no_grad():
        address, keep, _, replacing = find_places(
            Lookup(*(field.detach() for field in lookup)), signatures.detach(), replacing
        )
    write = lookup.strength.unsqueeze(-1) * address  # (B, T, N, S)
    # Of what was there at the beginning: sums of thousands, whose differences count.
    left = torch.log((keep * (1 - write)).clamp_min(1e-7)).cumsum(dim=1, dtype=torch.float64)
    most = max(1, int((lookup.strength > 0).sum(dim=1).max()))  # J, tokens of a row and head that write
    at = (lookup.strength > 0).int().argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, J, N)
    strength = lookup.strength.gather(1, at)
    slot = address.argmax(dim=-1).gather(1, at)  # (B, J, N)
    written = lookup.written.gather(1, at.unsqueeze(-1).expand(-1, -1, -1, lookup.written.shape[-1]))
    # Of what token j wrote there is left at token t what the slot has lost since.
    own = left.gather(3, slot.permute(0, 2, 1).unsqueeze(1).expand(-1, left.shape[1], -1, -1))  # (B, T, N, J)
    at = at.permute(0, 2, 1)  # (B, N, J)
    then = own.permute(0, 2, 3, 1).gather(3, at.unsqueeze(-1)).squeeze(-1)  # (B, N, J)
    time = torch.arange(left.shape[1], device=left.device)
    weight = strength.permute(0, 2, 1).unsqueeze(1) * torch.exp((own - then.unsqueeze(1)).clamp_max(0).to(strength))
    weight = weight * (at.unsqueeze(1) <= time[:, None, None])
    agreement = weight * torch.einsum("btnf,bjnf->btnj", lookup.asked, written)
    before = left.to(strength).exp() * torch.einsum("btnf,bnsf->btns", lookup.asked, signatures)
    logits = before.scatter_add(3, slot.permute(0, 2, 1).unsqueeze(1).expand_as(agreement), agreement)
    return Places(address, keep, (lookup.sharpness * logits).softmax(dim=-1), replacing)

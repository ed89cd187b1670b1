"""Machine code for addressing by content on a CPU (`gru_memory.addressing`), compiled by numba: row by row, head by head."""

from __future__ import annotations

import math

import numpy as np

from .kernels import _compiled


@_compiled
def _dot(a, b):
    total = a.dtype.type(0)
    for j in range(a.shape[0]):
        total += a[j] * b[j]
    return total


@_compiled
def place(slots, amount, left, key, strength, replacing, asked, sharpness, same, address, query):
    """One token of one head: where it is written and what it finds. Returns how much it replaced.

    slots (S, f) holds the signatures and amount (S,) their squared lengths; both become those after the token. left (S,) is
    the decay of the token, and what is replaced is taken off it. key, asked (f,). Fills address and query (S,).
    """
    zero = slots.dtype.type(0)
    one = slots.dtype.type(1)
    half = slots.dtype.type(0.5)
    begins, ends, least, alike = same[0], same[1], same[2], same[4]
    count, width = slots.shape
    for s in range(count):
        address[s] = zero
        if left[s] != one and amount[s] != zero:
            for j in range(width):
                slots[s, j] *= left[s]
            amount[s] *= left[s] * left[s]
    replaced = zero
    if strength * replacing > zero:
        size, likest, closest, old = _dot(key, key), begins, -alike, -1
        for s in range(count):
            if amount[s] == zero:
                continue
            likeness = _dot(slots[s], key) / math.sqrt(max(amount[s] * size, least))
            level = math.floor(likeness * alike + half)
            if level > closest:
                likest, closest, old = likeness, level, s
        if old >= 0 and likest > begins:
            replaced = strength * replacing * min((likest - begins) / (ends - begins), one)
            stays = one - replaced
            for j in range(width):
                slots[old, j] *= stays
            amount[old] *= stays * stays
            left[old] *= stays
    free = 0
    for s in range(1, count):
        if amount[s] < amount[free]:
            free = s
    address[free] = one
    if strength > zero:
        for j in range(width):
            slots[free, j] += strength * (key[j] - slots[free, j])
        amount[free] = _dot(slots[free], slots[free])
    for s in range(count):
        query[s] = sharpness * _dot(slots[s], asked) if amount[s] != zero else zero
    most = query[0]
    for s in range(1, count):
        most = max(most, query[s])
    total = zero
    for s in range(count):
        query[s] = math.exp(query[s] - most)
        total += query[s]
    for s in range(count):
        query[s] /= total
    return replaced


@_compiled
def squared_lengths(slots, amount):
    """Of the rows of slots (S, f), into amount (S,)."""
    for s in range(slots.shape[0]):
        amount[s] = _dot(slots[s], slots[s])


@_compiled
def find(
    written, strength, told, mask, keep, asked, sharpness, same, signatures, address, kept, query, replacing, first, last
):  # fmt: skip
    """Fill address, kept and query (B, T, N, S), and bring replacing (B, N) up to date, for the heads `first` to `last` of all B*N.

    written, asked (B, T, N, f); strength, told (B, T, N); mask (B, T); keep (B, T, N or 1, S or 1); signatures (B, N, S, f);
    same: `gru_memory.addressing.rules`.
    """
    length, heads, count = address.shape[1:]
    one = signatures.dtype.type(1)
    amount = np.empty(count, signatures.dtype)
    for item in range(first, last):
        row, head = divmod(item, heads)
        slots = signatures[row, head].copy()
        squared_lengths(slots, amount)
        for t in range(length):
            decay = keep[row, t, head % keep.shape[2]]
            left = kept[row, t, head]
            for s in range(count):
                left[s] = decay[s % decay.shape[0]]
            replaced = place(
                slots, amount, left, written[row, t, head], strength[row, t, head], replacing[row, head],
                asked[row, t, head], sharpness, same, address[row, t, head], query[row, t, head],
            )  # fmt: skip
            if mask[row, t]:
                replacing[row, head] = max(one - told[row, t, head], replaced)

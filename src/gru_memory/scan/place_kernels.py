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
def find(written, strength, replaces, keep, asked, sharpness, same, signatures, address, kept, query, first, last):
    """Fill address, kept and query (B, T, N, S) for the heads `first` to `last` of all B*N.

    written, asked (B, T, N, f); strength, replaces (B, T, N); keep (B, T, N or 1, S or 1); signatures (B, N, S, f);
    same: from where on, up to where two keys are the same one, and the least product of two lengths that have a direction.
    """
    length, heads, count = address.shape[1:]
    zero = signatures.dtype.type(0)
    one = signatures.dtype.type(1)
    begins, ends, least = same
    amount = np.empty(count, signatures.dtype)  # |K_s|^2
    for item in range(first, last):
        row, head = divmod(item, heads)
        slots = signatures[row, head].copy()
        for s in range(count):
            amount[s] = _dot(slots[s], slots[s])
        for t in range(length):
            decay = keep[row, t, head % keep.shape[2]]
            left = kept[row, t, head]
            for s in range(count):
                left[s] = decay[s % decay.shape[0]]
                if left[s] != one and amount[s] != zero:
                    for j in range(slots.shape[1]):
                        slots[s, j] *= left[s]
                    amount[s] *= left[s] * left[s]
            z = strength[row, t, head]
            key = written[row, t, head]
            gone = replaces[row, t, head]
            if gone > zero:
                size = _dot(key, key)
                for s in range(count):
                    if amount[s] == zero:
                        continue
                    likeness = _dot(slots[s], key) / math.sqrt(max(amount[s] * size, least))
                    stays = one - gone * min(max((likeness - begins) / (ends - begins), zero), one)
                    if stays < one:
                        for j in range(slots.shape[1]):
                            slots[s, j] *= stays
                        amount[s] *= stays * stays
                        left[s] *= stays
            place = 0
            for s in range(1, count):
                if amount[s] < amount[place]:
                    place = s
            for s in range(count):
                address[row, t, head, s] = zero
            address[row, t, head, place] = one
            if z > zero:
                for j in range(slots.shape[1]):
                    slots[place, j] += z * (key[j] - slots[place, j])
                amount[place] = _dot(slots[place], slots[place])
            found = query[row, t, head]
            most = zero
            for s in range(count):
                found[s] = zero
                if amount[s] != zero:
                    found[s] = sharpness * _dot(slots[s], asked[row, t, head])
                most = max(most, found[s]) if s else found[s]
            total = zero
            for s in range(count):
                found[s] = math.exp(found[s] - most)
                total += found[s]
            for s in range(count):
                found[s] /= total

"""Triton kernel for addressing by content on a GPU (`gru_memory.addressing`): one program a head and row, as in `place_kernels`.

BS and BF are S and f rounded up to powers of two; what lies beyond is masked. Importing this module needs triton.
"""

import triton
import triton.language as tl


@triton.jit
def find(
    written, strength, told, mask, keep, asked, sharpness, signatures, address, kept, query, replacing,
    T, N, keep_b, keep_t, keep_n, keep_s,
    S: tl.constexpr, f: tl.constexpr, BS: tl.constexpr, BF: tl.constexpr,
    BEGINS: tl.constexpr, ENDS: tl.constexpr, LEAST: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Shapes as in `place_kernels.find`, but signatures (B, N, f, S), transposed: sums over f stay within a thread for most part.

    mask (B, T) is a number; keep (B, T, N, S) by its strides; BEGINS, ENDS, LEAST, ALIKE are numbers of `rules`.
    """
    item = tl.program_id(0).to(tl.int64)
    b, n = item // N, item % N
    s, j = tl.arange(0, BS), tl.arange(0, BF)
    in_s, in_j = s < S, j < f
    slots = tl.load(
        signatures + item * S * f + j[:, None] * S + s[None, :], mask=in_j[:, None] & in_s[None, :], other=0.0
    )  # (f, S)
    amount = tl.sum(slots * slots, axis=0)
    replaces = tl.load(replacing + item)
    sharp = tl.load(sharpness)
    for t in range(T):
        row = (b * T + t) * N + n
        b_t = tl.load(strength + row)
        left = tl.load(keep + b * keep_b + t * keep_t + n * keep_n + s * keep_s, mask=in_s, other=1.0)
        if tl.min(left) < 1:
            slots *= left[None, :]
            amount *= left * left
        replaced = b_t * replaces
        if replaced > 0:
            key = tl.load(written + row * f + j, mask=in_j, other=0.0)
            likeness = tl.sum(slots * key[:, None], axis=0) / tl.sqrt(tl.maximum(amount * tl.sum(key * key), LEAST))
            old = tl.argmax(tl.where(in_s, tl.floor(likeness * ALIKE + 0.5), -2.0 * ALIKE), axis=0)
            likest = tl.sum(tl.where(s == old, likeness, 0.0), axis=0)
            replaced *= tl.minimum(tl.maximum((likest - BEGINS) / (ENDS - BEGINS), 0.0), 1.0)
            stays = tl.where(s == old, 1 - replaced, 1.0)
            slots *= stays[None, :]
            amount *= stays * stays
            left *= stays
        free = s == tl.argmin(tl.where(in_s, amount, float("inf")), axis=0)
        if b_t > 0:
            key = tl.load(written + row * f + j, mask=in_j, other=0.0)
            slots += tl.where(free, b_t, 0.0)[None, :] * (key[:, None] - slots)
            amount = tl.where(free, tl.sum(slots * slots, axis=0), amount)
        tl.store(address + row * S + s, free.to(amount.dtype), mask=in_s)
        tl.store(kept + row * S + s, left, mask=in_s)
        question = tl.load(asked + row * f + j, mask=in_j, other=0.0)
        logits = tl.where(in_s, sharp * tl.sum(slots * question[:, None], axis=0), float("-inf"))
        weight = tl.exp(logits - tl.max(logits, axis=0))
        tl.store(query + row * S + s, weight / tl.sum(weight, axis=0), mask=in_s)
        if tl.load(mask + b * T + t) > 0:
            replaces = tl.maximum(1 - tl.load(told + row), replaced)
    tl.store(replacing + item, replaces)

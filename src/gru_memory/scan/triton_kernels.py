"""Triton kernels for the recurrence on a GPU, the state in registers from first token to last.

A program has BS slots of a head and row, S rounded up to a power of two, and BD numbers of each: with the gru cell, d rounded up
likewise; without it any number, since no column of a state looks at another, and the second axis of the grid counts them. What
lies beyond is masked, with keep 1 and everything else 0. GRU tells the cells apart: without it `values` are the content, and
address, weight and bias are not looked at. Everything is computed in the type of the slots. Importing this module needs triton.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _transposed_times(matrix, inside, vector):
    """vector @ matrix, the matrix read anew from the nearest cache: three of them are too large for registers."""
    return tl.sum(tl.load(matrix, mask=inside, other=0.0) * vector[:, None], axis=0)


@triton.jit
def scan_forward(
    values, address, write, keep, query, slots, weight, bias, reads, after, saved, borders,
    T, N, chunk, keep_b, keep_t, keep_n, keep_s,
    S: tl.constexpr, d: tl.constexpr,
    GRU: tl.constexpr, SAVE: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Shapes as in `scan_reference` but weight (N, d, 3d), transposed: sums down a column stay within a thread for most part.

    saved (B, T, N, 6, d) and borders (B*N, chunks, S, d) as in `fused.Backend`; keep (B, T, N, S) by its strides.
    """
    item = tl.program_id(0).to(tl.int64)
    b, n = item // N, item % N
    s, j = tl.arange(0, BS), tl.arange(0, BD)
    if not GRU:
        j += tl.program_id(1) * BD
    in_s, in_j = s < S, j < d
    in_h = in_s[:, None] & in_j[None, :]
    place = s[:, None] * d + j[None, :]  # in a state (S, d)
    state = tl.load(slots + item * S * d + place, mask=in_h, other=0.0)
    chunks = tl.cdiv(T, chunk)
    if GRU:
        in_w = in_j[:, None] & in_j[None, :]
        cell = weight + n * 3 * d * d + j[:, None] * 3 * d + j[None, :]
        b_reset = tl.load(bias + n * 3 * d + j, mask=in_j, other=0.0)
        b_update = tl.load(bias + n * 3 * d + d + j, mask=in_j, other=0.0)
        b_new = tl.load(bias + n * 3 * d + 2 * d + j, mask=in_j, other=0.0)
    for t in range(T):
        row = (b * T + t) * N + n
        if SAVE and t % chunk == 0:
            tl.store(borders + (item * chunks + t // chunk) * S * d + place, state, mask=in_h)
        kept = tl.load(keep + b * keep_b + t * keep_t + n * keep_n + s * keep_s, mask=in_s, other=1.0)
        state = kept[:, None] * state
        if GRU:
            a = tl.load(address + row * S + s, mask=in_s, other=0.0)
            stored = tl.sum(a[:, None] * state, axis=0)
            gate = values + row * 3 * d + j
            reset = tl.load(gate, mask=in_j, other=0.0) + b_reset + _transposed_times(cell, in_w, stored)
            update = tl.load(gate + d, mask=in_j, other=0.0) + b_update + _transposed_times(cell + d, in_w, stored)
            new_h = b_new + _transposed_times(cell + 2 * d, in_w, stored)
            reset, update = tl.sigmoid(reset), tl.sigmoid(update)
            new = _tanh(tl.load(gate + 2 * d, mask=in_j, other=0.0) + reset * new_h)
            content = new + update * (stored - new)
            if SAVE:
                into = saved + row * 6 * d + j
                tl.store(into, content, mask=in_j)
                tl.store(into + d, stored, mask=in_j)
                tl.store(into + 2 * d, reset, mask=in_j)
                tl.store(into + 3 * d, update, mask=in_j)
                tl.store(into + 4 * d, new, mask=in_j)
                tl.store(into + 5 * d, new_h, mask=in_j)
        else:
            content = tl.load(values + row * d + j, mask=in_j, other=0.0)
        z = tl.load(write + row * S + s, mask=in_s, other=0.0)
        state += z[:, None] * (content[None, :] - state)
        q = tl.load(query + row * S + s, mask=in_s, other=0.0)
        tl.store(reads + row * d + j, tl.sum(q[:, None] * state, axis=0), mask=in_j)
    tl.store(after + item * S * d + place, state, mask=in_h)


@triton.jit
def scan_backward(
    values, address, write, keep, query, weight, saved, borders, held, grad_reads, grad_after,
    grad_values, grad_address, grad_write, grad_keep, grad_query, grad_slots, grad_recurrent,
    T, N, chunk, keep_b, keep_t, keep_n, keep_s,
    S: tl.constexpr, d: tl.constexpr,
    GRU: tl.constexpr, KEEP: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The states of a chunk are computed again from its border, into held (B*N, chunk, S, d), then run through backwards.

    weight (N, 3d, d). Gradients of write, keep and query are (blocks of columns, B, T, N, S), to be added up.
    KEEP asks for grad_keep. grad_recurrent (B, T, N, 3d) is the gradient of `weight @ stored + bias`.
    """
    item = tl.program_id(0).to(tl.int64)
    b, n = item // N, item % N
    s, j = tl.arange(0, BS), tl.arange(0, BD)
    if not GRU:
        j += tl.program_id(1) * BD
    in_s, in_j = s < S, j < d
    in_h = in_s[:, None] & in_j[None, :]
    place = s[:, None] * d + j[None, :]
    scratch = held + item * chunk * S * d + place
    grad = tl.load(grad_after + item * S * d + place, mask=in_h, other=0.0)
    chunks = tl.cdiv(T, chunk)
    contents, width = values, d
    block = tl.program_id(1).to(tl.int64) * T * tl.num_programs(0)  # rows of the blocks of columns before this one
    if GRU:
        contents, width, block = saved, 6 * d, 0
        in_w = in_j[:, None] & in_j[None, :]
        cell = weight + n * 3 * d * d + j[:, None] * d + j[None, :]
    for back in range(chunks):
        part = chunks - 1 - back
        begin = part * chunk
        steps = tl.minimum(chunk, T - begin)
        state = tl.load(borders + (item * chunks + part) * S * d + place, mask=in_h, other=0.0)
        for i in range(steps):
            row = (b * T + begin + i) * N + n
            kept = tl.load(keep + b * keep_b + (begin + i) * keep_t + n * keep_n + s * keep_s, mask=in_s, other=1.0)
            state = kept[:, None] * state
            tl.store(scratch + i * S * d, state, mask=in_h)
            z = tl.load(write + row * S + s, mask=in_s, other=0.0)
            content = tl.load(contents + row * width + j, mask=in_j, other=0.0)
            state += z[:, None] * (content[None, :] - state)
        tl.debug_barrier()  # what one thread wrote another may read
        for i_back in range(steps):
            i = steps - 1 - i_back
            row = (b * T + begin + i) * N + n
            before = tl.load(scratch + i * S * d, mask=in_h, other=0.0)
            z = tl.load(write + row * S + s, mask=in_s, other=0.0)
            q = tl.load(query + row * S + s, mask=in_s, other=0.0)
            content = tl.load(contents + row * width + j, mask=in_j, other=0.0)
            out = tl.load(grad_reads + row * d + j, mask=in_j, other=0.0)
            change = content[None, :] - before
            grad += q[:, None] * out[None, :]
            tl.store(
                grad_query + (block + row) * S + s,
                tl.sum(out[None, :] * (before + z[:, None] * change), axis=1),
                mask=in_s,
            )
            tl.store(grad_write + (block + row) * S + s, tl.sum(grad * change, axis=1), mask=in_s)
            through = z[:, None] * grad
            d_content = tl.sum(through, axis=0)
            grad -= through
            if GRU:
                part_of = saved + row * 6 * d + j
                stored = tl.load(part_of + d, mask=in_j, other=0.0)
                reset = tl.load(part_of + 2 * d, mask=in_j, other=0.0)
                update = tl.load(part_of + 3 * d, mask=in_j, other=0.0)
                new = tl.load(part_of + 4 * d, mask=in_j, other=0.0)
                new_h = tl.load(part_of + 5 * d, mask=in_j, other=0.0)
                d_new = d_content * (1 - update) * (1 - new * new)
                d_update = d_content * (stored - new) * update * (1 - update)
                d_reset = d_new * new_h * reset * (1 - reset)
                d_new_h = d_new * reset
                into = row * 3 * d + j
                tl.store(grad_values + into, d_reset, mask=in_j)
                tl.store(grad_values + into + d, d_update, mask=in_j)
                tl.store(grad_values + into + 2 * d, d_new, mask=in_j)
                tl.store(grad_recurrent + into, d_reset, mask=in_j)
                tl.store(grad_recurrent + into + d, d_update, mask=in_j)
                tl.store(grad_recurrent + into + 2 * d, d_new_h, mask=in_j)
                d_stored = d_content * update + _transposed_times(cell, in_w, d_reset)
                tl.debug_barrier()
                d_stored += _transposed_times(cell + d * d, in_w, d_update)
                tl.debug_barrier()
                d_stored += _transposed_times(cell + 2 * d * d, in_w, d_new_h)
                a = tl.load(address + row * S + s, mask=in_s, other=0.0)
                tl.store(grad_address + row * S + s, tl.sum(before * d_stored[None, :], axis=1), mask=in_s)
                grad += a[:, None] * d_stored[None, :]
            else:
                tl.store(grad_values + row * d + j, d_content, mask=in_j)
            kept = tl.load(keep + b * keep_b + (begin + i) * keep_t + n * keep_n + s * keep_s, mask=in_s, other=1.0)
            if KEEP:  # before = keep * (state before it)
                tl.store(grad_keep + (block + row) * S + s, tl.sum(grad * before, axis=1) / kept, mask=in_s)
            grad = kept[:, None] * grad
        tl.debug_barrier()  # the next chunk writes where this one was read
    tl.store(grad_slots + item * S * d + place, grad, mask=in_h)

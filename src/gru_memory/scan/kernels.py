"""Machine code for the recurrence on a CPU, compiled by numba: row by row.

Every function takes the heads `first` to `last` out of all B*N, so that threads share the work; none holds the GIL.
The heads of a row advance together, token by token, so that the inputs are read in the order in which they lie in
memory; a head at a time takes twice as long. (Large weights of a gru cell are the exception: see `group`.) The state
lies as (d, S), so that the inner loops run along the slots. The backward pass keeps the state at the borders of
chunks alone and computes those in between again: the update cannot be run backwards, since a write of strength 1
leaves nothing of what was there.

Literals are avoided in the loops: numba would take them for float64 and compute everything around them so.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path

import numpy as np
from numba import njit, types
from numba.extending import overload

# Sums may be reordered and products fused; NaN and infinity keep their meaning.
_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}


# Free on disk, or nothing is kept there: numba gives up in the middle of a call on a full one.
_CACHE_BYTES = 50_000_000

# One file's functions become part of another's machine code, and numba looks whether the other's source is what it was.
_HERE = Path(__file__).parent
_FILES = sorted([*_HERE.glob("*kernels.py"), *_HERE.glob("machine.py")])
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in _FILES)).hexdigest()


def _compiled(function):
    """Compiled at the first call for its types; kept on disk wherever a place to write can be found."""
    try:
        compiled = njit(cache=True, **_OPTIONS)(function)
        compiled._cache._cache_file._source_stamp = SOURCES
        if is_kept(compiled):
            return compiled
    except (AttributeError, RuntimeError, OSError):
        pass  # "no locator available": neither the package nor the user's cache folder can be written
    return njit(**_OPTIONS)(function)


def is_kept(compiled):
    """Whether a compiled function is kept on disk, and there is room for more."""
    path = compiled.stats.cache_path
    return path is not None and shutil.disk_usage(path).free >= _CACHE_BYTES


def _tanh(x):
    raise NotImplementedError("only inside compiled code")


@overload(_tanh, jit_options=_OPTIONS, inline="never")
def _tanh_of(x):
    if x != types.float32:
        return lambda x: math.tanh(x)

    # Rational approximation of Eigen's ptanh_float (Eigen/src/Core/MathFunctionsImpl.h, MPL-2.0): a few ulp, no
    # branches and no calls, so loops over it run in vectors. The comparisons let NaN through.
    def tanh(x):
        f = np.float32
        x = f(7.90531110763549805) if x > f(7.90531110763549805) else x
        x = f(-7.90531110763549805) if x < f(-7.90531110763549805) else x
        y = x * x
        p = y * f(-2.76076847742355e-16) + f(2.00018790482477e-13)
        p = y * p + f(-8.60467152213735e-11)
        p = y * p + f(5.12229709037114e-08)
        p = y * p + f(1.48572235717979e-05)
        p = y * p + f(6.37261928875436e-04)
        p = y * p + f(4.89352455891786e-03)
        q = y * f(1.19825839466702e-06) + f(1.18534705686654e-04)
        q = y * q + f(2.26843463243900e-03)
        q = y * q + f(4.89352518554385e-03)
        return x * p / q

    return tanh


def _wide(x):
    raise NotImplementedError("only inside compiled code")


@overload(_wide, jit_options=_OPTIONS)
def _wide_of(x):
    """A number as it is computed with. numpy has no bfloat16: as uint16 it comes, the upper half of a float32."""
    if x != types.uint16:
        return lambda x: x
    return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)


@_compiled
def _load(state, slots):
    """(S, d) into (d, S)."""
    for s in range(slots.shape[0]):
        for j in range(slots.shape[1]):
            state[j, s] = slots[s, j]


def try_out() -> None:
    """Compile one small function and call it. Raises whatever keeps numba from it."""
    _load(np.zeros((1, 1)), np.zeros((1, 1)))


@_compiled
def _store(slots, state):
    """(d, S) into (S, d)."""
    for s in range(slots.shape[0]):
        for j in range(slots.shape[1]):
            slots[s, j] = state[j, s]


@_compiled
def _decay(state, keep):
    """state *= keep, which holds one number or one a slot; most steps keep all, and cost nothing here."""
    one = state.dtype.type(1)
    if keep.shape[0] == 1:
        kept = keep[0]
        if kept != one:
            for j in range(state.shape[0]):
                row = state[j]
                for s in range(row.shape[0]):
                    row[s] *= kept
        return
    ticks = False
    for s in range(keep.shape[0]):
        ticks |= keep[s] != one
    if ticks:
        for j in range(state.shape[0]):
            row = state[j]
            for s in range(row.shape[0]):
                row[s] *= keep[s]


@_compiled
def _write_and_read(state, content, write, query, read):
    zero = state.dtype.type(0)
    for j in range(state.shape[0]):
        row = state[j]
        new = content[j]
        total = zero
        for s in range(row.shape[0]):
            h = row[s]
            h += write[s] * (new - h)
            row[s] = h
            total += query[s] * h
        read[j] = total


@_compiled
def _write(state, held, content, write):
    """The update alone; H~, the decayed state before it, is kept in `held`."""
    for j in range(state.shape[0]):
        row = state[j]
        before = held[j]
        new = content[j]
        for s in range(row.shape[0]):
            h = row[s]
            before[s] = h
            row[s] = h + write[s] * (new - h)


@_compiled
def _write_and_read_back(grad, held, content, write, query, grad_read, grad_content, grad_write, grad_query):
    """Backwards through `_write_and_read`: grad is d/dH after the step on entry and d/dH~ on return."""
    zero = grad.dtype.type(0)
    for s in range(write.shape[0]):
        grad_write[s] = zero
        grad_query[s] = zero
    for j in range(grad.shape[0]):
        row = grad[j]
        before = held[j]
        new = content[j]
        out = grad_read[j]
        total = zero
        for s in range(row.shape[0]):
            z = write[s]
            change = new - before[s]
            g = row[s] + query[s] * out
            grad_query[s] += out * (before[s] + z * change)
            grad_write[s] += g * change
            through = z * g
            total += through
            row[s] = g - through
        grad_content[j] = total


@_compiled
def _decay_back(grad, held, keep, grad_keep):
    """d/dH~ into d/dH of the step before. grad_keep (S,) may be empty; H before the decay is held / keep."""
    if grad_keep.shape[0] > 0:
        for s in range(grad_keep.shape[0]):
            grad_keep[s] = grad.dtype.type(0)
        for j in range(grad.shape[0]):
            row = grad[j]
            before = held[j]
            for s in range(row.shape[0]):
                grad_keep[s] += row[s] * before[s]
        for s in range(grad_keep.shape[0]):
            grad_keep[s] /= keep[0 if keep.shape[0] == 1 else s]
    _decay(grad, keep)


@_compiled
def mingru_forward(values, write, keep, query, slots, reads, after, borders, chunk, first, last):
    """Forward of `mingru`.

    values (B, T, N, d); write, query (B, T, N, S); keep (B, T, N or 1, S or 1); slots (B, N, S, d). Fills
    reads (B, T, N, d), after (B, N, S, d) and, unless it is empty, borders (B*N, T/chunk, d, S).
    """
    tokens, heads, size = values.shape[1:]
    state = np.empty((heads, size, write.shape[3]), slots.dtype)
    item = first
    while item < last:
        b, start = divmod(item, heads)
        stop = min(heads, start + last - item)
        for n in range(start, stop):
            _load(state[n - start], slots[b, n])
        for t in range(tokens):
            for n in range(start, stop):
                now = state[n - start]
                if borders.shape[1] > 0 and t % chunk == 0:
                    borders[item + n - start, t // chunk] = now
                _decay(now, keep[b, t, n if keep.shape[2] > 1 else 0])
                _write_and_read(now, values[b, t, n], write[b, t, n], query[b, t, n], reads[b, t, n])
        for n in range(start, stop):
            _store(after[b, n], state[n - start])
        item += stop - start


@_compiled
def mingru_backward(
    values, write, keep, query, borders, chunk, grad_reads, grad_after,
    grad_values, grad_write, grad_keep, grad_query, grad_slots, first, last,
):  # fmt: skip
    """Backward of `mingru`: fills the five last arrays, of the shapes of what they are the gradients of.

    grad_keep (B, T, N, S), or empty where it is not asked for.
    """
    tokens, heads, size = values.shape[1:]
    held = np.empty((chunk, heads, size, write.shape[3]), values.dtype)
    state = np.empty((heads, size, write.shape[3]), values.dtype)
    grad = np.empty_like(state)
    no_keep = np.empty(0, values.dtype)
    item = first
    while item < last:
        b, start = divmod(item, heads)
        stop = min(heads, start + last - item)
        for n in range(start, stop):
            _load(grad[n - start], grad_after[b, n])
        for part in range((tokens - 1) // chunk, -1, -1):
            begin = part * chunk
            end = min(begin + chunk, tokens)
            for n in range(start, stop):
                state[n - start] = borders[item + n - start, part]
            for t in range(begin, end):
                for n in range(start, stop):
                    _decay(state[n - start], keep[b, t, n if keep.shape[2] > 1 else 0])
                    _write(state[n - start], held[t - begin, n - start], values[b, t, n], write[b, t, n])
            for t in range(end - 1, begin - 1, -1):
                for n in range(start, stop):
                    before = held[t - begin, n - start]
                    _write_and_read_back(
                        grad[n - start], before, values[b, t, n], write[b, t, n], query[b, t, n], grad_reads[b, t, n],
                        grad_values[b, t, n], grad_write[b, t, n], grad_query[b, t, n],
                    )  # fmt: skip
                    into = grad_keep[b, t, n] if grad_keep.shape[0] > 0 else no_keep
                    _decay_back(grad[n - start], before, keep[b, t, n if keep.shape[2] > 1 else 0], into)
        for n in range(start, stop):
            _store(grad_slots[b, n], grad[n - start])
        item += stop - start


@_compiled
def _addressed(state, address, stored):
    """sum_s a_s H~_s."""
    zero = state.dtype.type(0)
    for j in range(state.shape[0]):
        row = state[j]
        total = zero
        for s in range(row.shape[0]):
            total += address[s] * row[s]
        stored[j] = total


@_compiled
def _add_product(out, vector, matrix):
    """out (k,) += vector (m,) @ matrix (m, k)."""
    i = 0
    while i + 4 <= vector.shape[0]:
        a, b, c, e = vector[i], vector[i + 1], vector[i + 2], vector[i + 3]
        row_a, row_b, row_c, row_e = matrix[i], matrix[i + 1], matrix[i + 2], matrix[i + 3]
        for k in range(out.shape[0]):
            out[k] += (a * row_a[k] + b * row_b[k]) + (c * row_c[k] + e * row_e[k])
        i += 4
    for m in range(i, vector.shape[0]):
        a = vector[m]
        row_a = matrix[m]
        for k in range(out.shape[0]):
            out[k] += a * row_a[k]


@_compiled
def _product(out, matrix, vector):
    """out (k,) += matrix (k, m) @ vector (m,)."""
    zero = out.dtype.type(0)
    k = 0
    while k + 4 <= out.shape[0]:
        row_a, row_b, row_c, row_e = matrix[k], matrix[k + 1], matrix[k + 2], matrix[k + 3]
        a, b, c, e = zero, zero, zero, zero
        for m in range(vector.shape[0]):
            x = vector[m]
            a += _wide(row_a[m]) * x
            b += _wide(row_b[m]) * x
            c += _wide(row_c[m]) * x
            e += _wide(row_e[m]) * x
        out[k] += a
        out[k + 1] += b
        out[k + 2] += c
        out[k + 3] += e
        k += 4
    for i in range(k, out.shape[0]):
        row = matrix[i]
        a = zero
        for m in range(vector.shape[0]):
            a += _wide(row[m]) * vector[m]
        out[i] += a


@_compiled
def _gru_cell(values, recurrent, gates):
    """A GRU cell given both halves, (3d,) each. gates (5, d): content, stored (given), reset, update, new."""
    size = gates.shape[1]
    half = gates.dtype.type(0.5)
    content, stored, reset, update, new = gates[0], gates[1], gates[2], gates[3], gates[4]
    for j in range(size):  # sigmoid(x) = (1 + tanh(x/2)) / 2
        reset[j] = half + half * _tanh(half * (values[j] + recurrent[j]))
    for j in range(size):
        update[j] = half + half * _tanh(half * (values[size + j] + recurrent[size + j]))
    for j in range(size):
        new[j] = _tanh(values[2 * size + j] + reset[j] * recurrent[2 * size + j])
    for j in range(size):
        content[j] = new[j] + update[j] * (stored[j] - new[j])


@_compiled
def gru_forward(
    values, address, write, keep, query, slots, weight, bias, reads, after, saved, borders, chunk, group, first, last
):
    """Forward of `gru`, as `mingru_forward` with values (B, T, N, 3d), weight (N, 3d, d) and bias (N, 3d).

    Up to `group` heads of a row advance together. Unless it is empty, saved (B, T, N, 6, d) gets what the backward of
    the cell needs: content, stored, reset, update, new and the recurrent half of new.
    """
    tokens, heads, size = values.shape[1], values.shape[2], values.shape[3] // 3
    state = np.empty((group, size, write.shape[3]), slots.dtype)
    recurrent = np.empty(3 * size, slots.dtype)
    gates = np.empty((5, size), slots.dtype)
    item = first
    while item < last:
        b, start = divmod(item, heads)
        stop = min(start + group, heads, start + last - item)
        for n in range(start, stop):
            _load(state[n - start], slots[b, n])
        for t in range(tokens):
            for n in range(start, stop):
                now = state[n - start]
                if borders.shape[1] > 0 and t % chunk == 0:
                    borders[item + n - start, t // chunk] = now
                _decay(now, keep[b, t, n if keep.shape[2] > 1 else 0])
                _addressed(now, address[b, t, n], gates[1])
                recurrent[:] = bias[n]
                _product(recurrent, weight[n], gates[1])
                _gru_cell(values[b, t, n], recurrent, gates)
                if saved.shape[0] > 0:
                    saved[b, t, n, :5] = gates
                    saved[b, t, n, 5] = recurrent[2 * size :]
                _write_and_read(now, gates[0], write[b, t, n], query[b, t, n], reads[b, t, n])
        for n in range(start, stop):
            _store(after[b, n], state[n - start])
        item += stop - start


@_compiled
def _gru_cell_back(saved, grad_content, grad_values, grad_recurrent, grad_stored):
    """Backwards through `_gru_cell`, down to both halves (3d,) and what reaches stored (d,) past the matrix."""
    size = grad_content.shape[0]
    one = saved.dtype.type(1)
    stored, reset, update, new, new_h = saved[1], saved[2], saved[3], saved[4], saved[5]
    for j in range(size):
        g = grad_content[j]
        d_new = g * (one - update[j]) * (one - new[j] * new[j])
        d_update = g * (stored[j] - new[j]) * update[j] * (one - update[j])
        d_reset = d_new * new_h[j] * reset[j] * (one - reset[j])
        grad_values[j] = d_reset
        grad_values[size + j] = d_update
        grad_values[2 * size + j] = d_new
        grad_recurrent[j] = d_reset
        grad_recurrent[size + j] = d_update
        grad_recurrent[2 * size + j] = d_new * reset[j]
        grad_stored[j] = g * update[j]


@_compiled
def _addressed_back(grad, held, address, grad_stored, grad_address):
    zero = grad.dtype.type(0)
    for s in range(address.shape[0]):
        grad_address[s] = zero
    for j in range(grad.shape[0]):
        row = grad[j]
        before = held[j]
        g = grad_stored[j]
        for s in range(row.shape[0]):
            row[s] += address[s] * g
            grad_address[s] += g * before[s]


@_compiled
def gru_backward(
    values, address, write, keep, query, weight, saved, borders, chunk, grad_reads, grad_after,
    grad_values, grad_address, grad_write, grad_keep, grad_query, grad_slots, grad_recurrent, group, first, last,
):  # fmt: skip
    """Backward of `gru`, as `mingru_backward` with weight (N, 3d, d).

    grad_recurrent (B, T, N, 3d) is the gradient of `weight @ stored + bias`: those of weight and bias are one matrix
    product and one sum of it.
    """
    tokens, heads, size = values.shape[1], values.shape[2], values.shape[3] // 3
    held = np.empty((chunk, group, size, write.shape[3]), values.dtype)
    state = np.empty((group, size, write.shape[3]), values.dtype)
    grad = np.empty_like(state)
    grad_content = np.empty(size, values.dtype)
    grad_stored = np.empty(size, values.dtype)
    no_keep = np.empty(0, values.dtype)
    item = first
    while item < last:
        b, start = divmod(item, heads)
        stop = min(start + group, heads, start + last - item)
        for n in range(start, stop):
            _load(grad[n - start], grad_after[b, n])
        for part in range((tokens - 1) // chunk, -1, -1):
            begin = part * chunk
            end = min(begin + chunk, tokens)
            for n in range(start, stop):
                state[n - start] = borders[item + n - start, part]
            for t in range(begin, end):
                for n in range(start, stop):
                    _decay(state[n - start], keep[b, t, n if keep.shape[2] > 1 else 0])
                    _write(state[n - start], held[t - begin, n - start], saved[b, t, n, 0], write[b, t, n])
            for t in range(end - 1, begin - 1, -1):
                for n in range(start, stop):
                    now, before = grad[n - start], held[t - begin, n - start]
                    _write_and_read_back(
                        now, before, saved[b, t, n, 0], write[b, t, n], query[b, t, n], grad_reads[b, t, n],
                        grad_content, grad_write[b, t, n], grad_query[b, t, n],
                    )  # fmt: skip
                    _gru_cell_back(
                        saved[b, t, n], grad_content, grad_values[b, t, n], grad_recurrent[b, t, n], grad_stored
                    )
                    _add_product(grad_stored, grad_recurrent[b, t, n], weight[n])
                    _addressed_back(now, before, address[b, t, n], grad_stored, grad_address[b, t, n])
                    into = grad_keep[b, t, n] if grad_keep.shape[0] > 0 else no_keep
                    _decay_back(now, before, keep[b, t, n if keep.shape[2] > 1 else 0], into)
        for n in range(start, stop):
            _store(grad_slots[b, n], grad[n - start])
        item += stop - start

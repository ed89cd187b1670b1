"""Machine code for one token of a whole memory site on a CPU, but for its large matrix products. No gradients.

See `gru_memory.one_token`, which calls these, and `kernels` for how they are compiled and written.
"""

from __future__ import annotations

import math

import numpy as np

from .kernels import _addressed, _compiled, _decay, _gru_cell, _load, _product, _store, _write_and_read


@_compiled
def _norm_into(out, numbers, visible):
    """numbers / sqrt(mean(numbers^2) + 1e-6), or zeros where the token is hidden."""
    total = numbers.dtype.type(0)
    if not visible:
        for i in range(out.shape[0]):
            out[i] = total
        return
    for i in range(numbers.shape[0]):
        total += numbers[i] * numbers[i]
    mean = total / numbers.dtype.type(numbers.shape[0])
    scale = numbers.dtype.type(1) / np.sqrt(mean + numbers.dtype.type(1e-6))
    for i in range(numbers.shape[0]):
        out[i] = scale * numbers[i]


@_compiled
def _dot(row, vector):
    total = row.dtype.type(0)
    for i in range(row.shape[0]):
        total += row[i] * vector[i]
    return total


@_compiled
def _sigmoid(x):
    one = np.float64(1)
    return one / (one + math.exp(-np.float64(x)))


@_compiled
def _softmax_into(out, logits):
    top = logits[0]
    for s in range(logits.shape[0]):
        if logits[s] > top:
            top = logits[s]
    total = logits.dtype.type(0)
    for s in range(logits.shape[0]):
        out[s] = math.exp(logits[s] - top)
        total += out[s]
    for s in range(logits.shape[0]):
        out[s] /= total


@_compiled
def keys_and_gates(
    hidden, embeds, further, visible, before, strength_key, strength_key_bias, strength_embed, strength_whole,
    read_gate, read_gate_bias, gate_whole, gate, keys, write, after, gates,
):  # fmt: skip
    """The key of each row, and the small projections of it.

    hidden (B, D), embeds (B, E), further (B, `key_size`, may be empty), visible (B,) bool; before (B, N) is what the
    token before decided of this one's write strength. The weights (N, ...) of strength_embed take in norm(e), or with
    `strength_whole` the whole key; those of read_gate norm(x), or the whole key. Fills keys (B, D + `key_size` + E),
    the write strength (B, N), what this token decides of the next one's (B, N) and the gate of what is read (B, N).
    """
    batch, size = hidden.shape
    others = further.shape[1]
    for b in range(batch):
        key = keys[b]
        _norm_into(key[:size], hidden[b], visible[b])
        if others > 0:
            _norm_into(key[size : size + others], further[b], visible[b])
        _norm_into(key[size + others :], embeds[b], visible[b])
        own = key if strength_whole else key[size + others :]
        seen = key if gate_whole else key[:size]
        for n in range(before.shape[1]):
            after[b, n] = _dot(strength_key[n], key) + strength_key_bias[n] if visible[b] else before[b, n]
            strength = _sigmoid(before[b, n] + _dot(strength_embed[n], own))
            write[b, n] = strength if visible[b] else keys.dtype.type(0)
            gates[b, n] = gate[0] * _sigmoid(_dot(read_gate[n], seen) + read_gate_bias[n])


@_compiled
def write_and_read_one(
    values, address, query, write, gates, ticks, decay, slots, weight_ih, bias_ih, weight_hh, bias_hh, reads, after,
    first, last,
):  # fmt: skip
    """One step for items `first` to `last` of N*B, the rows of a head one after the other, so that they share weights.

    values (B, N*d) before the input half of the cell; address, query (B, N*S) before their softmax; write, gates
    (B, N); ticks (B,) bool; decay (1 or N, 1 or S); slots (B, N, S, d). The weights are empty for `mingru`.
    Fills reads (B, N*d), gated, and after (B, N, S, d).
    """
    batch, heads, count, size = slots.shape
    state = np.empty((size, count), slots.dtype)
    where = np.empty(count, slots.dtype)
    put = np.empty(count, slots.dtype)
    asked = np.empty(count, slots.dtype)
    given = np.empty(3 * size, slots.dtype)
    recurrent = np.empty(3 * size, slots.dtype)
    gate = np.empty((5, size), slots.dtype)
    for item in range(first, last):
        n, b = item // batch, item % batch
        value = values[b, n * size : (n + 1) * size]
        read = reads[b, n * size : (n + 1) * size]
        _load(state, slots[b, n])
        if ticks[b]:
            _decay(state, decay[n if decay.shape[0] > 1 else 0])
        _softmax_into(where, address[b, n * count : (n + 1) * count])
        _softmax_into(asked, query[b, n * count : (n + 1) * count])
        for s in range(count):
            put[s] = write[b, n] * where[s]
        if weight_ih.shape[0] > 0:
            _addressed(state, where, gate[1])
            given[:] = bias_ih[n]
            _product(given, weight_ih[n], value)
            recurrent[:] = bias_hh[n]
            _product(recurrent, weight_hh[n], gate[1])
            _gru_cell(given, recurrent, gate)
        else:
            for j in range(size):
                gate[0, j] = math.tanh(value[j])
        _write_and_read(state, gate[0], put, asked, read)
        for j in range(size):
            read[j] *= gates[b, n]
        _store(after[b, n], state)

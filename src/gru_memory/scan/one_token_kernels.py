"""Machine code for one token of a whole memory site on a CPU. No gradients.

See `gru_memory.one_token`, which calls this, and `kernels` for how it is compiled and written. Matrix products are part
of it: with a few rows they only wait for the weights, which these loops read about twice as fast as BLAS does. Arrays
come as addresses: from one token to the next a model has pushed everything out of the caches, and to look into 40
objects one by one then takes as long as the arithmetic.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numba import carray, cfunc, types
from numba.extending import overload

from .kernels import (
    _OPTIONS,
    SOURCES,
    _addressed,
    _compiled,
    _decay,
    _gru_cell,
    _load,
    _product,
    _store,
    _wide,
    _write_and_read,
    is_kept,
)
from .machine import call, call_for_number, pointer, with_denormals_as, without_denormals
from .place_kernels import place, squared_lengths
from .team import FUNCTION

# The parameters of a site in the order in which `site_one` takes their addresses; its decay, `max_strength` with
# the floor of persistent slots, and `addressing.rules` come after them.
WEIGHTS = (
    *("key_rank.weight", "key_rank.bias", "query_rank.weight", "query_rank.bias"),
    *("key.weight", "key.bias", "query.weight", "query.bias"),
    *("strength_key.weight", "strength_key.bias", "strength_embed.weight", "read_gate.weight", "read_gate.bias"),
    *("value_embed.weight", "value_hidden.weight", "output.weight", "gate"),
    *("weight_ih", "bias_ih", "weight_hh", "bias_hh"),
    *("persistent_query.weight", "persistent_query.bias", "persistent", "signature.weight", "trust"),
    "sharpness",
)
(
    KEY_RANK, KEY_RANK_BIAS, QUERY_RANK, QUERY_RANK_BIAS, KEY, KEY_BIAS, QUERY, QUERY_BIAS, STRENGTH_KEY,
    STRENGTH_KEY_BIAS, STRENGTH_EMBED, READ_GATE, READ_GATE_BIAS, VALUE_EMBED, VALUE_HIDDEN, OUTPUT, GATE, WEIGHT_IH,
    BIAS_IH, WEIGHT_HH, BIAS_HH, PERSISTENT_QUERY, PERSISTENT_QUERY_BIAS, PERSISTENT, SIGNATURE, TRUST, SHARPNESS,
    DECAY, MAX_STRENGTH, RULES,
) = range(len(WEIGHTS) + 3)  # fmt: skip


@_compiled
def _widen_into(out, numbers):
    for i in range(out.shape[0]):
        out[i] = _wide(numbers[i])


def _narrow_into(out, numbers):
    raise NotImplementedError("only inside compiled code")


@overload(_narrow_into, jit_options=_OPTIONS)
def _narrow_into_of(out, numbers):
    """The way back from `_wide`, rounded as torch does: to the nearest, and to the even one of two."""
    if out.dtype != types.uint16:

        def narrow(out, numbers):
            out[:] = numbers
    else:

        def narrow(out, numbers):
            for i in range(out.shape[0]):
                number = np.float32(numbers[i])
                bits = number.view(np.uint32)
                rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
                out[i] = rounded if number == number else 0x7FC0

    return narrow


@_compiled
def _norm_into(out, numbers, visible):
    """numbers / sqrt(mean(numbers^2) + 1e-6), or zeros where the token is hidden."""
    total = out.dtype.type(0)
    if not visible:
        for i in range(out.shape[0]):
            out[i] = total
        return
    for i in range(numbers.shape[0]):
        total += _wide(numbers[i]) * _wide(numbers[i])
    mean = total / out.dtype.type(numbers.shape[0])
    scale = out.dtype.type(1) / np.sqrt(mean + out.dtype.type(1e-6))
    for i in range(numbers.shape[0]):
        out[i] = scale * _wide(numbers[i])


@_compiled
def _part(count, team, step):
    """What a thread does of `count` things, in whole steps: from, to. A single thing is done by thread 0, which is awake."""
    thread, threads = team
    last = threads - 1 - thread
    until = count if thread == 0 else count * (last + 1) // threads // step * step
    return count * last // threads // step * step, until


@_compiled
def _add_times(stored, out, weight_at, vectors, team):
    """out (B, k) += vectors (B, m) @ weight (k, m) transposed, this thread's part of k. The weight comes by once, for all rows."""
    weight = carray(pointer(weight_at), (out.shape[1], vectors.shape[1]), stored.dtype)
    zero = out.dtype.type(0)
    rows = vectors.shape[0]
    k, until = _part(out.shape[1], team, 4)
    if rows == 1:
        _product(out[0, k:until], weight[k:until], vectors[0])
        return
    while k + 4 <= until:
        row_a, row_b, row_c, row_e = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
        b = 0
        while b + 2 <= rows:  # eight sums for six loads
            x, y = vectors[b], vectors[b + 1]
            ax, bx, cx, ex, ay, by, cy, ey = zero, zero, zero, zero, zero, zero, zero, zero
            for m in range(x.shape[0]):
                wa, wb, wc, we = _wide(row_a[m]), _wide(row_b[m]), _wide(row_c[m]), _wide(row_e[m])
                ax += wa * x[m]
                bx += wb * x[m]
                cx += wc * x[m]
                ex += we * x[m]
                ay += wa * y[m]
                by += wb * y[m]
                cy += wc * y[m]
                ey += we * y[m]
            out[b, k] += ax
            out[b, k + 1] += bx
            out[b, k + 2] += cx
            out[b, k + 3] += ex
            out[b + 1, k] += ay
            out[b + 1, k + 1] += by
            out[b + 1, k + 2] += cy
            out[b + 1, k + 3] += ey
            b += 2
        if b < rows:
            _product(out[b, k : k + 4], weight[k : k + 4], vectors[b])
        k += 4
    if k < until:
        for b in range(rows):
            _product(out[b, k:until], weight[k:until], vectors[b])


@_compiled
def _times(stored, out, weight_at, bias_at, vectors, team):
    """out (B, k) = vectors (B, m) @ weight (k, m) transposed + bias (k,), this thread's part of k. No bias is at address 0."""
    first, until = _part(out.shape[1], team, 4)
    bias = carray(pointer(bias_at), (out.shape[1] if bias_at != 0 else 0,), stored.dtype)
    for b in range(out.shape[0]):
        if bias_at != 0:
            _widen_into(out[b, first:until], bias[first:until])
        else:
            out[b, first:until] = out.dtype.type(0)
    _add_times(stored, out, weight_at, vectors, team)


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
def _cosine(a, b):
    """As torch's, with eps=1e-6."""
    product, one, other = a.dtype.type(0), a.dtype.type(0), a.dtype.type(0)
    least = a.dtype.type(1e-6)
    for j in range(a.shape[0]):
        product += a[j] * b[j]
        one += a[j] * a[j]
        other += b[j] * b[j]
    return product / (max(np.sqrt(one), least) * max(np.sqrt(other), least))


@_compiled
def _write_and_read_one(
    like, stored, weights, decay, slots, after, ticks, visible, values, address, strength, wanted, signed, signature,
    told_before, told_now, replacing, replacing_next, reads, agreement, team,
):  # fmt: skip
    """The recurrence and the read, of this thread's part of all heads of all rows. Arrays as in `site_one`.

    values (B, N*(d-f)); address, wanted (B, N*S) before their softmax, unless slots are found by their content; strength
    (B, N), or (B, 2N) for slots found by their content, before its sigmoid; signed (B, N*f), the signature to write, and
    signature (B, N*f), the one asked for, before their tanh; told_before (B, N) says how surely the token before was told,
    replacing (B, N) how far each may replace another; slots, after (B, N, S, d). Fills after, told_now, replacing_next
    (B, N), reads (B, N*(d-f)) and agreement (B, N).
    """
    rows, heads, count, size = slots.shape
    marks = signed.shape[1] // heads  # floats of a signature
    room = size - marks
    gru = weights[WEIGHT_HH] != 0
    wide = 3 * size if gru else 0
    weight_ih = carray(pointer(weights[WEIGHT_IH]), (heads, wide, size), stored.dtype)
    weight_hh = carray(pointer(weights[WEIGHT_HH]), (heads, wide, size), stored.dtype)
    bias_ih = carray(pointer(weights[BIAS_IH]), (heads, wide), stored.dtype)
    bias_hh = carray(pointer(weights[BIAS_HH]), (heads, wide), stored.dtype)
    most = carray(pointer(weights[MAX_STRENGTH]), (2,), like.dtype)[0]
    by_content = weights[SHARPNESS] != 0
    sharpness = carray(pointer(weights[SHARPNESS]), (1 if by_content else 0,), stored.dtype)
    rules = carray(pointer(weights[RULES]), (5,), like.dtype)
    zero, one = like.dtype.type(0), like.dtype.type(1)

    state = np.empty((size, count), like.dtype)
    where, put, sought = np.empty(count, like.dtype), np.empty(count, like.dtype), np.empty(count, like.dtype)
    given, recurrent = np.empty(wide, like.dtype), np.empty(wide, like.dtype)
    cell = np.empty((5, size), like.dtype)
    value, read = np.empty(size, like.dtype), np.empty(size, like.dtype)
    signatures, amount = np.empty((count, marks), like.dtype), np.empty(count, like.dtype)
    key, found = np.empty(marks, like.dtype), np.empty(marks, like.dtype)
    left = np.empty(count, like.dtype)
    first, until = _part(rows * heads, team, 1)
    # The rows of a head come one after the other, so that they share the weights of its cell.
    for item in range(first, until):
        n, b = item // rows, item % rows
        value[:room] = values[b, n * room : (n + 1) * room]
        value[room:] = signed[b, n * marks : (n + 1) * marks]
        _load(state, slots[b, n])
        rates = decay[n if decay.shape[0] > 1 else 0]
        told = like.dtype.type(_sigmoid(strength[b, n]))
        if by_content:
            begins, last = told, told_before[b, n]
            told = begins + last * (like.dtype.type(_sigmoid(strength[b, heads + n])) - begins)
            told_now[b, n] = told if visible[b] else last
        if not visible[b]:
            told = zero
        z = most * told
        if by_content:
            for s in range(count):
                left[s] = rates[s % rates.shape[0]] if ticks[b] else one
                for j in range(marks):
                    signatures[s, j] = slots[b, n, s, room + j]
            squared_lengths(signatures, amount)
            for j in range(marks):
                key[j] = math.tanh(signed[b, n * marks + j])
                found[j] = math.tanh(signature[b, n * marks + j])
            z = most * max(zero, (told - rules[3]) / (one - rules[3]))
            may = replacing[b, n]
            gone = place(signatures, amount, left, key, z, may, found, _wide(sharpness[0]), rules, where, sought)
            replacing_next[b, n] = max(one - told, gone) if visible[b] else may
            _decay(state, left)
        else:
            if ticks[b]:
                _decay(state, rates)
            _softmax_into(where, address[b, n * count : (n + 1) * count])
            _softmax_into(sought, wanted[b, n * count : (n + 1) * count])
        for s in range(count):
            put[s] = z * where[s]
        if gru:
            _addressed(state, where, cell[1])
            _widen_into(given, bias_ih[n])
            _product(given, weight_ih[n], value)
            _widen_into(recurrent, bias_hh[n])
            _product(recurrent, weight_hh[n], cell[1])
            _gru_cell(given, recurrent, cell)
        else:
            for j in range(size):
                cell[0, j] = math.tanh(value[j])
        _write_and_read(state, cell[0], put, sought, read)
        _store(after[b, n], state)
        reads[b, n * room : (n + 1) * room] = read[:room]
        if by_content:
            agreement[b, n] = _cosine(read[room:], found)
        else:
            agreement[b, n] = zero
            for j in range(marks):
                agreement[b, n] += read[room + j] * math.tanh(signature[b, n * marks + j]) / like.dtype.type(marks)


@_compiled
def _let_through(like, stored, weights, marks, gates, learned, agreement, reads, team):
    """Of this thread's part of the rows: reads (B, N*(d-f)) as far as they are trusted and let through, and what always speaks.

    gates (B, N) before their sigmoid, learned (B, N*P) before their softmax, agreement (B, N).
    """
    heads = gates.shape[1]
    room, always = reads.shape[1] // heads, learned.shape[1] // heads
    persistent = carray(pointer(weights[PERSISTENT]), (heads, always, room), stored.dtype)
    gate = _wide(carray(pointer(weights[GATE]), (1,), stored.dtype)[0])
    floor = carray(pointer(weights[MAX_STRENGTH]), (2,), like.dtype)[1]
    trust = np.empty(3 if marks > 0 else 0, like.dtype)
    _widen_into(trust, carray(pointer(weights[TRUST]), trust.shape, stored.dtype))
    shares = np.empty(always, like.dtype)
    zero, one = like.dtype.type(0), like.dtype.type(1)
    first, until = _part(reads.shape[0], team, 1)
    for b in range(first, until):
        together = zero
        for n in range(heads):
            together += max(zero, agreement[b, n]) / like.dtype.type(heads)
        for n in range(heads):
            opened = gate * _sigmoid(gates[b, n])
            if marks > 0:
                opened *= _sigmoid(trust[0] * agreement[b, n] + trust[1] * together + trust[2])
            read = reads[b, n * room : (n + 1) * room]
            for j in range(room):
                read[j] *= like.dtype.type(opened)
            if always > 0:
                _softmax_into(shares, learned[b, n * always : (n + 1) * always])
                for p in range(always):
                    share = gate * max((shares[p] - floor) / (one - floor), zero)  # in this order NaN stays
                    for j in range(room):
                        read[j] += share * _wide(persistent[n, p, j])


# What the threads share, arrays (B, ...) one after the other: their order, see `shared_widths`.
(
    NORMED, EMBEDDED, KEYS, PUT_AT, DECIDED, ASKED, WANTED, SIGNED, SIGNATURE_ASKED, LEARNED, NEXT_STRENGTH, NOW_STRENGTH,
    GATES, VALUES, READS, AGREEMENT, SUMS, NUM_SHARED,
) = range(18)  # fmt: skip


@_compiled
def shared_widths(weights, sizes):
    """Numbers of a row in each of the arrays that the threads of a team share."""
    D, E, others, heads, count, size = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
    rank, always, marks = sizes[6], sizes[7], sizes[11]
    by_content = weights[SHARPNESS] != 0
    places = 0 if by_content else heads * count
    strengths = 2 * heads if by_content else heads
    decided = rank if rank > 0 else heads * count
    return (
        D, E, D + others + E, places if rank > 0 else 0, decided, rank, places, heads * marks, heads * marks,
        heads * always, strengths, strengths, heads, heads * (size - marks), heads * (size - marks), heads, D,
    )  # fmt: skip


# What a call of `site_one` is given, as numbers: the place of each in `data`. Those after SIZES are addresses of arrays.
(
    WEIGHTS_AT, SIZES_AT, BATCH, THREAD_NUM, NUM_THREADS, BARRIER, SHARED,
    HIDDEN, EMBEDS, FURTHER, VISIBLE, STARTS, ADDRESS, STRENGTH, TOLD, REPLACING, SLOTS,
    RECALLED, AFTER, LAST_ADDRESS, LAST_STRENGTH, LAST_TOLD, LAST_REPLACING, DONE, DATA_SIZE,
) = range(25)  # fmt: skip


@_compiled
def _meet(data):
    """Wait until all threads of the team are here; a thread by itself has nobody to wait for."""
    if data[BARRIER] != 0:
        call(data[BARRIER])


@_compiled
def _shared(like, data, widths, which):
    """One of the arrays that the threads share."""
    at = data[SHARED]
    for i in range(which):
        at += data[BATCH] * widths[i] * like.itemsize
    return carray(pointer(at), (data[BATCH], widths[which]), like.dtype)


@_compiled
def site_one(like, stored, stream, data):
    """One token of all rows, by the equations of `GRUMemoryWithDecay`; every thread of a team calls it, and does its part.

    `like`, `stored` and `stream` are there for their types: that of the state and of all that is computed, that of the
    weights, and that of the hidden states. What is bfloat16 comes as uint16, see `_wide`. `data` has the addresses of
    OpenMP's functions (BARRIER 0 for a thread by itself), of what the threads share (`shared_widths` numbers a row), and of
    arrays that lie row by row:

    - hidden (B, D), embeds (B, E) and further (B, `key_size`), like `stream`; visible and starts (B,) are bool. Address 0
      stands for embeds of zeros, for all rows visible, for none that begins a turn.
    - the state: address (B, r) or (B, N*S) and strength (B, N), what the token before decided, strength (B, 2N) and told,
      replacing (B, N) if slots are found by their content; slots (B, N, S, d).
    - recalled (B, D), like `stream`, gets hidden with what is recalled added; after and those that begin with last_ get the
      new state.

    `weights` are addresses too, see `WEIGHTS`, 0 for those that this site does not have. `sizes` are D, E, `key_size`, N,
    S, d, r, P, the two of the decay, 1 if every token ticks, and f.
    """
    batch = data[BATCH]
    weights = carray(pointer(data[WEIGHTS_AT]), (RULES + 1,), np.int64)
    sizes = carray(pointer(data[SIZES_AT]), (12,), np.int64)
    D, E, others, heads, count, size = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
    rank, every, marks = sizes[6], sizes[10] != 0, sizes[11]
    ranked = rank > 0
    kept = rank if ranked else heads * count
    by_content = weights[SHARPNESS] != 0
    strengths = 2 * heads if by_content else heads
    told_rows = batch if by_content else 0
    team = (np.int64(0), np.int64(1))
    if data[BARRIER] != 0:
        team = (call_for_number(data[THREAD_NUM]), call_for_number(data[NUM_THREADS]))

    hidden = carray(pointer(data[HIDDEN]), (batch, D), stream.dtype)
    embeds = carray(pointer(data[EMBEDS]), (batch, E), stream.dtype)
    further = carray(pointer(data[FURTHER]), (batch, others), stream.dtype)
    shown = carray(pointer(data[VISIBLE]), (batch,), np.bool_)
    starts = carray(pointer(data[STARTS]), (batch,), np.bool_)
    before = carray(pointer(data[ADDRESS]), (batch, kept), like.dtype)
    before_strength = carray(pointer(data[STRENGTH]), (batch, strengths), like.dtype)
    slots = carray(pointer(data[SLOTS]), (batch, heads, count, size), like.dtype)
    after = carray(pointer(data[AFTER]), (batch, heads, count, size), like.dtype)
    recalled = carray(pointer(data[RECALLED]), (batch, D), stream.dtype)
    last_address = carray(pointer(data[LAST_ADDRESS]), (batch, kept), like.dtype)
    last_strength = carray(pointer(data[LAST_STRENGTH]), (batch, strengths), like.dtype)
    told_before = carray(pointer(data[TOLD]), (told_rows, heads), like.dtype)
    last_told = carray(pointer(data[LAST_TOLD]), (told_rows, heads), like.dtype)
    replacing = carray(pointer(data[REPLACING]), (told_rows, heads), like.dtype)
    last_replacing = carray(pointer(data[LAST_REPLACING]), (told_rows, heads), like.dtype)
    decay = carray(pointer(weights[DECAY]), (sizes[8], sizes[9]), like.dtype)

    widths = np.empty(NUM_SHARED, np.int64)
    for i, width in enumerate(shared_widths(weights, sizes)):
        widths[i] = width
    normed = _shared(like, data, widths, NORMED)
    embedded = _shared(like, data, widths, EMBEDDED)
    keys = _shared(like, data, widths, KEYS)
    address = _shared(like, data, widths, PUT_AT)
    decided = _shared(like, data, widths, DECIDED)
    asked = _shared(like, data, widths, ASKED)
    wanted = _shared(like, data, widths, WANTED)
    signed = _shared(like, data, widths, SIGNED)
    signature = _shared(like, data, widths, SIGNATURE_ASKED)
    learned = _shared(like, data, widths, LEARNED)
    next_strength = _shared(like, data, widths, NEXT_STRENGTH)
    strength = _shared(like, data, widths, NOW_STRENGTH)
    gates = _shared(like, data, widths, GATES)
    values = _shared(like, data, widths, VALUES)
    reads = _shared(like, data, widths, READS)
    agreement = _shared(like, data, widths, AGREEMENT)
    sums = _shared(like, data, widths, SUMS)

    visible, ticks = np.ones(batch, np.bool_), np.zeros(batch, np.bool_)
    for b in range(batch):
        if data[VISIBLE] != 0:
            visible[b] = shown[b]
        ticks[b] = visible[b] and (every or (data[STARTS] != 0 and starts[b]))
    first, until = _part(batch, team, 1)
    for b in range(first, until):
        _norm_into(normed[b], hidden[b], visible[b])
        if data[EMBEDS] != 0:
            _norm_into(embedded[b], embeds[b], visible[b])
        else:
            embedded[b] = like.dtype.type(0)
        keys[b, :D] = normed[b]
        if others > 0:
            _norm_into(keys[b, D : D + others], further[b], visible[b])
        keys[b, D + others :] = embedded[b]
        strength[b] = before_strength[b]
    _meet(data)

    # Where this token is written was decided by the one before it, and this one decides for the next.
    if ranked:
        _times(stored, address, weights[KEY], weights[KEY_BIAS], before, team)
        _times(stored, decided, weights[KEY_RANK], weights[KEY_RANK_BIAS], keys, team)
        _times(stored, asked, weights[QUERY_RANK], weights[QUERY_RANK_BIAS], keys, team)
    else:
        address, asked = before, keys
        _times(stored, decided, weights[KEY], weights[KEY_BIAS], keys, team)
    _times(stored, signed, weights[SIGNATURE], 0, before, team)
    _times(stored, next_strength, weights[STRENGTH_KEY], weights[STRENGTH_KEY_BIAS], keys, team)
    _add_times(stored, strength, weights[STRENGTH_EMBED], keys if ranked else embedded, team)
    _times(stored, gates, weights[READ_GATE], weights[READ_GATE_BIAS], keys if ranked else normed, team)
    _times(stored, values, weights[VALUE_EMBED], 0, embedded, team)
    _add_times(stored, values, weights[VALUE_HIDDEN], normed, team)
    _meet(data)

    for b in range(first, until):
        if ranked:
            _norm_into(decided[b], decided[b], True)
            _norm_into(asked[b], asked[b], True)
        last_address[b] = decided[b] if visible[b] else before[b]
        last_strength[b] = next_strength[b] if visible[b] else before_strength[b]
    if ranked:
        _meet(data)
    asking, asking_bias = (QUERY, QUERY_BIAS) if weights[QUERY] != 0 else (KEY, KEY_BIAS)
    _times(stored, wanted, weights[asking], weights[asking_bias], asked, team)
    _times(stored, signature, weights[SIGNATURE], 0, asked, team)
    _times(stored, learned, weights[PERSISTENT_QUERY], weights[PERSISTENT_QUERY_BIAS], asked, team)
    _meet(data)

    _write_and_read_one(
        like, stored, weights, decay, slots, after, ticks, visible, values, address, strength, wanted, signed, signature,
        told_before, last_told, replacing, last_replacing, reads, agreement, team,
    )  # fmt: skip
    _meet(data)
    _let_through(like, stored, weights, marks, gates, learned, agreement, reads, team)
    _meet(data)

    left, right = _part(D, team, 4)
    for b in range(batch):
        _widen_into(sums[b, left:right], hidden[b, left:right])
    _add_times(stored, sums, weights[OUTPUT], reads, team)
    for b in range(batch):
        _narrow_into(recalled[b, left:right], sums[b, left:right])


@functools.cache
def entry(dtype, stored, stream):
    """`site_one` for three types (their names) as a C function of the address of `data`, in which it sets DONE."""
    like, stored_like, stream_like, sources = np.zeros(1, dtype), np.zeros(1, stored), np.zeros(1, stream), SOURCES

    def enter(data_at):
        data = carray(pointer(data_at), (DATA_SIZE,), np.int64)
        mode = without_denormals()
        site_one(like, stored_like, stream_like, data)
        with_denormals_as(mode)
        if len(sources) > 0:  # which makes them part of what this is kept under
            data[DONE] = 1

    signature = types.void(types.intp)
    compiled = cfunc(signature, cache=is_kept(site_one), **_OPTIONS)(enter)
    function = FUNCTION(compiled.address)
    function.compiled = compiled  # which owns the machine code
    return function

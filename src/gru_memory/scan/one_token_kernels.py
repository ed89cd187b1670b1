"""Machine code for one token of a whole memory site on a CPU. No gradients.

See `gru_memory.one_token`, which calls this, and `kernels` for how it is compiled and written. Matrix products are part
of it: with a few rows they only wait for the weights, which these loops read about twice as fast as BLAS does. Arrays
come as addresses: from one token to the next a model has pushed everything out of the caches, and to look into 40
objects one by one then takes as long as the arithmetic.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .kernels import _OPTIONS, _addressed, _compiled, _decay, _gru_cell, _load, _product, _store, _wide, _write_and_read
from .place_kernels import place, squared_lengths

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


@intrinsic
def _pointer(context, address):
    """A number as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


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
def _add_times(stored, out, weight_at, vectors):
    """out (B, k) += vectors (B, m) @ weight (k, m) transposed. The weight comes by once, for all rows."""
    weight = carray(_pointer(weight_at), (out.shape[1], vectors.shape[1]), stored.dtype)
    zero = out.dtype.type(0)
    rows = vectors.shape[0]
    if rows == 1:
        _product(out[0], weight, vectors[0])
        return
    k = 0
    while k + 4 <= weight.shape[0]:
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
    if k < weight.shape[0]:
        for b in range(rows):
            _product(out[b, k:], weight[k:], vectors[b])


@_compiled
def _times(stored, weight_at, bias_at, count, vectors):
    """vectors (B, m) @ weight (`count`, m) transposed + bias (`count`,): (B, `count`). No bias is at address 0."""
    out = np.zeros((vectors.shape[0], count), vectors.dtype)
    if bias_at != 0:
        bias = carray(_pointer(bias_at), (count,), stored.dtype)
        for b in range(out.shape[0]):
            _widen_into(out[b], bias)
    _add_times(stored, out, weight_at, vectors)
    return out


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
    like,
    stored,
    weights,
    decay,
    slots,
    after,
    ticks,
    visible,
    values,
    address,
    strength,
    wanted,
    gates,
    learned,
    signed,
    signature,
    told_before,
    told_now,
    replacing,
    replacing_next,
    reads,
):
    """The recurrence and the read. Arrays as in `site_one`, those of the tokens for its rows alone.

    values (B, N*(d-f)); address, wanted (B, N*S), unless slots are found by their content, and learned (B, N*P) before their
    softmax; strength (B, N), or (B, 2N) for slots found by their content, and gates (B, N) before their sigmoid; signed
    (B, N*f), the signature to write, and signature (B, N*f), the one asked for, before their tanh; told_before (B, N) says how
    surely the token before was told, replacing (B, N) how far each may replace another; slots, after (B, N, S, d). Fills
    after, told_now, replacing_next (B, N) and reads (B, N*(d-f)).
    """
    rows, heads, count, size = slots.shape
    marks = signed.shape[1] // heads  # floats of a signature
    room = size - marks
    always = learned.shape[1] // heads
    gru = weights[WEIGHT_HH] != 0
    wide = 3 * size if gru else 0
    weight_ih = carray(_pointer(weights[WEIGHT_IH]), (heads, wide, size), stored.dtype)
    weight_hh = carray(_pointer(weights[WEIGHT_HH]), (heads, wide, size), stored.dtype)
    bias_ih = carray(_pointer(weights[BIAS_IH]), (heads, wide), stored.dtype)
    bias_hh = carray(_pointer(weights[BIAS_HH]), (heads, wide), stored.dtype)
    persistent = carray(_pointer(weights[PERSISTENT]), (heads, always, room), stored.dtype)
    gate = _wide(carray(_pointer(weights[GATE]), (1,), stored.dtype)[0])
    limits = carray(_pointer(weights[MAX_STRENGTH]), (2,), like.dtype)
    most, floor = limits[0], limits[1]
    by_content = weights[SHARPNESS] != 0
    sharpness = carray(_pointer(weights[SHARPNESS]), (1 if by_content else 0,), stored.dtype)
    rules = carray(_pointer(weights[RULES]), (5,), like.dtype)
    zero, one = like.dtype.type(0), like.dtype.type(1)

    state = np.empty((size, count), like.dtype)
    where, put, sought = np.empty(count, like.dtype), np.empty(count, like.dtype), np.empty(count, like.dtype)
    given, recurrent = np.empty(wide, like.dtype), np.empty(wide, like.dtype)
    cell = np.empty((5, size), like.dtype)
    shares = np.empty(always, like.dtype)
    value, read = np.empty(size, like.dtype), np.empty(size, like.dtype)
    agreement = np.zeros((rows, heads), like.dtype)
    signatures, amount = np.empty((count, marks), like.dtype), np.empty(count, like.dtype)
    key, found = np.empty(marks, like.dtype), np.empty(marks, like.dtype)
    left = np.empty(count, like.dtype)
    for n in range(heads):  # the rows of a head one after the other, so that they share the weights of its cell
        for b in range(rows):
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
                for j in range(marks):
                    agreement[b, n] += read[room + j] * math.tanh(signature[b, n * marks + j]) / like.dtype.type(marks)
    trust = np.empty(3 if marks > 0 else 0, like.dtype)
    _widen_into(trust, carray(_pointer(weights[TRUST]), trust.shape, stored.dtype))
    for b in range(rows):
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


@_compiled
def site_one(
    like, stored, stream, weights, sizes, hidden_at, embeds_at, further_at, visible_at, starts_at, address_at, strength_at,
    told_at, replacing_at, slots_at,
    recalled_at, after_at, last_address_at, last_strength_at, last_told_at, last_replacing_at, batch, first, last,
):  # fmt: skip
    """One token of the rows `first` to `last` of a batch, by the equations of `GRUMemoryWithDecay`.

    `like`, `stored` and `stream` are there for their types: that of the state and of all that is computed, that of the
    weights, and that of the hidden states. What is bfloat16 comes as uint16, see `_wide`. The arguments after `sizes` are
    numbers, most of them addresses of arrays that lie row by row:

    - hidden (B, D), embeds (B, E) and further (B, `key_size`), like `stream`; visible and starts (B,) are bool. Address 0
      stands for embeds of zeros, for all rows visible, for none that begins a turn.
    - the state: address (B, r) or (B, N*S) and strength (B, N), what the token before decided, strength (B, 2N) and told,
      replacing (B, N) if slots are found by their content; slots (B, N, S, d).
    - recalled (B, D), like `stream`, gets hidden with what is recalled added; after and those that begin with last_ get the
      new state.

    `weights` are addresses too, see `WEIGHTS`, 0 for those that this site does not have. `sizes` are D, E, `key_size`, N,
    S, d, r, P, the two of the decay, 1 if every token ticks, and f.
    """
    D, E, others, heads, count, size = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]
    rank, always, every, marks = sizes[6], sizes[7], sizes[10] != 0, sizes[11]
    room = size - marks
    ranked = rank > 0
    kept = rank if ranked else heads * count
    rows = last - first

    hidden = carray(_pointer(hidden_at), (batch, D), stream.dtype)
    embeds = carray(_pointer(embeds_at), (batch, E), stream.dtype)
    further = carray(_pointer(further_at), (batch, others), stream.dtype)
    shown = carray(_pointer(visible_at), (batch,), np.bool_)
    starts = carray(_pointer(starts_at), (batch,), np.bool_)
    before = carray(_pointer(address_at), (batch, kept), like.dtype)
    by_content = weights[SHARPNESS] != 0
    strengths = 2 * heads if by_content else heads
    before_strength = carray(_pointer(strength_at), (batch, strengths), like.dtype)
    slots = carray(_pointer(slots_at), (batch, heads, count, size), like.dtype)
    after = carray(_pointer(after_at), (batch, heads, count, size), like.dtype)
    recalled = carray(_pointer(recalled_at), (batch, D), stream.dtype)
    last_address = carray(_pointer(last_address_at), (batch, kept), like.dtype)
    last_strength = carray(_pointer(last_strength_at), (batch, strengths), like.dtype)
    told_before = carray(_pointer(told_at), (batch if by_content else 0, heads), like.dtype)
    last_told = carray(_pointer(last_told_at), (batch if by_content else 0, heads), like.dtype)
    replacing = carray(_pointer(replacing_at), (batch if by_content else 0, heads), like.dtype)
    last_replacing = carray(_pointer(last_replacing_at), (batch if by_content else 0, heads), like.dtype)
    decay = carray(_pointer(weights[DECAY]), (sizes[8], sizes[9]), like.dtype)

    visible, ticks = np.ones(rows, np.bool_), np.zeros(rows, np.bool_)
    normed, told = np.empty((rows, D), like.dtype), np.zeros((rows, E), like.dtype)
    keys = np.empty((rows, D + others + E), like.dtype)
    for i in range(rows):
        b = first + i
        if visible_at != 0:
            visible[i] = shown[b]
        ticks[i] = visible[i] and (every or (starts_at != 0 and starts[b]))
        _norm_into(normed[i], hidden[b], visible[i])
        if embeds_at != 0:
            _norm_into(told[i], embeds[b], visible[i])
        keys[i, :D] = normed[i]
        if others > 0:
            _norm_into(keys[i, D : D + others], further[b], visible[i])
        keys[i, D + others :] = told[i]

    # Where this token is written was decided by the one before it, and this one decides for the next.
    held = before[first:last]
    places = 0 if by_content else heads * count
    if ranked:
        address = _times(stored, weights[KEY], weights[KEY_BIAS], places, held)
        decided = _times(stored, weights[KEY_RANK], weights[KEY_RANK_BIAS], rank, keys)
        asked = _times(stored, weights[QUERY_RANK], weights[QUERY_RANK_BIAS], rank, keys)
        for i in range(rows):
            _norm_into(decided[i], decided[i], True)
            _norm_into(asked[i], asked[i], True)
    else:
        address, asked = held, keys
        decided = _times(stored, weights[KEY], weights[KEY_BIAS], heads * count, keys)
    asking, asking_bias = (QUERY, QUERY_BIAS) if weights[QUERY] != 0 else (KEY, KEY_BIAS)
    wanted = _times(stored, weights[asking], weights[asking_bias], places, asked)
    signed = _times(stored, weights[SIGNATURE], 0, heads * marks, held)
    signature = _times(stored, weights[SIGNATURE], 0, heads * marks, asked)
    learned = _times(stored, weights[PERSISTENT_QUERY], weights[PERSISTENT_QUERY_BIAS], heads * always, asked)
    next_strength = _times(stored, weights[STRENGTH_KEY], weights[STRENGTH_KEY_BIAS], strengths, keys)
    strength = before_strength[first:last].copy()
    _add_times(stored, strength, weights[STRENGTH_EMBED], keys if ranked else told)
    gates = _times(stored, weights[READ_GATE], weights[READ_GATE_BIAS], heads, keys if ranked else normed)
    values = _times(stored, weights[VALUE_EMBED], 0, heads * room, told)
    _add_times(stored, values, weights[VALUE_HIDDEN], normed)
    for i in range(rows):
        b = first + i
        last_address[b] = decided[i] if visible[i] else before[b]
        last_strength[b] = next_strength[i] if visible[i] else before_strength[b]

    reads = np.empty((rows, heads * room), like.dtype)
    _write_and_read_one(
        like, stored, weights, decay, slots[first:last], after[first:last], ticks, visible, values, address, strength,
        wanted, gates, learned, signed, signature, told_before[first:last], last_told[first:last],
        replacing[first:last], last_replacing[first:last], reads,
    )  # fmt: skip
    sums = np.empty((rows, D), like.dtype)
    for i in range(rows):
        _widen_into(sums[i], hidden[first + i])
    _add_times(stored, sums, weights[OUTPUT], reads)
    for i in range(rows):
        _narrow_into(recalled[first + i], sums[i])

"""`GRUMemoryWithDecay` on its own."""

import math

import pytest
import torch
from tiny import CELLS, CLOCKS, assert_close, one_thread  # noqa: F401
from torch import nn
from torch.nn import functional as F

from gru_memory import GRUMemoryWithDecay, MemoryConfig

D = 12
NEVER, ALWAYS = -1e4, 1e4  # biases of the strength that no input moves


FORMS = pytest.mark.parametrize(
    "form",
    ({}, {"address_rank": 5, "signature_size": 2}, {"address_rank": 5, "persistent_slots": 3}, {"persistent_slots": 2}),
    ids=lambda form: ",".join(form) or "plain",
)


def site(cell="gru", gate_init=1.0, seed=0, **settings):
    """A small site with random weights everywhere, in float64."""
    torch.manual_seed(seed)
    shape = {"num_heads": 2, "num_slots": 4, "slot_size": 6, "decay": 0.9}
    memory = GRUMemoryWithDecay(D, cell=cell, gate_init=gate_init, **{**shape, **settings}).double()
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            if name != "gate":
                parameter += torch.randn_like(parameter) / 3
    return memory


def stream(length=11, rows=2, seed=1):
    torch.manual_seed(seed)
    return torch.randn(rows, length, D).double(), torch.randn(rows, length, D).double()


def set_strength(memory, bias):
    with torch.no_grad():
        memory.strength_key.bias.fill_(bias)


def random_state(memory, rows=2, seed=2):
    torch.manual_seed(seed)
    state = memory.initial_state(rows)
    return {**state, "slots": torch.rand_like(state["slots"]) * 2 - 1}


def assert_same(got, wanted, tolerance=1e-10):
    assert set(got) == set(wanted)
    for key in wanted:
        assert_close(got[key], wanted[key], tolerance)


@pytest.mark.parametrize("decay", (1.0, 0.8))
def test_one_slot_is_a_gru_cell(decay):
    heads, d, length = 3, 5, 9
    torch.manual_seed(0)
    cells = [nn.GRUCell(d, d).double() for _ in range(heads)]
    memory = GRUMemoryWithDecay(
        heads * d, num_heads=heads, num_slots=1, slot_size=d, decay=decay, gate_init=1.0
    ).double()
    set_strength(memory, ALWAYS)
    with torch.no_grad():
        memory.value_hidden.weight.copy_(torch.eye(heads * d))  # head n sees its own d features
        memory.output.weight.copy_(torch.eye(heads * d))
    for head, cell in enumerate(cells):
        memory.load_gru_cell(cell, head)
    x = torch.randn(2, length, heads * d, dtype=torch.float64)
    y, state = memory(x)

    value = F.rms_norm(x, x.shape[-1:], eps=1e-6)
    gate = torch.sigmoid(memory.read_gate(value))  # (B, T, N)
    for head, cell in enumerate(cells):
        part = slice(head * d, (head + 1) * d)
        content = torch.zeros(2, d, dtype=torch.float64)
        for t in range(length):
            content = cell(value[:, t, part], decay * content)
            assert_close(y[:, t, part], x[:, t, part] + gate[:, t, head, None] * content, 1e-11)
        assert_close(state["slots"][:, head, 0], content, 1e-11)


def test_weights_of_another_gru_cell_are_refused():
    with pytest.raises(ValueError, match="slot size"):
        site().load_gru_cell(nn.GRUCell(6, 7))
    with pytest.raises(ValueError, match="gru"):
        site("mingru").load_gru_cell(nn.GRUCell(6, 6))


def test_a_gru_cell_without_bias_loads():
    memory = site()
    memory.load_gru_cell(nn.GRUCell(6, 6, bias=False), head=1)
    assert not memory.bias_ih[1].any()
    assert memory.bias_ih[0].any()


@pytest.mark.parametrize("cell", CELLS)
def test_slots_stay_within_one_for_100_000_steps(cell):
    torch.manual_seed(0)
    memory = GRUMemoryWithDecay(4, num_heads=1, num_slots=2, slot_size=2, decay=1.0, cell=cell, gate_init=1.0)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(torch.randn_like(parameter) * 5)
        state, largest = None, 0.0
        for _ in range(100):
            x = torch.randn(1, 1000, 4) * 10.0 ** torch.randint(-3, 6, (1, 1000, 1))
            y, state = memory(x, token_embeds=-x, state=state)
            assert torch.isfinite(y).all()
            largest = max(largest, state["slots"].abs().max().item())
    rounding = 0.0 if cell == "gru" else 1e-5  # differences of float32 logarithms; it does not add up
    assert 0.9 < largest <= 1.0 + rounding


@pytest.mark.parametrize("cell", CELLS)
def test_without_writes_only_decay_is_left(cell):
    memory = site(cell, decay=0.93)
    set_strength(memory, NEVER)
    x, e = stream(40)
    before = random_state(memory)
    _, after = memory(x, e, before)
    assert_close(after["slots"], 0.93**40 * before["slots"], 1e-12)


def test_half_life():
    decay = 0.5 ** (1 / 20)
    assert round(math.log(0.5) / math.log(decay), 9) == 20
    memory = site(decay=decay)
    set_strength(memory, NEVER)
    before = random_state(memory)
    _, after = memory(*stream(20), before)
    assert_close(after["slots"], before["slots"] / 2, 1e-9)


@pytest.mark.parametrize(
    ("decay", "table"),
    [
        ([0.5, 0.9], [[0.5] * 4, [0.9] * 4]),  # one a head
        ([0.5, 0.6, 0.7, 1], [[0.5, 0.6, 0.7, 1]] * 2),  # one a slot
        ([[0.5, 0.6, 0.7, 0.8], [0.9, 1.0, 0.2, 0.3]], [[0.5, 0.6, 0.7, 0.8], [0.9, 1.0, 0.2, 0.3]]),
    ],
)
def test_decay_of_each_head_or_slot(decay, table):
    memory = site(decay=decay)
    set_strength(memory, NEVER)
    before = random_state(memory)
    _, after = memory(*stream(3), before)
    assert_close(after["slots"], torch.tensor(table).double().pow(3).unsqueeze(-1) * before["slots"], 1e-6)


@pytest.mark.parametrize("build", (lambda decay: site(decay=decay), lambda decay: MemoryConfig(decay=decay)))
@pytest.mark.parametrize("decay", (0, 0.0, -0.5, 1.5, math.nan, math.inf, "0.9", None, [0.9, 0.0], [], [0.9] * 5))
def test_impossible_decays_are_refused(build, decay):
    with pytest.raises(ValueError, match="decay"):
        build(decay)


def test_decay_is_not_rounded_with_the_model():
    memory = GRUMemoryWithDecay(D, num_heads=1, num_slots=1, slot_size=2, decay=0.999).bfloat16()
    set_strength(memory, NEVER)
    before = {**memory.initial_state(1), "slots": torch.ones(1, 1, 1, 2)}
    _, after = memory(torch.randn(1, 100, D).bfloat16(), state=before)
    assert_close(after["slots"], torch.full((1, 1, 1, 2), 0.999**100), 1e-5)


@FORMS
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("clock", CLOCKS)
def test_whole_is_chunks_is_steps(cell, clock, form):
    memory = site(cell, decay_every=clock, **form)
    x, e = stream(37)
    starts = torch.zeros(2, 37, dtype=torch.bool)
    starts[0, [0, 5, 30]] = starts[1, [2, 21]] = True
    whole, after = memory(x, e, turn_starts=starts)
    for sizes in ([7, 1, 20, 9], [1] * 37):
        state, parts = None, []
        for part_x, part_e, part_s in zip(x.split(sizes, 1), e.split(sizes, 1), starts.split(sizes, 1), strict=True):
            part, state = memory(part_x, part_e, state, turn_starts=part_s)
            parts.append(part)
        assert_close(torch.cat(parts, 1), whole)
        assert_same(state, after)


@FORMS
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("clock", CLOCKS)
def test_masked_positions_hold_the_state(cell, clock, form):
    memory = site(cell, decay_every=clock, **form)
    x, e = stream(20)
    mask = torch.ones(20, dtype=torch.bool)
    mask[[0, 1, 6, 7, 19]] = False
    starts = torch.zeros(2, 20, dtype=torch.bool)
    starts[:, [2, 10]] = True
    padded_x, padded_e = x.clone(), e.clone()
    padded_x[:, ~mask] = math.nan
    padded_e[:, ~mask] = math.nan
    got, state = memory(padded_x, padded_e, random_state(memory), mask.expand(2, -1), starts)
    wanted, after = memory(x[:, mask], e[:, mask], random_state(memory), turn_starts=starts[:, mask])
    assert_close(got[:, mask], wanted)
    assert_same(state, after)


@FORMS
@pytest.mark.parametrize("length", (1, 5))
def test_an_all_masked_stretch_returns_the_state_it_got(length, form):
    memory = site(**form)
    before = random_state(memory)
    _, after = memory(*stream(length), before, torch.zeros(2, length, dtype=torch.bool), torch.ones(2, length) > 0)
    for key in before:
        assert torch.equal(after[key], before[key])


@FORMS
def test_rows_of_a_batch_do_not_meet(form):
    memory = site(**form)
    x, e = stream(9, rows=3)
    whole, state = memory(x, e)
    for row in range(3):
        alone, own = memory(x[row : row + 1], e[row : row + 1])
        assert_close(whole[row : row + 1], alone)
        assert_same({k: v[row : row + 1] for k, v in state.items()}, own)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gate_zero_is_the_identity_bit_for_bit(cell, dtype):
    memory = site(cell, gate_init=0.0).to(dtype)
    x, e = (t.to(dtype) for t in stream())
    y, state = memory(x, e)
    assert torch.equal(y, x)
    assert state["slots"].abs().max() > 0.01  # it listens all the same
    assert state["slots"].dtype == torch.float32


def test_the_write_address_comes_from_the_visible_position_before():
    """With equal weights for keys and queries, what is asked at a position is where the next token is stored."""
    memory = site()
    memory.query.load_state_dict(memory.key.state_dict())
    mask = torch.tensor([[True, True, False, False, True, True]])

    def prepare(x, e):
        return memory.prepare(x, e, memory.initial_state(1), mask, None, None)

    x, e = stream(6, rows=1)
    prepared = prepare(x, e)
    inputs, last = prepared.inputs, prepared.last_key
    for position, before in ((1, 0), (4, 1), (5, 4)):  # 2 and 3 are not there
        assert_close(inputs.address[0, position], inputs.query[0, before])
    assert_close(inputs.address[0, 0], memory.key.bias.view(2, 4).softmax(-1))  # nothing was before
    assert_close(last["address"].softmax(-1), inputs.query[:, 5])
    assert not inputs.write[0, 2:4].any()

    changed_x, changed_e = x.clone(), e.clone()
    changed_x[0, 4] += 1.0  # its own hidden state says nothing about where or whether a token is written
    assert torch.equal(prepare(changed_x, e)[0].write[0, :5], inputs.write[0, :5])
    assert not torch.equal(prepare(changed_x, e)[0].write[0, 5], inputs.write[0, 5])
    changed_e[0, 4] += 1.0  # the token itself does say whether
    assert torch.equal(prepare(x, changed_e)[0].address[0, :5], inputs.address[0, :5])
    assert not torch.allclose(prepare(x, changed_e)[0].write[0, 4], inputs.write[0, 4])


def test_what_is_stored_under_a_key_comes_back_where_it_is_asked_for():
    torch.manual_seed(0)
    memory = GRUMemoryWithDecay(64, num_heads=4, num_slots=16, slot_size=16, decay=1.0, cell="mingru", gate_init=1.0)
    set_strength(memory, 4.0)
    # ask, alice, other, bob, ask: at the end the embedding of alice must be nearer than that of bob
    hidden, alice, bob, other = torch.randn(4, 64)
    x = torch.stack([hidden * 3, other, -hidden * 3, other, hidden * 3])[None]
    e = torch.stack([other, alice, other, bob, other])[None]
    recalled = (memory(x, e)[0] - x)[0, -1]
    similar = F.cosine_similarity(recalled[None], torch.stack([alice, bob, other]))
    assert similar.argmax() == 0
    assert similar[0] > similar[1] + 0.1


def test_the_turn_clock_ticks_once_a_turn():
    memory = site(decay=0.5, decay_every="turn")
    set_strength(memory, NEVER)
    starts = torch.zeros(2, 11, dtype=torch.bool)
    starts[0, [0, 4, 9]] = True
    starts[1, 3] = True
    before = random_state(memory)
    _, after = memory(*stream(), before, turn_starts=starts)
    assert_close(after["slots"], torch.tensor([0.125, 0.5]).double().view(2, 1, 1, 1) * before["slots"], 1e-12)
    _, unticked = memory(*stream(), before)
    assert_close(unticked["slots"], before["slots"], 1e-12)


def test_key_states_join_the_address_only():
    memory = site(key_size=7)
    x, e = stream()
    torch.manual_seed(3)
    keys = torch.randn(2, 11, 7).double()
    one = memory.prepare(x, e, memory.initial_state(2), None, None, keys).inputs
    two = memory.prepare(x, e, memory.initial_state(2), None, None, keys * -1).inputs
    assert not torch.allclose(one.address[:, 1:], two.address[:, 1:])
    assert not torch.allclose(one.query, two.query)
    assert torch.equal(one.values, two.values)
    with pytest.raises(ValueError, match="key_states"):
        memory(x, e)
    with pytest.raises(ValueError, match="key_states"):
        memory(x, e, key_states=keys[..., :6])


@pytest.mark.parametrize("cell", ("gru", "mingru"))
def test_a_write_leaves_what_max_strength_says(cell):
    """One slot, so every write falls on it: H = (1 - b_max) H + b_max C at the greatest strength."""
    whole, part = (site(cell, num_slots=1, decay=1.0, max_strength=most) for most in (1.0, 0.75))
    x, e = stream(1)
    state = random_state(whole)
    for memory in (whole, part):
        set_strength(memory, ALWAYS)
        state["strength"] = memory.initial_state(2)["strength"]
    content = whole(x, e, state)[1]["slots"]
    assert_close(part(x, e, state)[1]["slots"], 0.25 * state["slots"] + 0.75 * content)


def test_a_rank_addresses_by_numbers_of_fixed_length():
    memory = site(address_rank=5)
    x, e = stream()
    loud = site(address_rank=5)
    with torch.no_grad():
        loud.key_rank.weight *= 7  # how long a key is says nothing
        loud.key_rank.bias *= 7
    one, two = (m.prepare(x, e, m.initial_state(2), None, None, None) for m in (memory, loud))
    assert_close(one.inputs.address, two.inputs.address, 1e-5)
    assert one.last_key["address"].shape == (2, 5)
    assert_close(one.last_key["address"].pow(2).mean(-1), torch.ones(2).double(), 1e-4)


def signed_site(**settings):
    return site("mingru", seed=5, address_rank=5, signature_size=3, **settings)


def test_a_read_counts_as_far_as_its_signature_agrees():
    """The equation of trust, head by head, on reads and signatures drawn at random."""
    memory = signed_site()
    with torch.no_grad():
        memory.trust.copy_(torch.tensor([3.0, 5.0, -1.0]))
    reads, asked = torch.randn(4, 2, 6).double(), torch.randn(4, 2, 3).double().tanh()
    agreement = [[sum(reads[i, n, 3:] * asked[i, n]) / 3 for n in range(2)] for i in range(4)]
    for i in range(4):
        together = sum(max(0, m) for m in agreement[i]) / 2
        for n in range(2):
            wanted = reads[i, n, :3] * torch.sigmoid(3 * agreement[i][n] + 5 * together - 1)
            assert_close(memory._trusted(reads, asked)[i, n], wanted)


def test_what_was_told_under_another_key_is_not_trusted():
    """The same value written under the key that is asked, or under its opposite: only the first is heard."""
    memory = signed_site(persistent_slots=0)
    with torch.no_grad():
        memory.trust.copy_(torch.tensor([0.0, 60.0, -6.0]))
        memory.signature.weight.normal_(std=2)
    set_strength(memory, NEVER)
    x, e = stream(1, rows=1)
    prepared = memory.prepare(x, e, memory.initial_state(1), None, None, None)
    heard = []
    for sign in (1, -1, 0):
        state = random_state(memory, rows=1)
        state["slots"][..., 3:] = sign * prepared.signature.movedim(1, 2)
        heard.append((memory.run(x, e, state, None, None, None)[0] - x).norm().item())
    assert heard[0] > 50 * heard[1] and heard[1] == pytest.approx(heard[2])


def test_queries_of_their_own_ask_elsewhere():
    """Memories of format 3 and before have them behind an address rank as well."""
    tied, own = site(address_rank=5), site(address_rank=5, tied_queries=False)
    missing, unexpected = tied.load_state_dict(own.state_dict(), strict=False)
    assert not missing and unexpected == ["query.weight", "query.bias"]
    x, e = stream()
    inputs = [memory.prepare(x, e, memory.initial_state(2), None, None, None).inputs for memory in (tied, own)]
    assert_close(inputs[0].write, inputs[1].write)
    assert not torch.allclose(inputs[0].query, inputs[1].query)


def test_signatures_need_room_and_a_rank():
    for wrong in ({"signature_size": 6, "address_rank": 5}, {"signature_size": -1}, {"signature_size": 2}):
        with pytest.raises(ValueError, match="signature_size|address_rank"):
            site(**wrong)
        with pytest.raises(ValueError, match="signature_size|address_rank"):
            MemoryConfig(slot_size=6, **wrong)


def test_persistent_slots_speak_from_an_empty_memory_and_never_fade():
    silent, memory = site(seed=5), site(seed=5, persistent_slots=3)
    for m in (silent, memory):
        set_strength(m, NEVER)
    x, e = stream()
    assert torch.equal(silent(x, e)[0], x)  # nothing was written, so nothing is read
    once, state = memory(x, e)
    assert not torch.allclose(once, x)
    for _ in range(3):
        again, state = memory(x, e, state)
    assert_close(again, once)
    assert not state["slots"].any()


def test_a_persistent_slot_is_heard_for_what_its_share_is_above_the_floor():
    plain, memory = site(seed=5, persistent_slots=3), site(seed=5, persistent_slots=3, persistent_floor=0.4)
    for m in (plain, memory):
        set_strength(m, NEVER)
        m.eval()
    x, e = stream()
    shares = plain.prepare(x, e, plain.initial_state(2), None, None, None).persistent
    assert (shares > 0.4).any() and (shares < 0.4).any()
    heard = torch.where(shares > 0.4, (shares - 0.4) / 0.6, 0.0)
    assert_close(memory.prepare(x, e, memory.initial_state(2), None, None, None).persistent, heard)
    learned = torch.einsum("btnp,npd->btnd", heard, memory.gate * memory.persistent).flatten(-2)
    assert_close(memory(x, e)[0], x + memory.output(learned))
    assert torch.equal(memory.train()(x, e)[0], plain.train()(x, e)[0])  # every slot has to be heard to learn
    memory(x, e)[0].sum().backward()
    assert (memory.persistent.grad != 0).all()


def test_wrong_shapes_are_named():
    memory = site()
    x, e = stream()
    good = memory.initial_state(2)
    for arguments, named in (
        ((x[..., :-1],), "hidden_states"),
        ((x[0],), "hidden_states"),
        ((x[:, :0],), "hidden_states"),
        ((x, e[..., :-1]), "token_embeds"),
        ((x, e[:, :-1]), "token_embeds"),
        ((x, e, memory.initial_state(3)), "batch size"),
        ((x, e, {**good, "slots": good["slots"][:, :1]}), "slots"),
        ((x, e, {"slots": good["slots"]}), "address"),
        ((x, e, None, torch.ones(2, 10)), "mask"),
        ((x, e, None, None, torch.ones(2, 10)), "turn_starts"),
    ):
        with pytest.raises(ValueError, match=named):
            memory(*arguments)


@pytest.mark.parametrize(
    "settings",
    ({"num_heads": 0}, {"num_slots": -1}, {"slot_size": 0}, {"cell": "lstm"}, {"decay_every": "day"}),
)
def test_settings_out_of_range_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        site(**settings)


@FORMS
@pytest.mark.parametrize("cell", CELLS)
def test_every_weight_gets_a_gradient(cell, form):
    memory = site(cell, key_size=3, **form)
    x, e = stream()
    y, _ = memory(x, e, key_states=x[..., :3])
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_no_state_is_kept_or_changed_in_place():
    memory = site()
    x, e = stream()
    before = random_state(memory)
    copies = {key: tensor.clone() for key, tensor in before.items()}
    one, _ = memory(x, e, before)
    two, _ = memory(x, e, before)
    assert torch.equal(one, two)
    for key in before:
        assert torch.equal(before[key], copies[key])


@pytest.mark.parametrize("rank", (0, 3))
def test_an_initial_state_stays_when_weights_are_trained_in_place(rank):
    """And gradients go through it to them."""
    memory = site(address_rank=rank)
    before = memory.initial_state(2)
    copies = {key: tensor.detach().clone() for key, tensor in before.items()}
    before["strength"].sum().backward()
    assert memory.strength_key.bias.grad.abs().min() > 0
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(1.0)
    for key in before:
        assert torch.equal(before[key], copies[key])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_memory_is_made_in_half_precision(dtype):
    """As it would be made in float32, whatever torch can compute in this one."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        memory = GRUMemoryWithDecay(D, embed_size=D + 2, slot_size=6, address_rank=5)
        memory.match_embeddings(torch.randn(40, D + 2))
    finally:
        torch.set_default_dtype(before)
    for weight in (memory.key_rank.weight, memory.output.weight):
        weight = weight.float() if weight.shape[0] < weight.shape[1] else weight.float().t()
        assert weight.shape[0] < weight.shape[1]
        assert_close(weight @ weight.t(), torch.eye(len(weight)), 0.05)
    assert all(bool(torch.isfinite(p).all()) and p.dtype == dtype for p in memory.parameters())


def test_matched_embeddings_are_recognised_among_all_tokens():
    torch.manual_seed(0)
    shared = torch.randn(64) * 5  # a direction that holds most of every embedding's length, as in pretrained models
    embeddings = torch.randn(500, 64) + shared

    def recognised(memory):
        stored = memory.value_embed(F.rms_norm(embeddings, (64,), eps=1e-6)).tanh()
        return ((stored @ memory.output.weight.t()) @ embeddings.t()).argmax(-1).eq(torch.arange(500)).float().mean()

    memory = GRUMemoryWithDecay(64, num_heads=2, num_slots=4, slot_size=24, cell="mingru")
    assert recognised(memory) < 0.5
    memory.match_embeddings(embeddings)
    assert recognised(memory) > 0.95

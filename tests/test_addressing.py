"""Addressing by content: where writes go, what they replace, what reads find, and that all forms agree."""

import math

import pytest
import torch
from places import drawn
from talking import talking_model, talking_tokenizer
from tiny import assert_close, memory_model, one_thread, random_ids  # noqa: F401 (a fixture)

from gru_memory import Conversation, GRUMemoryWithDecay, MemoryConfig, MemoryState
from gru_memory.addressing import (
    NO_WRITE,
    SAME_KEY,
    Lookup,
    find_places,
    find_places_compiled,
    find_places_in_parallel,
    find_places_step_by_step,
)
from gru_memory.editing import forget, kept_share
from gru_memory.evaluation.variants import unwritten
from gru_memory.memory import _chain

D = 12
FORMS = (find_places_compiled, find_places_in_parallel)


def keys(count, size=8, seed=0):
    """(count, size) directions at right angles to each other, shorter than 1."""
    torch.manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0][:count] * 0.9


def one_head(written, strength, asked=None, slots=4, keep=1.0, sharpness=50.0, told=0.0):
    """What a head with so many slots is asked for along written (T, f)."""
    length = len(written)
    asked = torch.zeros_like(written) if asked is None else asked
    return Lookup(
        written.view(1, length, 1, -1),
        torch.as_tensor(strength, dtype=torch.float64).expand(length).reshape(1, length, 1),
        torch.as_tensor(told, dtype=torch.float64).expand(length).reshape(1, length, 1),
        torch.ones(1, length, dtype=torch.bool),
        torch.full((1, length, 1, slots), keep, dtype=torch.float64),
        asked.view(1, length, 1, -1),
        torch.tensor([sharpness], dtype=torch.float64),
    )


def empty(slots=4, size=8):
    """Slots, and leave to replace."""
    return torch.zeros(1, 1, slots, size, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", ((2, 40, 2, 5, 8), (1, 1, 1, 7, 3), (3, 30, 1, 64, 32)))
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-10), (torch.float32, 1e-4)))
def test_every_form_finds_the_same_places(form, sizes, dtype, tolerance):
    given = drawn(*sizes, dtype)
    for got, wanted in zip(form(*given), find_places_step_by_step(*given), strict=True):
        assert got.dtype == dtype
        assert_close(got, wanted, tolerance)


def test_gradients_of_the_parallel_form_are_those_step_by_step():
    lookup, signatures, replacing = drawn(2, 40, 2, 5, 8, torch.float64)
    found = []
    for form in (find_places_step_by_step, find_places_in_parallel):
        named = {
            name: getattr(lookup, name).clone().requires_grad_()
            for name in ("written", "strength", "asked", "sharpness")
        }
        slots = signatures.clone().requires_grad_()
        places = form(lookup._replace(**named), slots, replacing)
        grads = torch.autograd.grad((places.query * torch.arange(5)).pow(2).sum(), [*named.values(), slots])
        # A token that writes nothing has no say in how much it might have written.
        found.append([grad * (lookup.strength > 0) if i == 1 else grad for i, grad in enumerate(grads)])
        assert all(grad.abs().max() > 1e-6 for grad in found[-1])
    for got, wanted in zip(*found, strict=True):
        assert_close(got, wanted, 1e-10)


def test_the_parallel_form_keeps_its_precision_over_long_rows():
    (written, strength, told, mask, keep, asked, _), *before = drawn(1, 6000, 1, 2, 8, torch.float64)
    strength = torch.where(torch.arange(6000)[:, None] % 15 == 0, 0.9 + 0.09 * told, 0.0) * mask.unsqueeze(-1)
    exact = Lookup(written, strength, told, mask, keep, asked, torch.tensor([12.0], dtype=torch.float64))
    wanted = find_places_in_parallel(exact, *before).query
    rounded = Lookup(*(part.float() if part.is_floating_point() else part for part in exact))
    got = find_places_in_parallel(rounded, *(part.float() for part in before)).query
    assert got.dtype == torch.float32
    assert_close(got.double(), wanted, 2e-5)


def test_what_needs_gradients_gets_them_and_what_does_not_is_the_same():
    lookup, *before = drawn(2, 20, 1, 9, 6, torch.float64)
    learned = lookup._replace(asked=lookup.asked.clone().requires_grad_())
    assert find_places(learned, *before).query.requires_grad
    with torch.no_grad():
        assert not find_places(learned, *before).query.requires_grad
    assert_close(find_places(learned, *before).query, find_places(lookup, *before).query, 1e-10)


def test_every_write_gets_a_slot_to_itself_until_all_are_full():
    written = keys(6)
    places = find_places_step_by_step(one_head(written, [1, 1, 0, 1, 1, 0.5]), *empty())
    slots = places.address[0, :, 0].argmax(-1).tolist()
    assert slots[:2] == [0, 1] and slots[3:5] == [2, 3]  # the third token wrote nothing, so its slot stayed free
    assert places.keep.eq(1).all()  # no key was alike another


def test_a_full_memory_gives_up_what_has_faded_most():
    written = keys(5)
    strength, keep = [0.9, 0.6, 0.8, 1.0, 1.0], 0.97
    places = find_places_step_by_step(one_head(written, strength, keep=keep), *empty())
    left = [b * keep ** (4 - t) for t, b in enumerate(strength[:4])]
    assert places.address[0, 4, 0].argmax() == left.index(min(left)) == 1


def test_what_is_told_again_under_the_same_key_replaces_what_was_told():
    first, other = keys(2)
    for angle, gone in ((0.0, 1.0), (SAME_KEY[0] - 0.02, 0.0), (sum(SAME_KEY) / 2, 0.5)):
        cosine = angle or 1.0
        again = cosine * first + math.sqrt(1 - cosine**2) * other.norm() / first.norm() * keys(3)[2]
        written = torch.stack([first, other, again])
        places = find_places_step_by_step(one_head(written, 1.0), *empty())
        assert_close(places.keep[0, 2, 0, 0], torch.tensor(1 - gone, dtype=torch.float64), 1e-6)
        assert_close(places.keep[0, 2, 0, 1], torch.tensor(1.0, dtype=torch.float64), 1e-6)
        # What is replaced in full leaves its slot free; anything else keeps it, while there are others.
        assert places.address[0, 2, 0].argmax() == (0 if gone == 1 else 2)
    half = find_places_step_by_step(one_head(torch.stack([first, other, first]), [1, 1, 0.5]), *empty())
    assert half.keep[0, 2, 0, 0] == pytest.approx(0.5)  # as far as the write is sure of itself


def test_later_tokens_replace_only_where_the_first_one_did():
    """After "S" the second token of "Sergio" leaves that of "Sordid"; in a correction it takes the place of the old one."""
    key, other, later, apart = keys(4)
    for again, gone in ((apart, 0.0), (key, 1.0)):
        written = torch.stack([key, later, other, again, later])
        places = find_places_step_by_step(one_head(written, 1.0, slots=8, told=[1, 1, 0, 1, 1]), *empty(slots=8))
        assert places.keep[0, 3, 0, 0] == pytest.approx(1 - gone)
        assert places.keep[0, 4, 0, 1] == pytest.approx(1 - gone)
        assert places.replacing.item() == pytest.approx(gone)
    blocked = find_places_step_by_step(one_head(torch.stack([key, key]), 1.0, told=1.0), *empty())
    assert blocked.keep.eq(1).all()  # the token right before it was told, and replaced nothing


def test_only_the_likest_slot_is_replaced():
    key, other = keys(2)
    near = 0.97 * key + math.sqrt(1 - 0.97**2) * other
    places = find_places_step_by_step(one_head(torch.stack([key, near, near]), [1, 1, 1], slots=8), *empty(slots=8))
    assert places.keep[0, 1, 0, 0] == pytest.approx(0, abs=1e-9)  # alike enough
    slots = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    slots[0, 0, 3], slots[0, 0, 5] = near, key
    places = find_places_step_by_step(one_head(key[None], 1.0, slots=8), slots, torch.ones(1, 1).double())
    assert places.keep[0, 0, 0].tolist() == pytest.approx([1, 1, 1, 1, 1, 0, 1, 1])


@pytest.mark.parametrize("form", (*FORMS, find_places_step_by_step))
@pytest.mark.parametrize("tilts", ((0, 1e-4), (1e-4, 0)))
def test_of_slots_that_are_alike_the_first_is_replaced(form, tilts):
    """As after a token that came twice: which cosine is the larger one is a matter of rounding."""
    key, other = keys(2)
    slots = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    slots[0, 0, 2], slots[0, 0, 5] = (0.7 * (key + part * other) for part in tilts)
    places = form(one_head(key[None], 1.0, slots=8), slots, torch.ones(1, 1).double())
    assert places.keep[0, 0, 0].tolist() == [1, 1, 0, 1, 1, 1, 1, 1]


def test_reads_find_what_was_written_under_the_key_asked_for():
    written = torch.cat([keys(4), torch.zeros(1, 8, dtype=torch.float64)])
    asked = torch.zeros(5, 8, dtype=torch.float64)
    asked[4] = written[2]
    places = find_places_step_by_step(one_head(written, [1, 1, 1, 1, 0], asked, slots=9), *empty(slots=9))
    read = places.query[0, 4, 0]
    assert read.argmax() == places.address[0, 2, 0].argmax() and read.max() > 0.99
    logits = torch.zeros(9, dtype=torch.float64)
    logits[2] = 50 * written[2].pow(2).sum()
    assert_close(read, logits.softmax(-1), 1e-6)  # the empty ones have the logit 0


def site(**settings):
    """A small memory addressed by content, with random weights, in float64."""
    torch.manual_seed(0)
    form = {"address_rank": 5, "signature_size": 4, "slot_size": 10, "num_heads": 2, "num_slots": 6, "decay": 0.9}
    memory = GRUMemoryWithDecay(D, cell="mingru", addressing="content", gate_init=1.0, **{**form, **settings}).double()
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            if name != "gate":
                parameter += torch.randn_like(parameter) / 3
    return memory


def test_the_memory_runs_on_these_places():
    """The recurrence gets what `find_places` says of the signatures it writes itself."""
    memory = site()
    x, e = torch.randn(2, 30, D).double(), torch.randn(2, 30, D).double()
    prepared = memory.prepare(x, e, memory.initial_state(2), None, None, None)
    inputs, value = prepared.inputs, memory.value_size
    strength = ((prepared.told - NO_WRITE) / (1 - NO_WRITE)).clamp_min(0)
    assert (strength == 0).any() and (strength > 0.5).any()
    assert_close(inputs.write.sum(-1), strength)
    plain = torch.full_like(inputs.keep, 0.9)
    mask = torch.ones(2, 30, dtype=torch.bool)
    lookup = Lookup(
        inputs.values[..., value:], strength, prepared.told, mask, plain, prepared.signature, memory.sharpness
    )
    begin = memory.initial_state(2)
    *wanted, replacing = find_places_step_by_step(lookup, begin["slots"][..., value:], begin["replacing"])
    assert_close(prepared.last_key["replacing"], replacing)
    for got, place in zip((inputs.address, inputs.keep, inputs.query), wanted, strict=True):
        assert_close(got, place)
    # And the slots that the recurrence leaves have the signatures that were compared.
    _, slots = memory.recur(inputs, memory.initial_state(2)["slots"])
    _, again, _ = memory.run(x, e, memory.initial_state(2), None, None, None)
    assert_close(slots, again["slots"])
    half, state = 13, memory.initial_state(2)
    _, state, _ = memory.run(x[:, :half], e[:, :half], state, None, None, None)
    _, state, _ = memory.run(x[:, half:], e[:, half:], state, None, None, None)
    assert_close(state["slots"], slots)


@pytest.mark.parametrize("form", (None, find_places_step_by_step))
@pytest.mark.parametrize("grad", (True, False))
def test_places_keep_their_precision_under_autocast(monkeypatch, form, grad):
    """Projections may be rounded; what is made of them is what the plain form makes of them in float64."""
    memory = site(signature_size=24, slot_size=32, address_rank=16, num_slots=40).float()
    x, e = torch.randn(2, 60, D), torch.randn(2, 60, D)
    mask = torch.ones(2, 60, dtype=torch.bool)
    asked = []

    def kept(*given):
        asked.append(given)
        return (form or find_places)(*given)

    monkeypatch.setattr("gru_memory.memory.find_places", kept)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        _, _, inputs = memory.run(x, e, memory.initial_state(2), mask, None, None)
    ((lookup, *before),) = asked
    assert all(t.dtype in (torch.float32, torch.bool) for t in (*lookup, *before))
    lookup = Lookup(*(t.detach().double() if t.is_floating_point() else t for t in lookup))
    wanted = find_places_step_by_step(lookup, *(t.double() for t in before))
    assert wanted.query.amax(-1).mean() > 0.5  # reads choose
    for got, place in zip((inputs.address, inputs.keep, inputs.query), wanted[:3], strict=True):
        assert_close(got.double(), place, 1e-4)


def test_what_is_read_under_autocast_is_the_same_with_gradients_and_without():
    memory = site(signature_size=24, slot_size=32, address_rank=16, num_slots=40).float()
    x, e = torch.randn(2, 60, D), torch.randn(2, 60, D)
    state, found = memory.initial_state(2), []
    for grad in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            prepared = memory.prepare(x, e, state, None, None, None)
            reads, _ = memory.recur(prepared.inputs, state["slots"])
            found.append(torch.cat([reads[..., : memory.value_size], memory._trusted(reads, prepared.signature)], -1))
    assert found[0].requires_grad and not found[1].requires_grad
    assert_close(found[0], found[1], 1e-5)


def test_trust_goes_by_the_angle_so_what_fades_stays_sure_of_itself():
    memory = site(decay=0.5, num_heads=1)
    found, asked = torch.randn(3, 1, 4).double(), torch.randn(3, 1, 4).double()
    agreement, together = memory.agreements(found, asked)
    assert_close(agreement, torch.cosine_similarity(found, asked, dim=-1))
    assert_close(together, agreement.clamp_min(0))
    assert_close(memory.agreements(found / 1000, asked)[0], agreement)
    assert memory.agreements(torch.zeros_like(found), asked)[0].abs().max() == 0


def test_what_is_told_is_a_chain_of_beginning_and_going_on():
    """p_t = (1 - p_{t-1}) begins_t + p_{t-1} goes_on_t, step by step, and held where the mask is False."""
    torch.manual_seed(0)
    begins, goes_on, before = torch.rand(2, 13, 3).double(), torch.rand(2, 13, 3).double(), torch.rand(2, 3).double()
    mask = torch.rand(2, 13) < 0.7
    now, wanted = before, []
    for t in range(13):
        new = (1 - now) * begins[:, t] + now * goes_on[:, t]
        now = torch.where(mask[:, t, None], new, now)
        wanted.append(now)
    assert_close(_chain(begins, goes_on, before, mask), torch.stack(wanted, dim=1), 1e-12)
    memory = site()
    x, e = torch.randn(2, 9, D).double(), torch.randn(2, 9, D).double()
    prepared = memory.prepare(x, e, memory.initial_state(2), mask[:, :9], None, None)
    assert not prepared.told[~mask[:, :9]].any() and prepared.told[mask[:, :9]].min() > 0
    last = torch.stack([row[seen][-1] for row, seen in zip(prepared.told, mask[:, :9], strict=True)])
    assert_close(prepared.last_key["told"], last)
    full_stop = site()  # begins nothing, ends everything
    with torch.no_grad():
        full_stop.strength_key.weight.zero_()
        full_stop.strength_embed.weight.zero_()
        full_stop.strength_key.bias[:2], full_stop.strength_key.bias[2:] = -30.0, 30.0
    for told in (0.0, 1.0):
        state = full_stop.initial_state(2)
        state["told"].fill_(told)
        assert_close(full_stop.prepare(x, e, state, None, None, None).told, torch.full((2, 9, 2), told).double(), 1e-9)


def test_what_is_hardly_told_is_not_written_at_all():
    memory = site()
    with torch.no_grad():
        memory.strength_key.weight.zero_()
        memory.strength_embed.weight.zero_()
        memory.strength_key.bias.fill_(math.log(NO_WRITE / (1 - NO_WRITE)) - 0.01)
    x, e = torch.randn(1, 50, D).double(), torch.randn(1, 50, D).double()
    _, state = memory(x, e)
    assert not state["slots"].any()
    with torch.no_grad():
        memory.strength_key.bias.fill_(math.log(NO_WRITE / (1 - NO_WRITE)) + 0.01)
    _, state = memory(x, e)
    assert state["slots"].any()


def test_the_cell_and_the_signature_that_it_needs_are_named():
    for wrong in ({"cell": "gru", "address_rank": 4, "signature_size": 2}, {"cell": "mingru"}):
        with pytest.raises(ValueError, match="mingru.*signature_size"):
            MemoryConfig(addressing="content", **wrong)
        with pytest.raises(ValueError, match="mingru.*signature_size"):
            GRUMemoryWithDecay(D, addressing="content", **wrong)
    for wrong in ({"address_rank": 1, "signature_size": 2}, {"address_rank": 4, "signature_size": 1}):
        for build in (MemoryConfig, lambda **settings: GRUMemoryWithDecay(D, **settings)):
            with pytest.raises(ValueError, match="signature_size and an address_rank of at least 2"):
                build(addressing="content", cell="mingru", **wrong)
    with pytest.raises(ValueError, match=r"'nearest'.*learned.*content"):
        MemoryConfig(addressing="nearest")


def told(model, seed, length=3):
    """The state after so many tokens, all written."""
    with torch.no_grad():
        for memory in model.memory_sites().values():
            memory.strength_key.bias.fill_(20.0)
    return model(random_ids(1, length, seed), memory_state=None).memory_state


def holds(state, other, site="top"):
    """For each slot that `other` fills, whether `state` has it, whatever its place."""
    mine, theirs = (s.sites[site]["slots"][0] for s in (state, other))
    return [
        bool(((mine[n] - slot).norm(dim=-1) < 1e-6).any())
        for n in range(len(theirs)) for slot in theirs[n] if slot.norm() > 0
    ]  # fmt: skip


def test_merging_keeps_what_either_holds_wherever_it_lies():
    model = memory_model("llama", cell="content", num_slots=8, decay=1.0)
    one, two = told(model, 1), told(model, 2)
    assert sum(holds(two, one)) < len(holds(two, one)) / 2
    both = one.merge(two)
    assert all(holds(both, one)) and all(holds(both, two)) and len(holds(both, one)) >= 4
    for name in both.sites:
        filled = one.sites[name]["slots"].norm(dim=-1) > 0
        assert_close(both.sites[name]["slots"][filled], one.sites[name]["slots"][filled])  # in their places
    nothing = model.initial_memory_state(1) if hasattr(model, "initial_memory_state") else one.decay(1e9)
    for same in (one.merge(one), one.merge(nothing)):
        assert all(holds(same, one)) and all(holds(one, same))
    assert all(holds(nothing.merge(one), one))


def test_merging_keeps_the_stronger_of_two_traces_of_one_thing():
    model = memory_model("llama", cell="content", num_slots=16, decay=0.9)
    full = told(model, 1)
    faded = full.decay(3)
    for both in (faded.merge(full), full.merge(faded)):
        assert all(holds(both, full)) and len(holds(full, both)) == len(holds(full, full))  # once, at full length


def test_merging_more_than_there_is_room_for_keeps_the_fullest():
    model = memory_model("llama", cell="content", num_slots=4, decay=0.9)
    one, two = told(model, 1, 12).decay(30), told(model, 2, 12)
    both = one.merge(two)
    assert all(holds(both, two)) and not any(holds(both, one))


def test_forgetting_a_turn_finds_it_wherever_it_lies():
    """Told after another turn it lies in other slots than when it is read alone; all of it goes, and hardly anything else."""
    model = talking_model("llama", cell="mingru", addressing="content", num_slots=64, slot_size=24, address_rank=12,
                          signature_size=12, decay=0.99)  # fmt: skip
    tokenizer = talking_tokenizer("llama")
    with torch.no_grad():
        model.memory_sites()["top"].strength_key.bias.fill_(20.0)
        model.memory_sites()["top"].strength_embed.weight.zero_()
    texts = ["I live in Porto.", "My boat is called Marigold.", "Where?"]
    chat = Conversation(model, tokenizer)
    for text in texts:
        chat.read(text)
    after = forget(model, tokenizer, chat.state, texts[1])
    before, now = ([kept_share(model, tokenizer, state, text) for text in texts] for state in (chat.state, after))
    assert before[1] > 0.5 and now[1] < 0.1 * before[1]
    assert (
        now[0] > 0.5 * before[0] > 0.1 and now[2] > 0.2 * before[2]
    )  # the latter is mostly the template, which all share
    assert kept_share(model, tokenizer, model.initial_memory_state(1), texts[1]) == 0


def test_a_token_left_unwritten_leaves_its_slot_to_the_next():
    """As if it had not been told at all: one slot fewer is taken, and the others hold what they held."""
    model = memory_model("llama", cell="content", sites=("top",), num_slots=12, decay=1.0)
    ids = random_ids(1, 6, 1)
    whole = told(model, 1, 6)
    with unwritten(model, [[3]]):
        without = model(ids, memory_state=None).memory_state
    with unwritten(model, [range(6)]):
        nothing = model(ids, memory_state=None).memory_state
    assert not nothing.sites["top"]["slots"].any()
    taken = [(state.sites["top"]["slots"].norm(dim=-1) > 0).sum(-1) for state in (whole, without)]  # (1, N)
    assert torch.equal(taken[1], taken[0] - 1)
    assert all(holds(whole, without))
    places = without.sites["top"]["slots"][0, 0].norm(dim=-1).nonzero().flatten()
    assert places.tolist() == list(range(len(places)))


def test_a_state_says_how_its_slots_are_found():
    state = told(memory_model("llama", cell="content"), 1)
    assert state.addressing == "content"
    assert MemoryState.from_bytes(state.to_bytes()).addressing == "content"
    assert told(memory_model("llama", cell="mingru"), 1).addressing == "learned"

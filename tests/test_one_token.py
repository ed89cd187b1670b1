"""One token by the short path against the same token by the general one, and when the short path must not be taken."""

import copy

import pytest
import torch
from one_tokens import EXTRA, SETTINGS, SIZE, D, N, assert_same, both, make, one, single
from tiny import KINDS, memory_model, one_thread, random_ids  # noqa: F401
from torch import nn

from gru_memory import GRUMemoryWithDecay, one_token
from gru_memory.scan import kernels, one_token_kernels, registry


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("batch", (1, 3))
def test_it_is_the_general_path(settings, batch):
    site = make(**settings)
    given = one(site, batch)
    assert_same(*both(site, given), 1e-12)
    for absent in ("token_embeds", "turn_starts", "mask"):
        assert_same(*both(site, {**given, absent: None}), 1e-12)


@pytest.mark.parametrize("settings", ({}, {"address_rank": 6}, SETTINGS[-1]), ids=str)
def test_hidden_tokens_hold_the_state(settings):
    site = make(**settings)
    given = one(site)
    given["mask"] = torch.tensor([[True], [False], [True]])
    given["hidden_states"][1] = torch.nan  # padding may hold anything
    short, general = both(site, given)
    assert_same(short, general, 1e-12)
    with torch.no_grad():
        _, state = one_token.run_one(site, **given)
    for name, before in given["state"].items():
        assert torch.equal(state[name][1], before[1]), name
        assert not torch.equal(state[name][0], before[0]), name


@pytest.mark.parametrize("settings", ({}, {"cell": "mingru", "address_rank": 6, "persistent_slots": 2}, SETTINGS[-1]))
def test_float32(settings):
    site = make(torch.float32, **settings)
    assert_same(*both(site, one(site)), 2e-6)


def assert_rounded_at_the_end(site, given):
    """Where weights are bfloat16, what they give in float32, with hidden states rounded; not far from the general path."""
    short, general = both(site, given)
    exact = copy.deepcopy(site).float()
    hidden, *state = both(exact, {"token_embeds": None, "mask": None, "turn_starts": None, **single(given)})[1]
    assert_same(short[1:], state, 2e-6)
    rounding = 2.0**-8 if given["hidden_states"].dtype == torch.bfloat16 else 0
    assert ((short[0] - hidden).abs() <= rounding * hidden.abs() + 2e-6).all()
    assert_same(short, general, 0.03)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("batch", (1, 3))
def test_bfloat16(settings, batch):
    site = make(torch.bfloat16, **settings)
    given = one(site, batch)
    assert given["state"]["slots"].dtype == torch.float32
    assert_rounded_at_the_end(site, given)
    for absent in ("token_embeds", "turn_starts", "mask"):
        assert_rounded_at_the_end(site, {**given, absent: None})


@pytest.mark.parametrize("settings", ({}, SETTINGS[-1]), ids=str)
@pytest.mark.parametrize("wide", ("hidden_states", "token_embeds", "key_states"))
def test_a_wider_stream_beside_weights_in_bfloat16(settings, wide):
    """It goes on as wide as it came, like the general path lets it."""
    site = make(torch.bfloat16, **settings)
    given = one(site)
    assert_rounded_at_the_end(site, {**given, wide: given[wide].float()})


def test_a_stream_in_bfloat16_beside_weights_that_are_wider():
    site = make(torch.float32)
    given = one(site)
    for name in ("hidden_states", "token_embeds", "key_states"):
        given[name] = given[name].bfloat16()
    assert_same(*both(site, given), 2.0**-6)


def test_bfloat16_hidden_tokens_and_numbers_that_are_none():
    site = make(torch.bfloat16)
    given = one(site, 4)
    given["mask"] = torch.tensor([[True], [False], [True], [True]])
    given["hidden_states"][1] = torch.nan
    given["token_embeds"][2, 0, 1] = torch.nan
    given["hidden_states"][3, 0, 0] = torch.inf
    given["hidden_states"][0, 0, 0] = torch.finfo(torch.bfloat16).max
    short, general = both(site, given)
    assert_same([short[0].nan_to_num(), *short[1:]], [general[0].nan_to_num(), *general[1:]], 0.03)
    assert torch.equal(short[0].isnan(), general[0].isnan()) and short[0][2].isnan().any()
    with torch.no_grad():
        _, state = one_token.run_one(site, **given)
    for name, before in given["state"].items():
        assert torch.equal(state[name][1], before[1]), name


def test_bfloat16_gate_zero_is_the_identity_bit_for_bit():
    """Rounding gives every number back that needs none."""
    site = make(torch.bfloat16, gate_init=0.0)
    with torch.no_grad():
        site.gate.zero_()
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite() & (every.abs() >= torch.finfo(every.dtype).tiny)]
    every = torch.cat([every, every.new_zeros(-len(every) % D)]).view(-1, 1, D)
    given = {**one(site, len(every)), "hidden_states": every}
    short, _ = both(site, given)
    assert torch.equal(short[0].float(), every.float())


def test_bfloat16_weights_that_changed_or_moved_are_found():
    site = make(torch.bfloat16)
    given = one(site)
    other = {name: -tensor for name, tensor in site.state_dict().items()}
    assert_rounded_at_the_end(site, given)
    with torch.no_grad():
        site.value_embed.weight.mul_(2)
        site.bias_ih.zero_()
    assert_rounded_at_the_end(site, given)
    site.output.weight.data = site.output.weight.data * 3
    assert_rounded_at_the_end(site, given)
    site.load_state_dict(other)
    assert_rounded_at_the_end(site, given)
    assert_same(*both(site.float(), single(given)), 2e-6)
    assert_rounded_at_the_end(site.bfloat16(), given)


@pytest.mark.parametrize("family, cell, clock", KINDS)
def test_models_in_bfloat16_take_it(family, cell, clock, monkeypatch):
    model, ids, taken = memory_model(family, cell=cell, decay_every=clock).bfloat16(), random_ids(3, 12), []
    run_one = one_token.run_one
    monkeypatch.setattr(one_token, "run_one", lambda *args: taken.append(1) or run_one(*args))

    @torch.no_grad()
    def decode():
        output = model(ids[:, :4], use_cache=True)
        logits = []
        for token in ids[:, 4:].split(1, dim=1):
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits.float())
        return torch.cat(logits, dim=1), output.memory_state.sites

    short, state = decode()
    assert len(taken) == 3 * 8  # sites, tokens
    monkeypatch.setattr(one_token, "can_run", lambda *args: False)
    general, wanted = decode()
    assert (short - general).pow(2).mean().sqrt() < 0.1 * general.std()
    for site, kept in wanted.items() if cell != "content" else ():  # there rounding may decide for another slot
        for name, tensor in kept.items():
            assert (state[site][name].dtype, tensor.dtype) == (torch.float32, torch.float32)
            assert (state[site][name] - tensor).abs().max() < 0.2, (site, name)


def test_no_key_states():
    site = make(key_size=0)
    assert_same(*both(site, one(site)), 1e-12)


@pytest.mark.parametrize("settings", ({}, {"persistent_slots": 3, "persistent_floor": 0.2}))
@pytest.mark.parametrize("field", ("hidden_states", "token_embeds", "key_states"))
def test_not_a_number_comes_through(field, settings):
    site = make(**settings)
    given = one(site)
    given[field][1, 0, 2] = torch.nan
    short, general = both(site, given)
    assert_same(short, general, 1e-12)
    assert short[0][1].isnan().any()
    assert not short[0][0].isnan().any()


def test_the_state_that_went_in_is_left_alone():
    site = make()
    given = one(site)
    before = {name: tensor.clone() for name, tensor in given["state"].items()}
    both(site, given)
    assert all(torch.equal(given["state"][name], tensor) for name, tensor in before.items())


def test_the_floor_of_persistent_slots_is_that_of_the_mode():
    site = make(persistent_slots=4, persistent_floor=0.25)
    given = one(site)
    outcomes = []
    for mode in (False, True, False):
        outcomes.append(both(site.train(mode), given))
        assert_same(*outcomes[-1], 1e-12)
    assert torch.equal(outcomes[0][0][0], outcomes[2][0][0])
    assert not torch.allclose(outcomes[0][0][0], outcomes[1][0][0])


def test_many_rows_and_sizes_that_are_no_multiple_of_four():
    """Compiled products take rows in pairs and weights in fours; what is left over has loops of its own."""
    site = make(torch.float64, address_rank=7, persistent_slots=3, signature_size=1)
    for batch in (2, 5):
        assert_same(*both(site, one(site, batch)), 1e-12)


def test_what_is_not_done_is_not_returned(monkeypatch):
    site = make()
    given = one(site)
    monkeypatch.setattr(one_token, "run_in_team", lambda *given: None)
    with pytest.raises(MemoryError, match="could not finish a token"):
        both(site, given)


def test_a_default_device_does_not_matter():
    site = make()
    given = one(site)
    with torch.device("meta"), torch.no_grad():
        assert one_token.can_run(site, given["hidden_states"])
        short, _ = one_token.run_one(site, **given)
    assert torch.equal(short, both(site, given)[0][0])


def test_machine_code_is_kept_for_these_very_sources():
    """numba asks whether the file of a function changed, and not whether those changed whose functions it calls."""
    for function in (kernels._product, one_token_kernels.site_one):
        assert function._cache._cache_file._source_stamp == kernels.SOURCES
    enter = one_token_kernels.entry("float64", "float64", "float64").compiled
    assert kernels.SOURCES in [cell.cell_contents for cell in enter._pyfunc.__closure__]


def test_inputs_that_do_not_lie_row_by_row():
    site = make()
    given = one(site, batch=2)
    wide = torch.stack([given["hidden_states"], given["hidden_states"] + 1], dim=-1)
    given["hidden_states"] = wide[..., 0]
    given["state"]["slots"] = given["state"]["slots"].transpose(2, 3).contiguous().transpose(2, 3)
    assert not given["hidden_states"].is_contiguous() and not given["state"]["slots"].is_contiguous()
    assert_same(*both(site, given), 1e-12)


def test_weights_that_changed_or_moved_are_found():
    site = make()
    given = one(site)
    assert_same(*both(site, given), 1e-12)
    with torch.no_grad():
        site.value_embed.weight.mul_(2)
        assert_same(*both(site, given), 1e-12)
        site.output.weight.data = site.output.weight.data * 3
        assert_same(*both(site, given), 1e-12)
        site.weight_hh = nn.Parameter(-site.weight_hh)
        assert_same(*both(site, given), 1e-12)


def test_weights_that_are_somewhere_else_are_left_to_the_general_path():
    site = make()
    site.value_hidden.weight = nn.Parameter(site.value_hidden.weight.to("meta"))
    with torch.no_grad():
        assert not one_token.can_run(site, torch.zeros(1, 1, D).double())


def test_weights_that_do_not_lie_row_by_row_are_left_to_the_general_path():
    site = make()
    site.output.weight.data = site.output.weight.data.t().contiguous().t()
    with torch.no_grad():
        assert not one_token.can_run(site, torch.zeros(1, 1, D).double())


def test_weights_that_are_transposed_where_they_lie_are_noticed():
    site = make(embed_size=N * SIZE)
    given = {**one(site), "token_embeds": torch.randn(3, 1, N * SIZE).double()}
    assert site.value_embed.weight.shape == (N * SIZE, N * SIZE)
    assert_same(*both(site, given), 1e-12)
    for again in (False, True):
        site.value_embed.weight.data = site.value_embed.weight.data.t()
        with torch.no_grad():
            assert one_token.can_run(site, given["hidden_states"]) == again
    assert_same(*both(site, given), 1e-12)


def test_a_state_kept_in_half_precision_is_taken():
    site = make(torch.float32)
    given = one(site)
    given["state"] = {name: tensor.half() for name, tensor in given["state"].items()}
    assert_same(*both(site, given), 2e-6)


def test_it_is_what_forward_takes_for_one_token_without_gradients(monkeypatch):
    site, taken = make(), []
    run_one = one_token.run_one
    monkeypatch.setattr(one_token, "run_one", lambda *args: taken.append(1) or run_one(*args))
    given = one(site)
    with torch.no_grad():
        site(**given)
    assert len(taken) == 1
    site(**given)  # gradients are wanted
    with torch.no_grad():
        site(torch.randn(3, 2, D).double(), key_states=torch.randn(3, 2, EXTRA).double())  # two tokens
        with torch.autocast("cpu", torch.bfloat16):
            site(**given)

        class Other(GRUMemoryWithDecay):
            def run(self, *args):
                return super().run(*args)

        other = make()
        other.__class__ = Other
        other(**given)
    assert len(taken) == 1


def test_projections_that_are_no_plain_ones_are_not_passed_by():
    hidden = torch.zeros(1, 1, D)
    with torch.no_grad():
        hooked = make(torch.float32)
        hooked.value_embed.register_forward_hook(lambda module, args, output: output * 2)
        assert not one_token.can_run(hooked, hidden)
        wrapped = make(torch.float32)
        wrapped.output = nn.Sequential(wrapped.output)
        assert not one_token.can_run(wrapped, hidden)
        parametrized = make(torch.float32)
        nn.utils.parametrizations.weight_norm(parametrized.key)
        assert not one_token.can_run(parametrized, hidden)
        assert not one_token.can_run(make(torch.float16), hidden)
        mixed = make(torch.float32)
        mixed.key.double()
        assert not one_token.can_run(mixed, hidden)
        assert one_token.can_run(make(torch.float32), hidden)


def test_without_numba_the_general_path_is_taken(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    monkeypatch.setattr(registry, "_warned", set())
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="numba"):
        assert not one_token.can_run(make(torch.float32), torch.zeros(1, 1, D))

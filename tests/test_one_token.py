"""One token by the short path against the same token by the general one, and when the short path must not be taken."""

import copy
import itertools
import multiprocessing
import platform
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import KINDS, memory_model, one_thread, random_ids  # noqa: F401
from torch import nn

from gru_memory import GRUMemoryWithDecay, one_token
from gru_memory.scan import kernels, one_token_kernels, registry, team

D, E, N, S, SIZE = 20, 12, 3, 5, 8
EXTRA = 7  # width of further key states


def make(dtype=torch.float64, **changes):
    """A site of which no weight is zero."""
    settings = {"cell": "gru", "decay": 0.9, "decay_every": "turn", "embed_size": E, "key_size": EXTRA} | changes
    torch.manual_seed(3)
    site = GRUMemoryWithDecay(D, N, S, SIZE, **settings)
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.add_(torch.randn_like(parameter) / max(1, parameter.shape[-1]) ** 0.5)
    return site.to(dtype).eval()


def one(site, batch=3, seed=0):
    """Inputs of one token in the middle of a text."""
    generator = torch.Generator().manual_seed(seed)
    dtype = site.gate.dtype

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    state = site.initial_state(batch)
    state = {name: (tensor + normal(*tensor.shape)).clamp(-1, 1) for name, tensor in state.items()}
    given = {"hidden_states": normal(batch, 1, D), "token_embeds": normal(batch, 1, E), "state": state}
    given["mask"] = torch.ones(batch, 1, dtype=torch.bool)
    given["turn_starts"] = torch.rand(batch, 1, generator=generator) < 0.5
    given["key_states"] = normal(batch, 1, site.key_size) if site.key_size else None
    return given


def both(site, given):
    """The short path's outputs and state, flat, and those of the general one."""
    with torch.no_grad():
        assert one_token.can_run(site, given["hidden_states"])
        short = one_token.run_one(site, **given)
        general = site.run(**given)[:2]
    return [[hidden, *(state[name] for name in sorted(state))] for hidden, state in (short, general)]


def single(given):
    """The same inputs in float32."""
    return {
        name: single(value) if isinstance(value, dict) else value.float() if value.is_floating_point() else value
        for name, value in given.items()
        if value is not None
    }


def assert_same(short, general, tolerance):
    for got, wanted in zip(short, general, strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert torch.equal(got.isnan(), wanted.isnan())
        assert (got - wanted).nan_to_num().abs().max() <= tolerance


SETTINGS = [
    {"cell": cell, "decay": decay, "decay_every": every, "address_rank": rank, "persistent_slots": persistent, **signed}
    for (cell, every), (decay, rank, persistent, signed) in itertools.product(
        (("gru", "turn"), ("mingru", "token")),
        (
            (0.9, 0, 0, {}),
            ([0.9, 0.8, 0.7], 6, 0, {"signature_size": 3, "tied_queries": False, "max_strength": 0.75}),
            ([0.9, 0.8, 0.7, 0.6, 0.5], 0, 4, {}),
            ([[0.5] * S] * N, 6, 4, {"signature_size": 2}),
        ),
    )
] + [
    {"cell": "mingru", "addressing": "content", "address_rank": 6, "signature_size": 3, "decay_every": every, **more}
    for every, more in (
        ("turn", {"persistent_slots": 4}),
        ("turn", {"persistent_slots": 4, "persistent_floor": 0.25}),
        ("token", {"decay": [[0.5, 0.6, 0.7, 0.8, 0.9]] * N, "max_strength": 0.75}),
    )
]


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


@pytest.fixture
def in_team(monkeypatch):
    """Sets how many threads a token has, however small the site."""
    monkeypatch.setattr(one_token, "TEAM_BYTES", 0)
    sizes = []
    run_in_team = one_token.run_in_team
    monkeypatch.setattr(one_token, "run_in_team", lambda *given: (sizes.append(given[2]), run_in_team(*given))[1])
    before = torch.get_num_threads()
    yield lambda threads: torch.set_num_threads(threads) or sizes
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", (2, 3, 7))
def test_a_team_has_one_result(in_team, threads):
    """More threads than rows, heads or fours of a product's rows, and fewer."""
    sizes = in_team(threads)
    for settings, batch in itertools.product(SETTINGS, (1, 5)):
        site = make(**settings)
        assert_same(*both(site, one(site, batch)), 1e-12)
    assert set(sizes) == {threads}


def test_a_team_reads_bfloat16(in_team):
    sizes = in_team(2)
    site = make(torch.bfloat16)
    given = one(site)
    with torch.no_grad():
        outcomes = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert one_token.can_run(site, given["hidden_states"])
            outcomes.append(one_token.run_one(site, **given))
    assert sizes == [1, 2]
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert_same([outcomes[0][1]["slots"]], [outcomes[1][1]["slots"]], 1e-6)


def test_teams_do_not_meet(in_team):
    """Tokens of one site in several Python threads at once, as in a server."""
    in_team(2)
    site = make()
    inputs = [one(site, batch=2, seed=seed) for seed in range(4)]

    @torch.no_grad()
    def go_on(given):
        torch.set_num_threads(2)  # is a setting of the thread
        for _ in range(30):
            assert one_token.can_run(site, given["hidden_states"])
            _, given["state"] = one_token.run_one(site, **given)
        return given["state"]["slots"]

    wanted = [go_on({**given}) for given in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(go_on, [{**given} for given in inputs]))
    assert all(map(torch.equal, found, wanted))


def test_threads_come_and_go_between_tokens(in_team):
    in_team(1)
    site = make()
    given = one(site, batch=2)
    for threads in (2, 1, 5, 3, 1, 2):
        torch.set_num_threads(threads)
        assert_same(*both(site, given), 1e-12)


def test_without_openmp_a_token_has_one_thread(in_team, monkeypatch):
    sizes = in_team(2)
    site = make()
    monkeypatch.setattr(team, "openmp", lambda: None)
    assert_same(*both(site, one(site)), 1e-12)
    assert sizes == [1]


@pytest.mark.parametrize(("least", "size"), ((0.49, 2), (0.51, 1)))
def test_a_team_has_enough_to_read(in_team, monkeypatch, least, size):
    sizes = in_team(2)
    site = make()
    given = one(site)
    read = sum(parameter.nbytes for parameter in site.parameters()) + given["state"]["slots"].nbytes
    monkeypatch.setattr(one_token, "TEAM_BYTES", least * read)
    both(site, given)
    assert sizes == [size]


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


@torch.no_grad()
def _token_in_child(connection, site, given):
    connection.send(one_token.run_one(site, **given)[0].tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_takes_tokens_too(in_team):
    """It has none of the threads that its parent knew."""
    sizes = in_team(2)
    site = make()
    given = one(site)
    _, (wanted, *_) = both(site, given)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_token_in_child, args=(theirs, site, given))
    child.start()
    try:
        assert sizes == [2]
        assert ours.poll(60), "the child hangs"
        torch.testing.assert_close(torch.tensor(ours.recv(), dtype=wanted.dtype), wanted)
    finally:
        child.kill()
        child.join()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only the mode of SSE is switched")
def test_tiny_numbers_are_zero_in_every_thread_and_stay_outside(in_team):
    in_team(2)
    site = make(torch.float32)
    given = single(one(site))
    given["state"]["slots"] = torch.full_like(given["state"]["slots"], 1e-40)
    given["mask"] = torch.zeros_like(given["mask"])
    given["turn_starts"] = torch.zeros_like(given["turn_starts"])
    tiny = torch.tensor([1e-40])
    assert tiny * 0.5 != 0
    with torch.no_grad():
        assert one_token.can_run(site, given["hidden_states"])
        _, state = one_token.run_one(site, **given)
    assert not state["slots"].any()
    assert tiny * 0.5 != 0


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

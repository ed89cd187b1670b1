"""One token that several threads share: the threads of torch's own OpenMP."""

import itertools
import multiprocessing
import platform
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from one_tokens import SETTINGS, assert_same, both, make, one, single
from tiny import one_thread  # noqa: F401

from gru_memory import one_token
from gru_memory.scan import team


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
    assert_same(found, wanted, 1e-12)  # on a machine that is busy the last bit of a number may be another one


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

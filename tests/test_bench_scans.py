"""The benchmark of the recurrence: what is compared, and what is left out."""

import pytest
import torch
from tiny import one_thread  # noqa: F401

from gru_memory.bench import Plan, Row, models, peers, report, scans


def scan_row(batch, tokens, case, seconds, **more):
    return Row("scan", {"batch": batch, "tokens": tokens, "pass": "forward"}, case, seconds, batch * tokens, **more)


@pytest.mark.parametrize(
    "rows, batch, tokens, slow",
    [
        ([], 8, 2048, False),
        ([scan_row(1, 128, scans.TITANS, [1.0])], 1, 2048, False),
        ([scan_row(1, 128, scans.TITANS, [1.5])], 1, 2048, True),
        ([scan_row(1, 128, scans.TITANS, [9.0]), scan_row(1, 512, scans.TITANS, [4.0])], 1, 2048, False),  # the nearest
        ([scan_row(1, 512, scans.TITANS, [4.0])], 8, 512, False),  # not eight times as long
        ([scan_row(1, 2048, scans.TITANS, [30.0]), scan_row(8, 128, scans.TITANS, [1.0])], 8, 512, False),
        ([scan_row(1, 128, scans.TITANS, [], left_out="longer than 20 s")], 8, 128, True),
        ([scan_row(1, 128, scans.GRU_CELL_LOOP, [90.0])], 8, 2048, False),  # what others are compared with
        ([scan_row(1, 128, "gru, reference", [90.0])], 8, 2048, False),
    ],
)
def test_only_peers_are_left_out_and_by_the_nearest_smaller_setting(rows, batch, tokens, slow):
    found = scans.too_slow(rows, {"batch": batch, "tokens": tokens, "pass": "forward"}, patience=20)
    assert found == ([scans.TITANS] if slow else [])


def test_a_scan_says_which_peers_it_left_out(monkeypatch):
    monkeypatch.setattr(scans, "side_by_side", lambda cases, plan, peers: {name: [1.0] for name in cases})
    monkeypatch.setattr(scans, "SLOTS", 2)
    rows = scans.bench_scan(Plan(rounds=1, patience=0.5, where=("batch=1", "tokens=128", "pass=forward")))
    assert {r.case for r in rows if r.left_out} == set(), "nothing smaller was measured"
    assert {scans.EQUAL_STATE, scans.GRU_CELL_LOOP} <= {r.case for r in rows}
    monkeypatch.setattr(scans, "_probe", lambda *_: [scan_row(1, 64, scans.EQUAL_STATE, [1.0])])
    rows = scans.bench_scan(Plan(rounds=1, patience=0.5, where=("batch=1", "tokens=512", "pass=forward")))
    assert [(r.case, r.left_out) for r in rows if r.left_out] == [(scans.EQUAL_STATE, "longer than 0.5 s")]
    assert all(report.against(r, rows).case == scans.GRU_CELL_LOOP for r in rows)


def test_few_tokens_say_how_long_many_would_take_where_nothing_else_does(monkeypatch):
    monkeypatch.setattr(scans, "SLOTS", 2)
    setting = {"batch": 1, "tokens": 512, "pass": "forward"}
    found = scans._probe([scan_row(8, 128, scans.EQUAL_STATE, [1.0])], setting)
    assert scans.EQUAL_STATE in {r.case for r in found}
    assert all(r.setting == {**setting, "tokens": scans.PROBE} and r.median > 0 for r in found)
    assert scans._probe([scan_row(1, 128, scans.EQUAL_STATE, [1.0])], setting) == []
    assert scans._probe([], {**setting, "tokens": 128}) == [], "its first call says so"


def test_the_shape_that_ships_is_compared_as_a_whole_site():
    rows = scans.bench_scan(Plan(rounds=1, quick=True))
    rows = [r for r in rows if r.case == f"whole site, {models.CONVERSATION}"]
    assert [r.setting["pass"] for r in rows] == ["forward", "forward + backward"]
    site = scans.conversation_site(48)
    assert (site.addressing, site.num_heads, site.num_slots, site.key_size) == ("content", 1, 224, 3 * 48)


def test_the_loop_around_gru_cells_is_the_same_recurrence():
    inputs, slots, weights = scans.random_scan(2, 30, 3, 4, 8, "gru")
    loop = peers.GRUCellLoop(3, 8)
    for n, cell in enumerate(loop.cells):
        for name, weight in zip(("weight_ih", "bias_ih", "weight_hh", "bias_hh"), weights):
            getattr(cell, name).data.copy_(weight[n])
    reads, after = loop(inputs, slots)
    expected_reads, expected_after = scans.run_scan("reference", *inputs, slots, *weights)
    torch.testing.assert_close(reads, expected_reads, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(after, expected_after, atol=2e-6, rtol=1e-5)
    assert (after - slots).abs().max() > 0.1

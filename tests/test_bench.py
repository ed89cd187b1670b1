"""Benchmarks: cases take turns, ratios are of the same round, and every benchmark runs."""

import json
import math

import pytest
import torch
from tiny import one_thread  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from gru_memory.bench import (
    BENCHMARKS,
    Plan,
    Row,
    floor,
    judge,
    measure,
    models,
    ratio,
    read_rows,
    report,
    run_benchmarks,
    scans,
    side_by_side,
    training,
    write_rows,
)
from gru_memory.cli.app import app


@pytest.fixture(scope="module")
def quick_rows():
    """Rows of a quick round by the name of the benchmark, each measured once."""
    found = {}

    def rows_of(name):
        if name not in found:
            found[name] = run_benchmarks([name], Plan(rounds=1, quick=True))[name]
        return found[name]

    return rows_of


def test_cases_take_turns_and_short_ones_are_repeated(monkeypatch):
    now = 0.0
    calls = []

    def case(name, seconds):
        def run():
            nonlocal now
            now += seconds
            calls.append(name)

        return run

    monkeypatch.setitem(measure.CLOCKS, "wall", lambda: now)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    found = side_by_side({"long": case("long", 1.0), "short": case("short", 0.25)}, Plan(rounds=3), min_seconds=0.5)
    assert found == {"long": [1.0] * 3, "short": [0.25] * 3}
    assert calls == ["long", "long", "short", "short", *(["long", "short", "short"] * 3)]


def test_in_a_round_the_median_of_the_turns_counts(monkeypatch):
    now, calls = 0.0, []
    lasts = iter([1.0, 1.0, 5.0, 5.0, 3.0, 9.0, 4.0, 9.0, 2.0, 9.0])

    def case(name):
        def run():
            nonlocal now
            now += next(lasts)
            calls.append(name)

        return run

    monkeypatch.setitem(measure.CLOCKS, "wall", lambda: now)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    found = side_by_side({"a": case("a"), "b": case("b")}, Plan(rounds=1), min_seconds=0.0, turns=3)
    assert found == {"a": [3.0], "b": [9.0]}
    assert calls[4:] == ["a", "b"] * 3


def test_a_peer_that_takes_too_long_is_called_once_and_left_out(monkeypatch):
    now, calls = 0.0, []

    def case(name, seconds):
        def run():
            nonlocal now
            now += seconds
            calls.append(name)

        return run

    monkeypatch.setitem(measure.CLOCKS, "wall", lambda: now)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    cases = {"ours": case("ours", 30.0), "quick": case("quick", 1.0), "slow": case("slow", 30.0)}
    found = side_by_side(cases, Plan(rounds=2, patience=20), peers=("quick", "slow"))
    assert found == {"ours": [30.0] * 2, "quick": [1.0] * 2, "slow": []}, "what is ours is waited for"
    assert calls.count("slow") == 1


def test_a_plan_can_ask_for_some_settings():
    plan = Plan(where=("tokens=512", "pass=forward + backward"))
    assert plan.wants(tokens=512, **{"pass": "forward + backward"})
    assert plan.wants(batch=8), "a column that is not there decides nothing"
    assert not plan.wants(tokens=128)
    assert all(Plan(where=("turn=2", "turn=200")).wants(turn=turn) == (turn in (2, 200)) for turn in (1, 2, 10, 200))
    assert not plan.wants(tokens=512, **{"pass": "forward"})
    rows = run_benchmarks(["decode"], Plan(rounds=1, quick=True, where=("batch=8",)))["decode"]
    assert {row.setting["batch"] for row in rows} == {8}


@pytest.mark.parametrize("cell", ("gru", "mingru"))
def test_operations_of_the_floor_are_those_that_torch_counts(cell):
    """torch counts products with matrices alone; the update is 3 more for each number of a slot."""
    heads, slots, size, length = 3, 5, 8, 7
    inputs, state, weights = scans.random_scan(1, length, heads, slots, size, cell)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        scans.run_scan("reference", *inputs, state, *weights)
    update = 3 * heads * slots * size
    assert length * (floor.scan_operations(heads, slots, size, cell, False) - update) == counter.get_total_flops()


def test_ratios_are_taken_within_a_round():
    slow_machine_in_round_two = [1.0, 10.0, 1.0]
    mine = Row("scan", {}, "mine", [2 * s for s in slow_machine_in_round_two])
    assert ratio(mine, Row("scan", {}, "theirs", slow_machine_in_round_two)) == (2.0, 2.0, 2.0)


def test_the_spread_is_that_of_the_middle_half():
    assert Row("scan", {}, "a", [1.0, 2.0, 3.0, 4.0, 100.0]).spread == pytest.approx(2 / 3)
    assert Row("scan", {}, "a", [1.0]).spread == 0


def test_plans_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="rounds"):
        Plan(rounds=0)
    with pytest.raises(ValueError, match="wall"):
        Plan(clock="sun")
    with pytest.raises(ValueError, match="NAME=VALUE"):
        Plan(where=("tokens",))
    with pytest.raises(ValueError, match="decode"):
        run_benchmarks(["dekode"], Plan())


def test_targets_are_judged_where_both_sides_were_measured():
    model = {"model": "SmolLM2-135M"}
    rows = [
        Row("training", model, "top site, cached, gru", [1.4, 1.4]),
        Row("training", model, "top site, cached, mingru", [1.0, 1.0]),
        Row("conversation", {**model, "turn": 2}, "memory", [1.0, 1.0], kept_bytes=100),
        Row("conversation", {**model, "turn": 200}, "memory", [1.2, 1.0], kept_bytes=106),
        Row("decode", {"model": "tiny", "batch": 1}, "top site, gru", [9.0]),
        Row("decode", {"model": "tiny", "batch": 1}, "no memory", [1.0]),
    ]
    outcomes = {outcome.target.what: outcome for outcome in judge(rows)}
    turns = "turn 200 against turn 2, with memory"
    assert set(outcomes) == {"training step, gru against mingru", f"{turns}, time", f"{turns}, bytes"}
    assert outcomes["training step, gru against mingru"].met
    grown, kept = outcomes[f"{turns}, time"], outcomes[f"{turns}, bytes"]
    assert (grown.ratio, grown.low, grown.high, grown.met) == (1.1, 1.0, 1.2, False)
    assert (kept.ratio, kept.met) == (1.06, False)


def test_every_target_names_cases_that_the_benchmarks_have(quick_rows):
    pytest.importorskip("titans_pytorch")
    pytest.importorskip("peft")
    cases = {name: {r.case for r in quick_rows(name)} for name in {target.benchmark for target in report.TARGETS}}
    for target in report.TARGETS:
        assert {target.case, target.against} <= cases[target.benchmark], target.what


def test_exponents_of_known_powers():
    rows = [
        Row("growth", {"axis": "tokens", "tokens": size}, "gru", [3.0 * size**1.5], peak_bytes=7 * size)
        for size in (10, 100, 1000)
    ]
    ((time, memory),) = report.exponents(rows).values()
    assert (time, memory) == (pytest.approx(1.5), pytest.approx(1.0, abs=1e-2))


def test_the_file_has_what_the_tables_conclude(tmp_path):
    model = {"model": "SmolLM2-135M", "batch": 1}
    rows = [
        *(Row("growth", {"axis": "slots", "slots": n}, "gru", [2.0 * n], peak_bytes=n**2) for n in (10, 100)),
        Row("decode", model, "top site, gru", [1.0], units=2),
        Row("decode", model, "no memory", [0.5], units=2),
        Row("scan", {"batch": 1}, "a peer", [], left_out="longer than 20 s"),
    ]
    write_rows(tmp_path / "bench.json", "gru-memory bench", Plan(), rows)
    values = json.loads((tmp_path / "bench.json").read_text(), parse_constant=pytest.fail)
    (growth,) = values["growth"]
    assert (growth["cell"], growth["size"]) == ("gru", "slots")
    assert (growth["time_exponent"], growth["peak_memory_exponent"]) == (pytest.approx(1), pytest.approx(2))
    assert [(target["what"], target["met"]) for target in values["targets"]] == [("decode, top site, gru", False)]
    assert [one.get("tokens_per_second") for one in values["rows"]] == [None, None, 2.0, 4.0, None]
    assert values["rows"][-1]["left_out"] == "longer than 20 s"
    assert read_rows(tmp_path / "bench.json") == rows


def test_the_peak_is_what_tensors_take_at_a_time():
    kept = []

    def case():
        for _ in range(3):
            torch.zeros(1000, 250).add_(1)  # freed at once
        kept.append(torch.zeros(1000, 250) + 1)  # two at a time
        torch.zeros(10)

    assert measure.peak_bytes(case) == pytest.approx(2_000_000, abs=100)
    assert measure.peak_bytes(lambda: None) == 0


def test_rows_come_back_from_their_file(tmp_path):
    rows = [
        Row("scan", {"batch": 1}, "a", [1.0, 2.0], peak_bytes=5),
        Row("growth", {"axis": "tokens", "tokens": 5}, "gru", [1.0]),
    ]
    write_rows(tmp_path / "deep" / "bench.json", "gru-memory bench", Plan(), rows)
    assert read_rows(tmp_path / "deep" / "bench.json") == rows
    values = json.loads((tmp_path / "deep" / "bench.json").read_text())
    assert values["runs"].keys() == {"scan", "growth"}
    assert values["runs"]["scan"]["command"] == "gru-memory bench"
    assert values["runs"]["scan"]["environment"]["threads"] == 1
    assert values["rows"][0]["median"] == 1.5


def test_a_file_keeps_the_rows_of_other_benchmarks_and_says_how_each_was_measured(tmp_path):
    file = tmp_path / "bench.json"
    file.write_text('{"command": "of an earlier version", "rows": []}')
    scan, decode = Row("scan", {"batch": 1}, "a", [1.0]), Row("decode", {"batch": 1}, "b", [1.0])
    write_rows(file, "first", Plan(rounds=3), [scan, decode])
    again = Row("decode", {"batch": 8}, "b", [2.0])
    write_rows(file, "second", Plan(rounds=4), [again])
    assert read_rows(file) == [scan, again], "rows of one benchmark are never of two runs"
    runs = json.loads(file.read_text())["runs"]
    assert {name: (run["command"], run["plan"]["rounds"]) for name, run in runs.items()} == {
        "scan": ("first", 3),
        "decode": ("second", 4),
    }
    assert all({"environment", "date"} <= run.keys() for run in runs.values())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs(name, quick_rows):
    rows = quick_rows(name)
    assert rows
    for one in rows:
        assert one.benchmark == name
        assert len(one.seconds) == 1
        assert 0 < one.median < math.inf
    settings = [(tuple(one.setting.items()), one.case) for one in rows]
    assert len(set(settings)) == len(settings), "two rows say the same"
    if name in report.AGAINST:
        assert all(report.against(one, rows) is not None for one in rows)


def test_a_step_of_training_is_timed_in_both_precisions(quick_rows):
    pytest.importorskip("peft")
    cases = {r.case for r in quick_rows("training")}
    assert {"LoRA r=8", "LoRA r=8, bfloat16", "three sites, gru", "three sites, mingru"} <= cases
    assert run_benchmarks(["training"], Plan(rounds=1, quick=True, where=("tokens=7",)))["training"] == []


def test_autocast_is_what_tells_the_two_steps_of_lora_apart():
    model = models.smollm2(Plan(quick=True))
    seen = []
    model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(logits.dtype))
    ids = torch.randint(10, 90, (1, 8))
    for autocast in (False, True):
        training._step(model, ids, model.parameters(), autocast)()
    assert seen == [torch.float32, torch.bfloat16]


def test_eight_prompts_at_a_time_are_taken_in_by_the_model_and_the_shape_that_ships(quick_rows):
    rows = [r for r in quick_rows("prefill") if r.setting["batch"] == 8]
    assert [r.case for r in rows] == ["no memory", models.CONVERSATION]
    assert all(r.units == 8 * r.setting["tokens"] for r in rows)
    assert all(report.against(r, quick_rows("prefill")).setting == r.setting for r in rows)


def test_a_copy_shares_weights_and_nothing_else():
    base = models.smollm2(Plan(quick=True))
    other = models.with_memory(base, ("top",), "gru")
    assert other.lm_head.weight is base.lm_head.weight
    assert other.lm_head is not base.lm_head
    assert not hasattr(base, "memory_state")


def test_the_command_prints_writes_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--quick", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "conversation", *options], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "history, fed again" in result.output
    assert "kept" in result.output
    assert "peak memory" not in result.output, "a column of nothing"
    assert {r.benchmark for r in read_rows(tmp_path / "bench.json")} == {"conversation"}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_time_and_bytes_and_cuts_no_title(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from gru_memory.bench import figure

    drawn = []
    monkeypatch.setattr(figure, "save", lambda made, path: drawn.append(made))
    rows = [
        *(Row("growth", {"axis": "slots", "slots": n}, "gru", [1.0 * n], peak_bytes=n) for n in (16, 64)),
        *(Row("prefill", {"tokens": 9}, case, [1.0], peak_bytes=7) for case in ("no memory", "top site, gru")),
        *(Row("conversation", {"turn": n}, "memory", [1.0], kept_bytes=5) for n in (1, 2)),
        Row("conversation", {"turn": 2}, "history, fed again", [], kept_bytes=9, left_out="longer than 20 s"),
        *(Row("gpu", {"device": "a"}, case, [1.0]) for case in ("gru, reference", "gru, triton")),
        *(Row("scan", {"batch": 8}, case, [1.0]) for case in ("loop around nn.GRUCell", "gru, compiled")),
        Row("scan", {"batch": 8}, "titans NeuralMemory", [], left_out="longer than 20 s"),
    ]
    figure.plot_rows(rows, tmp_path / "bench.png")
    canvas = FigureCanvasAgg(drawn[0])
    canvas.draw()
    assert {"bytes kept", "seconds", "time, likewise", "peak memory, likewise"} <= {
        axes.get_ylabel() for axes in drawn[0].axes
    }
    titles = [band.get_suptitle() for band in drawn[0].subfigs]
    assert sum("peak memory" in title for title in titles) == 1
    for band in drawn[0].subfigs:
        place = band._suptitle.get_window_extent(canvas.get_renderer())
        assert 0 <= place.x0 < place.x1 <= drawn[0].bbox.x1, band.get_suptitle()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["conversation", "dekode"], "there is no benchmark 'dekode'"),
        (["gpu"], "torch finds no GPU here"),
        (["conversation", "--quick", "--where", "turn=3"], "none of its settings is turn=3"),
    ],
)
def test_a_command_that_measures_nothing_says_why_and_writes_nothing(arguments, said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "results"
    result = CliRunner().invoke(app, ["bench", *arguments, "--threads", "1", "--out", str(out)])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert said in line
    assert not out.exists()

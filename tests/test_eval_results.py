"""The page of results says what the JSON files say, and where each figure comes from."""

import json

import pytest

from gru_memory.evaluation import RecallConfig, RecallResult
from gru_memory.evaluation.grid import GridConfig
from gru_memory.evaluation.outcome import Columns, Figure, Outcome, table
from gru_memory.evaluation.recall_table import RECALL, pooled, recall_runs
from gru_memory.evaluation.report import environment, write_report
from gru_memory.evaluation.results_page import results_page
from gru_memory.evaluation.scoring import Rate, wilson_interval

ABOUT = {"model": "smollm2", "memory": {"from": "shipped", "fingerprint": "abcdef0123456789"}}


def grid(seed, share):
    row = {"facts": 3, "turns": 10, "recall": share, "low": share - 0.1, "high": share + 0.1, "questions": 40}
    return Outcome(GridConfig(seed=seed), [row], 5.0)


def recall(seed, hits, corrected=False):
    rate, old = Rate.of([True] * hits + [False] * (10 - hits)), {"memory": Rate.of([False] * 10)} if corrected else None
    config = RecallConfig(facts=3, between=2, seed=seed, corrected=corrected)
    return RecallResult(config, rate, Rate.of([False] * 10), None, old, 30_000, None, None, 0, {"memory": 2.0}, [])


def test_the_page_gives_means_spread_and_origin(tmp_path):
    outcomes = [grid(1, 0.5), grid(2, 0.6), grid(3, 0.7)]
    write_report(tmp_path / "grid.json", "gru-memory eval grid --seeds 3", 1, outcomes, evaluation="grid", **ABOUT)
    (tmp_path / "grid.png").write_bytes(b"picture")
    (tmp_path / "untold.json").write_text("[]")
    few = results_page(tmp_path, tmp_path / "docs" / "results.md")
    page = (tmp_path / "docs" / "results.md").read_text()
    assert few == []
    low, high = wilson_interval(20 + 24 + 28, 120)  # of all questions together
    assert f"| 3 | 10 | 60.0% ± 10.0 | {100 * low:.1f}% | {100 * high:.1f}% | 40 |" in page
    assert "    gru-memory eval grid --seeds 3\n" in page
    assert "seeds 1, 2, 3 (3)" in page
    assert "model smollm2, memory shipped (`abcdef012345`)" in page
    machine = environment()
    assert f"commit {machine['commit'] or 'unknown'}; gru-memory" in page
    assert f"{machine['cpu']}, {machine['cores']} cores" in page and "; 15 s" in page
    assert "![grid](results/grid.png)" in page
    assert (tmp_path / "docs" / "results" / "grid.png").read_bytes() == b"picture"
    assert "untold" not in page


def test_a_section_without_a_report_stays_as_it_was(tmp_path):
    page, first, second = tmp_path / "results.md", tmp_path / "first", tmp_path / "second"
    settings = {"command": "gru-memory eval grid --seeds 3", "seed": 1, "evaluation": "grid", **ABOUT}
    outcomes = [grid(seed, 0.5) for seed in (1, 2, 3)]
    write_report(first / "grid.json", results=outcomes, **settings)
    (first / "grid.png").write_bytes(b"picture")
    results_page(first, page)
    alone = page.read_text()
    runs = [recall(1, 6), recall(2, 6), recall(3, 6)]
    write_report(second / "recall.json", "gru-memory eval recall", 1, runs, evaluation="recall", **ABOUT)
    assert results_page(second, page) == []
    both = page.read_text()
    assert both.index("## recall") < both.index("## grid")
    assert both.endswith(alone[alone.index("## grid") :])
    write_report(second / "grid.json", results=[grid(seed, 0.9) for seed in (1, 2, 3)], **settings)
    results_page(second, page)
    assert "90.0%" in page.read_text() and page.read_text().count("## grid") == 1
    results_page(first, page)
    assert page.read_text() == both


def test_a_figure_that_some_runs_lack_says_so():
    figures = {"ranking": Figure("ranking", "share")}
    columns = Columns(name="inspect", about="", labels={"facts": "facts"}, figures=figures)
    runs = [{"rows": [{"facts": 5, "ranking": value}]} for value in (None, 0.9, None)]
    assert table(runs, columns)[1] == [["5", "90.0% (1 of 3 runs)"]]
    assert table(runs[1:2], columns)[1] == [["5", "90.0%"]]


def test_recall_is_a_run_a_seed(tmp_path):
    results = [recall(1, 6), recall(1, 9, corrected=True), recall(2, 8), recall(2, 9, corrected=True)]
    write_report(tmp_path / "recall.json", "gru-memory eval recall", 1, results, evaluation="recall", **ABOUT)
    assert results_page(tmp_path, tmp_path / "results.md") == [RECALL.name]
    page = (tmp_path / "results.md").read_text()
    assert "(2, fewer than 3: the spread is not known)" in page
    assert "| 3 facts, 2 turns between, unseen values | 70.0% ± 14.1 | 0.0% ± 0.0 |  | 10 | 30.0 KB |" in page
    assert "| 3 facts, 2 turns between, unseen values, corrected | 90.0% ± 0.0 | 0.0% ± 0.0 | 0.0% ± 0.0 |" in page
    one, corrected = pooled(results)
    assert (one.memory.hits, one.memory.total, one.full_history) == (14, 20, None)
    assert corrected.memory.hits == 18
    assert len(recall_runs([result.to_json() for result in results])) == 2


def test_the_page_does_not_say_where_things_lie_on_the_machine(tmp_path):
    command = (
        "gru-memory eval grid --model /opt/me/models/small --out=/tmp/r/out --memory '/data/a/my-memory' --turns 1/2"
    )
    about = {"model": "/opt/me/models/small", "memory": {"from": "/data/a/my-memory"}}
    write_report(tmp_path / "grid.json", command, 1, [grid(1, 0.5)], evaluation="grid", **about)
    results_page(tmp_path, tmp_path / "results.md")
    page = (tmp_path / "results.md").read_text()
    assert "    gru-memory eval grid --model small --memory 'my-memory' --turns 1/2\n" in page
    assert "- model small, memory my-memory\n" in page


def test_what_is_no_report_is_refused_or_left_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="run some first"):
        results_page(tmp_path, tmp_path / "results.md")
    (tmp_path / "grid.json").write_text("{")
    with pytest.raises(ValueError, match=r"grid\.json is damaged"):
        results_page(tmp_path, tmp_path / "results.md")
    (tmp_path / "grid.json").write_text(json.dumps({"evaluation": "harm", "results": [1]}))
    with pytest.raises(FileNotFoundError):
        results_page(tmp_path, tmp_path / "results.md")
    assert not (tmp_path / "results.md").exists()

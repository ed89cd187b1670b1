"""Every evaluation as a command: options from its settings, JSON, a table over seeds, and a picture."""

import dataclasses
import json
import math

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from talking import talking_base, talking_model, talking_tokenizer
from typer.testing import CliRunner

from gru_memory import embedded, shipped
from gru_memory.cli.app import app
from gru_memory.evaluation.catalogue import EVALUATIONS
from gru_memory.evaluation.outcome import Columns, Figure, Needs, curve, spread, table
from gru_memory.evaluation.report import environment
from gru_memory.limits import at_least

# The least that each can be run with.
SMALL = {
    "drift": ["--books", "BOOKS", "--tokens", 300, "--window", 64, "--points", 2],
    "inspect": ["--facts", 2, "--between", 1, "--sessions", 2, "--max-new-tokens", 2],
    "editing": ["--facts", 2, "--between", 1, "--sessions", 2, "--max-new-tokens", 2],
    "grid": ["--facts", "1,2", "--turns", "0,1", "--sessions", 2, "--max-new-tokens", 2],
    "untold": ["--facts", "0,1", "--between", 1, "--questions", 1, "--sessions", 2, "--max-new-tokens", 2],
    "general": ["--facts", "0,1", "--between", 1, "--questions", 3, "--max-new-tokens", 2],
    "doubt": ["--shifts", "-2,0", "--facts", 1, "--between", 1, "--untold", 1, "--sessions", 2, "--books", "BOOKS", "--tokens", 40,
              "--max-new-tokens", 2],
    "people": ["--facts", 1, "--between", 1, "--sessions", 2, "--max-new-tokens", 2],
    "isolation": ["--facts", 1, "--between", 1, "--rows", "2", "--max-new-tokens", 2],
    "harm": ["--conversations", 2, "--turns", 1, "--facts", 1, "--code-files", 1, "--tokens", 40],
    "continual": ["--sets", 2, "--facts", 1, "--steps", 1, "--rows", 2, "--wordings", 1, "--max-new-tokens", 2],
    "timeline": ["--facts", 1, "--between", 1, "--tokens", 3, "--heads", 1, "--max-new-tokens", 2],
    "associative": ["--kinds", "mingru,rmt,attention", "--pairs", "1,2", "--state-bytes", 2048, "--steps", 2, "--tokens", 16,
                    "--width", 16, "--vocabulary", 16, "--segment", 4, "--tests", 2],
    "babi": ["--tasks", "1,3", "--turns", "0,1", "--stories", 6, "--talk", 2, "--most-noise", 1, "--steps", 1, "--rows", 2,
             "--tests", 2, "--max-new-tokens", 2],
    "compare": ["--variants", "top,gru,RMT memory tokens,decayed average,no memory", "--steps", 1, "--rows", 1, "--facts", 1,
                "--between", 0, "--tests", 1],
    "longdoc": ["--books", "BOOKS", "--tokens", 200, "--windows", "16,32"],
    "fading": ["--decays", "0.5,0.9", "--turns", "0,1", "--facts", 1, "--sessions", 2, "--max-new-tokens", 2],
}  # fmt: skip


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    loaded = talking_model("llama", address_rank=8, signature_size=4), talking_tokenizer("llama")
    monkeypatch.setattr(shipped, "load_with_memory", lambda model, memory, device: loaded)
    monkeypatch.setattr(embedded, "load_model", lambda model: (talking_base("llama"), talking_tokenizer("llama")))
    return lambda *args: CliRunner().invoke(app, ["eval", *(str(arg) for arg in args)])


@pytest.mark.parametrize("name", EVALUATIONS)
def test_it_writes_figures_a_table_and_a_picture(name, run, tmp_path, small_books):
    evaluation = EVALUATIONS[name]
    options = [small_books if option == "BOOKS" else option for option in SMALL[name]]
    result = run(name, *options, "--seed", 7, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["evaluation"] == name
    if evaluation.needs is Needs.MEMORY:
        assert written["memory"]["config"]["num_slots"] == 4
    else:
        assert written["memory"] == {"from": "trained here"}
    assert "commit" in written["environment"]
    (found,) = written["results"]
    assert found["config"]["seed"] == 7
    assert found["rows"]
    for row in found["rows"]:
        assert set(evaluation.labels) <= set(row)
        assert set(row) <= set(evaluation.labels) | set(evaluation.figures)
        assert any(row.get(figure) is not None for figure in evaluation.figures)
        assert all(math.isfinite(row[figure]) for figure in evaluation.figures if row.get(figure) is not None)
    assert all(heading.split()[0] in result.output for heading in evaluation.labels.values())
    assert (tmp_path / f"{name}{evaluation.suffix}").stat().st_size > 5000


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_setting_has_a_help_and_a_seed_is_one(name):
    fields = {field.name: field for field in dataclasses.fields(EVALUATIONS[name].config)}
    assert all(field.metadata["help"] for field in fields.values())
    assert "seed" in fields


def test_several_seeds_are_runs_of_their_own(run, tmp_path):
    result = run("fading", *SMALL["fading"], "--seed", 3, "--seeds", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "fading.json").read_text())
    assert [found["config"]["seed"] for found in written["results"]] == [3, 4]
    assert written["results"][0]["details"]["replies"] != written["results"][1]["details"]["replies"]
    assert "±" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fading", "--decays", "0.5,x"], "error: decays is '0.5,x'"),
        (["fading", "--decays", "1.5"], "error: decays are (1.5,)"),
        (["fading", "--turns", ""], "error: turns is empty"),
        (["fading", "--seeds", "0"], "error: seeds is 0"),
        (["drift"], "error: there is nothing to read: name a folder"),
        (["longdoc", "--books", "nowhere"], "error: no .txt file in nowhere"),
        (["fading", "--sessions", "0"], "error: sessions is 0"),
        (["general", "--questions", "100000"], "error: questions is 100000: there are 100"),
        (["drift", "--books", "BOOKS", "--tokens", "1"], "error: tokens is 1: it must be at least 2"),
        (["longdoc", "--books", "EMPTY", "--windows", "16"], "empty.txt has no text to read"),
    ],
)
def test_wrong_settings_are_one_line(options, message, run, tmp_path, small_books, tmp_path_factory):
    empty = tmp_path_factory.mktemp("books")
    (empty / "empty.txt").touch()
    options = [{"BOOKS": small_books, "EMPTY": empty}.get(option, option) for option in options]
    result = run(*options, "--out", tmp_path)
    assert result.exit_code == 1
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_a_table_gives_mean_and_deviation_over_the_runs():
    figures = {"hit": Figure("hits", "share"), "loss": Figure("loss", "nats"), "seen": Figure("seen", shown=False)}
    figures["theirs"] = Figure("theirs", "share", measured=False)
    evaluation = Columns(name="x", about="about", labels={"kind": "kind"}, figures=figures)
    runs = [
        {"rows": [{"kind": "a", "hit": 0.5, "loss": 1.0, "seen": 1, "theirs": 0.9}, {"kind": "b", "hit": 1.0}]},
        {"rows": [{"kind": "a", "hit": 0.7, "loss": 3.0, "theirs": 0.9}]},
    ]
    (_, a), (_, b) = spread(runs, evaluation)
    assert (a["hit"].mean, a["hit"].runs) == (pytest.approx(0.6), 2)
    assert a["loss"].deviation == pytest.approx(math.sqrt(2))
    assert b["hit"].deviation is None and b["loss"] is None
    headings, cells = table(runs, evaluation)
    assert headings == ["kind", "hits", "loss", "theirs"]
    assert cells == [["a", "60.0% ± 14.1", "2.0000 ± 1.4142", "90.0%"], ["b", "100.0%", "", ""]]
    assert curve([{"rows": [{"n": 2, "y": 1}, {"n": 1, "y": 0}]}, {"rows": [{"n": 1, "y": 4}]}], "n", "y") == (
        [1, 2], [2, 1], [0, 1], [4, 1],
    )  # fmt: skip


def test_settings_below_their_least_are_named():
    config = dataclasses.make_dataclass("C", [("n", int, 0), ("many", tuple, (3, 0))])()
    with pytest.raises(ValueError, match="n is 0: it must be at least 1"):
        at_least(config, 1, "n")
    with pytest.raises(ValueError, match="many is 3, 0"):
        at_least(config, 1, "many")
    with pytest.raises(ValueError, match="n is inf: it must be finite"):
        at_least(dataclasses.replace(config, n=float("inf")), 1, "n")


def test_the_environment_names_the_commit_of_a_checkout(repository):
    if not (repository / ".git").exists():
        pytest.skip("not a git checkout")
    assert len(environment()["commit"].removesuffix("+")) == 12

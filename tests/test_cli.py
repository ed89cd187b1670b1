"""The command line: help, one-line errors, and results on disk."""

import json
import socket
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from rich.console import Console
from rich.table import Table
from talking import talking_model, talking_tokenizer
from typer.testing import CliRunner

import gru_memory
from gru_memory import cli, shipped
from gru_memory.cli import output
from gru_memory.cli.app import app
from gru_memory.shipped import load_with_memory, shipped_memory

runner = CliRunner()


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *args: runner.invoke(app, [str(arg) for arg in args])


@pytest.fixture
def tiny(monkeypatch):
    """Commands that load a model get a tiny one."""
    loaded = talking_model("llama"), talking_tokenizer("llama")
    monkeypatch.setattr(shipped, "load_with_memory", lambda model, memory, device: loaded)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["demo", "eval", "train", "chat", "sessions"]),
        (["demo"], ["--model", "--memory", "--out"]),
        (["eval"], ["recall", "harm"]),
        (["eval", "recall"], ["--facts", "--between", "--suite", "--no-full-history", "--seed", "--memory"]),
        (["eval", "harm"], ["--books", "--tokens", "--conversations"]),
        (["serve"], ["--host", "--api-keys", "--store", "--max-batch", "--cors-origin", "--ttl-days"]),
        (["train"], ["--data", "--steps", "--rows", "--learning-rate", "--key-layers", "--pool-facts", "--threads"]),
    ],
)
def test_help_names_every_option_with_a_text(run, command, words):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert all(word in result.output for word in words)


def test_the_version_is_that_of_the_library(run):
    assert run("--version").output.strip() == f"gru-memory {gru_memory.__version__}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["eval", "recall", "--values", "some"], "error: values is 'some'"),
        (["eval", "recall", "--facts", "0"], "error: facts is 0"),
        (["eval", "results", "--folder", "nowhere"], "error: no report of an evaluation in nowhere"),
        (["eval", "harm", "--books", "nowhere"], "error: no .txt file in nowhere"),
        (["eval", "harm", "--conversations", "0", "--code-files", "0"], "error: there is nothing to read"),
        (["eval", "compare", "--variants", ""], "error: variants has none: choose of top, "),
        (["eval", "compare", "--variants", "top,left"], "error: variants has left: choose of top, "),
        (["eval", "babi", "--tasks", ""], "error: tasks has none: choose of 1, 2, 3, 4, 5"),
        (["eval", "babi", "--tasks", "1,9"], "error: tasks has 9: choose of 1, 2, 3, 4, 5"),
        (["eval", "continual", "--methods", ","], "error: methods has none: choose of "),
        (["eval", "associative", "--kinds", ""], "error: kinds has none: choose of gru, "),
        (["bench", "scan", "--patience", "-1"], "error: patience is -1.0: it must be at least 0"),
        (["bench", "scan", "--patience", "nan"], "error: patience is nan: it must be at least 0"),
        (["train", "--out", "x", "--learning-rate", "inf"], "error: learning_rate is inf: it must be finite"),
        (["demo", "--memory", "nowhere"], "error: nowhere holds no memory"),
        (["demo", "--threads", "0"], "error: threads is 0"),
        (["demo", "--device", "nowhere"], "error: device is 'nowhere'"),
        (["eval", "grid", "--device", "nowhere"], "error: device is 'nowhere'"),
        (["demo", "--model", "./nowhere"], "error: no trained memory ships for './nowhere'"),
        (["serve", "--host", "0.0.0.0"], "error: 0.0.0.0 can be reached from elsewhere"),
        (["serve", "--api-keys", "nowhere"], "error: nowhere: No such file or directory"),
        (["sessions", "list", "--store", "nowhere.db"], "error: there is no store nowhere.db"),
        (["sessions", "rm", "a", "--store", "sqlite:///nowhere/x.db"], "error: there is no store nowhere/x.db"),
        (["sessions", "list", "--store", ""], "error: the store is empty"),
        (["sessions", "rm", "a", "--store", ""], "error: the store is empty"),
        (["sessions", "import", "a", "--store", " "], "error: the store is empty"),
        (["sessions", "import", "nowhere"], "error: nowhere: No such file or directory"),
        (["chat", "--store", ""], "error: the store is empty"),
        (["chat", "--store", "x.db", "--temperature", "-1"], "error: temperature is -1.0"),
        (["chat", "--store", "x.db", "--temperature", "nan"], "error: temperature is nan"),
        (["chat", "--store", "x.db", "--temperature", "inf"], "error: temperature is inf"),
        (["chat", "--store", "x.db", "--max-new-tokens", "0"], "error: max_new_tokens is 0"),
        (["chat", "--store", "x.db", "--context-turns", "0"], "error: context_turns is 0"),
        (["chat", "--ephemeral", "--system", "Caf\udce9."], "error: the system prompt is no valid UTF-8"),
        (["train", "--out", "x", "--data", "nowhere"], "error: nowhere: No such file or directory"),
        (["train", "--out", "x", "--validate-every", "0"], "error: validate_every is 0: it must be at least 1"),
        (["train", "--out", "x", "--steps", "-5"], "error: steps is -5"),
        (["train", "--out", "x", "--corrected", "1.5"], "error: corrected is 1.5: it is a share"),
        (["serve", "--ttl-days", "nan"], "error: ttl_days is nan"),
        (["train", "--out", "x", "--cell", "gru"], "error: addressing by content compares signatures"),
        (["serve", "--max-sessions", "0"], "error: max_sessions is 0"),
        (["serve", "--max-states", "0"], "error: max_states is 0"),
        (["serve", "--max-batch", "0"], "error: max_batch is 0"),
        (["serve", "--context-turns", "0"], "error: context_turns is 0"),
        (["serve", "--api-keys", "k", "--no-auth"], "error: --api-keys and --no-auth say two different things"),
        (["serve", "--min-replicas", "1"], "error: --min-replicas is for replicas: give --ray as well"),
        (["serve", "--replica-gpus", "1"], "error: --replica-gpus is for replicas: give --ray as well"),
        (["serve", "--max-new-tokens", "0"], "error: max_new_tokens is 0"),
        (["serve", "--max-new-tokens", "2049"], "is 2049 tokens: give at most 2048"),
        (["serve", "--grace", "inf"], "error: grace_seconds is inf"),
        (["serve", "--ttl-days", "inf"], "error: ttl_days is inf"),
        (["train", "--out", "x", "--cell", "lstm"], "error: cell is 'lstm'"),
        (["train", "--out", "x", "--key-layers", "a"], "error: key_layers is 'a'"),
        (["train", "--out", "x", "--device", "nowhere"], "error: device is 'nowhere'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(run, command, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = run(*command)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_said_before_a_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr("gru_memory.cli.serve.load", lambda *_: pytest.fail("a model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "--port", port)
    assert result.exit_code == 1 and f"cannot listen on 127.0.0.1, port {port}" in result.output


@pytest.mark.parametrize("command", [["demo"], ["eval", "recall"], ["eval", "grid"], ["bench", "scan", "--quick"]])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_runs(run, command, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "load_with_memory", lambda *arguments: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    result = run(*command, "--out", tmp_path / "file" / "below")
    assert result.exit_code == 1
    assert result.stderr.endswith(f"error: {tmp_path / 'file'} is a file: name a folder to write to\n")


def test_recall_writes_a_table_and_every_reply(run, tiny, tmp_path):
    small = ["--facts", 1, "--between", 1, "--sessions", 2, "--max-new-tokens", 3, "--seed", 5]
    result = run("eval", "recall", *small, "--no-full-history", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "1 facts, 1 turns between, unseen values" in result.output
    written = json.loads((tmp_path / "recall.json").read_text())
    assert written["seed"] == 5
    assert written["results"][0]["config"]["between"] == 1
    assert written["results"][0]["full_history"] is None
    assert len(written["results"][0]["replies"]) == 2


def test_tables_in_a_file_are_whole(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    words = [f"a column of {number}" for number in range(9)]
    table = Table(*words)
    with output.console.capture() as captured:
        output.console.print(table)
    assert all(word in captured.get() for word in words)
    monkeypatch.setenv("COLUMNS", "60")
    assert output.console.width == 60


def test_train_hands_over_what_was_asked_for(run, monkeypatch, tmp_path):
    requests = []

    def train(request, report, progress):
        progress("hidden states", 1, 2)
        report({"step": 1, "steps": 2})
        report({"validation": {"step": 1, "values": 0.25}})
        requests.append(request)
        return tmp_path

    monkeypatch.setattr("gru_memory.cli.train.train", train)
    result = run("train", "--out", tmp_path, "--num-heads", 3, "--key-layers", "4,5", "--steps", 7, "--pool-facts", 9)
    assert result.exit_code == 0, result.output
    assert "step 1: values 0.250" in result.output
    (request,) = requests
    assert request.memory == {"num_heads": 3, "key_layers": (4, 5)}
    assert (request.training.steps, request.pool_facts, request.out) == (7, 9, str(tmp_path))


def test_the_demo_shows_three_answers(run, tiny, tmp_path):
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "My boat is called" in result.output
    assert "(float16)" in result.output


def test_without_its_packages_the_command_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("gru_memory.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"pip install 'gru-memory\[all\]'"):
        cli.main()


def test_the_shipped_memory_is_found_or_its_absence_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "src" / "gru_memory")
    with pytest.raises(FileNotFoundError, match="not part of this copy"):
        shipped_memory()
    with pytest.raises(FileNotFoundError, match="no trained memory ships for 'other'"):
        shipped_memory("other")
    at_root = tmp_path / "adapters" / "smollm2-135m-instruct"
    in_package = tmp_path / "src" / "gru_memory" / "adapters" / "smollm2-135m-instruct"
    for folder in (at_root, in_package):  # the package's own comes first
        talking_model("llama").save_memory(folder)
        assert shipped_memory() == folder


def test_a_model_is_loaded_with_the_memory_that_was_named(monkeypatch, tmp_path):
    trained = talking_model("llama")
    trained.save_memory(tmp_path)
    base = talking_model("llama", num_slots=2)
    monkeypatch.setattr(shipped, "load_model", lambda name: (base, "tokenizer"))
    monkeypatch.setattr(shipped, "add_memory", lambda model: model)
    model, tokenizer = load_with_memory("any", tmp_path)
    assert tokenizer == "tokenizer"
    assert model.memory_fingerprint() == trained.memory_fingerprint()


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter((0, 4, 11, 12, 30))
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(output, "errors", Console(stderr=True, force_terminal=False))
    with output.progress() as report:
        for done in range(4):
            report("hidden states", done, 3)
    assert capsys.readouterr().err.splitlines() == ["hidden states: 1 of 3, 11 s", "hidden states: 3 of 3, 30 s"]

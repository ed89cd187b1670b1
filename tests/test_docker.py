"""The Dockerfile does what `make setup` does, and what is in its image needs no network."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from postgres import require

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli along
    import tomli as tomllib

INDEX = "https://packages.example/cpu"


@pytest.fixture(scope="module")
def instructions(repository) -> list[tuple[str, str]]:
    """(FROM, python:...), (RUN, ...) and so on, with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (repository / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(kind, rest) for kind, _, rest in (line.partition(" ") for line in lines)]


def of_kind(instructions, kind):
    return [rest for found, rest in instructions if found == kind]


def made_by_the_makefile(repository, tmp_path, *variables) -> list[list[str]]:
    """The commands of `make setup` where nothing is installed yet, without the checks before them."""
    require(shutil.which("make"), "make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(repository / name, tmp_path)
    command = ["make", "--dry-run", "setup", *variables]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    pieces = [piece.strip() for line in said.splitlines() for piece in line.split("||")]
    return [shlex.split(piece) for piece in pieces if re.search(r"-m (venv|pip install) ", piece)]


@pytest.mark.parametrize("index", ["", INDEX])
def test_the_steps_are_those_of_make_setup(instructions, repository, tmp_path, index):
    wanted = made_by_the_makefile(repository, tmp_path, *([f"TORCH_INDEX={index}"] if index else []))
    # An image has no use for what developers need; nothing else may differ.
    wanted = [[word.replace(".[all,dev]", ".[all]") for word in command] for command in wanted]
    runs = [run for run in of_kind(instructions, "RUN") if re.search(r"-m (venv|pip install) ", run)]
    option = "${TORCH_INDEX:+--index-url $TORCH_INDEX}"
    got = [shlex.split(run.replace(option, f"--index-url {index}" if index else "")) for run in runs]
    assert got == wanted
    assert len(got) == 4 and "TORCH_INDEX=" in of_kind(instructions, "ARG")


def test_all_that_the_steps_read_is_copied_and_not_ignored(instructions, repository):
    sources = [word for copy in of_kind(instructions, "COPY") for word in copy.split()[:-1]]
    assert all((repository / source).exists() for source in sources)
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    read = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert {*read, project["tool"]["setuptools"]["package-dir"][""], "adapters"} <= set(sources)
    ignored = (repository / ".dockerignore").read_text().splitlines()
    assert {f"!{source}" for source in sources} == {line for line in ignored if line.startswith("!")}


def test_the_python_is_one_that_the_project_takes(instructions, repository):
    (image,) = of_kind(instructions, "FROM")
    found = re.fullmatch(r"python:3\.(\d+)-slim", image)
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert found and int(found[1]) >= int(project["requires-python"].removeprefix(">=3."))


def test_the_command_is_one_that_there_is(instructions):
    from typer.main import get_command

    from gru_memory.cli.app import app

    (entry,), (arguments,) = (of_kind(instructions, kind) for kind in ("ENTRYPOINT", "CMD"))
    assert json.loads(entry) == ["gru-memory"]
    name, *options = json.loads(arguments)
    parsed = get_command(app).commands[name].make_context(name, options).params
    assert (parsed["host"], str(parsed["api_keys"])) == ("0.0.0.0", "/run/secrets/api-keys")
    assert parsed["port"] == int(of_kind(instructions, "EXPOSE")[0])
    assert of_kind(instructions, "USER") == ["gru"]


@pytest.mark.slow
@pytest.mark.needs_model
def test_what_is_installed_needs_no_network(tmp_path):
    """In a network namespace of its own, where not even the loopback is up."""
    alone = ["unshare", "--map-root-user", "--net"]
    possible = shutil.which("unshare") and subprocess.run([*alone, "true"], check=False).returncode == 0
    require(possible, "this system lets nobody have a network of their own")
    chat = [sys.executable, "-c", "from gru_memory.cli import main; main()", "chat", "--ephemeral"]
    told = "My boat is called Marigold.\nWhat is my boat called?\n"
    ran = subprocess.run(
        [*alone, *chat], input=told, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280
    )
    assert ran.returncode == 0, ran.stderr[-1000:]
    assert "Marigold" in ran.stdout

"""Every script in examples/ runs, from any folder and without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# For scripts that would run for minutes.
ARGUMENTS = {
    "untrained_influence.py": ["--gates", "0.1"],
    "trainer.py": ["--steps", "2"],
    "lora_and_memory.py": ["--steps", "1"],
}
SLOW = {
    "assisted_decoding.py",
    "beams.py",
    "lora_and_memory.py",
    "small_gpt2.py",
    "streaming.py",
    "trainer.py",
    "untrained_influence.py",
}


def _parameter(script: Path):
    marks = [pytest.mark.slow] if script.name in SLOW else []
    text = script.read_text(encoding="utf-8")
    if "gru_memory.embedded" in text or "gru_memory.shipped" in text:
        marks.append(pytest.mark.needs_model)
    return pytest.param(script, marks=marks, id=script.stem)


@pytest.fixture(scope="module")
def runner():
    """A process that has imported what the scripts import, and becomes one after the other; see forking.py."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forking.py"))],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("script", [_parameter(script) for script in sorted(EXAMPLES.glob("*.py"))])
def test_example_runs(script, runner, tmp_path):
    """It ends well, says something, and leaves nothing in the folder it is called from."""
    folder, out, err = (tmp_path / name for name in ("folder", "out", "err"))
    folder.mkdir()
    job = {"script": script, "folder": folder, "out": out, "err": err}
    arguments = ARGUMENTS.get(script.name, [])
    print(json.dumps({**{k: str(v) for k, v in job.items()}, "arguments": arguments}), file=runner.stdin, flush=True)
    assert runner.stdout.readline().strip() == "0", err.read_text()
    assert out.read_text().strip()
    assert not list(folder.iterdir())


def test_the_lists_name_scripts_that_exist():
    assert {*ARGUMENTS, *SLOW} <= {script.name for script in EXAMPLES.glob("*.py")}

"""Every script in examples/ runs, from any folder and without a network."""

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


@pytest.mark.parametrize("script", [_parameter(script) for script in sorted(EXAMPLES.glob("*.py"))])
def test_example_runs(script, tmp_path):
    """It ends well, says something, and leaves nothing in the folder it is called from."""
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(script), *ARGUMENTS.get(script.name, [])],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert not list(tmp_path.iterdir())


def test_the_lists_name_scripts_that_exist():
    assert {*ARGUMENTS, *SLOW} <= {script.name for script in EXAMPLES.glob("*.py")}

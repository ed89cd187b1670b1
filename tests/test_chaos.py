"""The trials of `make chaos`, in their short forms."""

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

from chaos.trials import TRIALS
from postgres import require

REAL_MODEL = ("facts", "load")  # load SmolLM2, one of them into three servers: `make chaos` alone runs them


def _can_mount_a_disk() -> bool:
    import shutil
    import subprocess

    if shutil.which("unshare") is None:
        return False
    mount = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRIALS if name not in REAL_MODEL])
def test_what_must_hold_holds(name):
    if name == "disk":
        require(_can_mount_a_disk(), "this system lets nobody mount a small disk of their own")
    trial = TRIALS[name]
    result = trial.run(**trial.short)
    assert not result.broken, "\n".join(result.broken)
    assert result.figures

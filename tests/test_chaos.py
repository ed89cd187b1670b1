"""The trials of `make chaos`, in their short forms."""

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

from chaos.trials import TRIALS
from postgres import require


def _can_mount_a_disk() -> bool:
    import shutil
    import subprocess

    if shutil.which("unshare") is None:
        return False
    mount = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIALS)
def test_what_must_hold_holds(name):
    if name == "disk":
        require(_can_mount_a_disk(), "this system lets nobody mount a small disk of their own")
    trial = TRIALS[name]
    result = trial.run(**trial.short)
    assert not result.broken, "\n".join(result.broken)
    assert result.figures

"""Results as JSON, with what is needed to run them again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..whole_files import write_whole

PACKAGES = ("gru-memory", "torch", "transformers", "safetensors")


def environment() -> dict[str, Any]:
    """Versions and the machine."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write_report(path: str | Path, command: str, seed: int | None, results: Sequence[Any], **about: Any) -> None:
    """Write {command, seed, environment, results}, whole or not at all. Every result has `to_json`.

    `about` goes in before the rest: what was measured, of which model.
    """
    path = Path(path)
    values = {
        **about,
        "command": command,
        "seed": seed,
        "environment": environment(),
        "results": [result.to_json() for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def commit() -> str | None:
    """The commit of the checkout that the library runs from, with a + after it if files differ; None without one."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:  # some other project's checkout around an installed copy
        return None
    name, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return name and name + ("+" if changes else "")


def _version(package: str) -> str | None:
    if package == "gru-memory":
        from .. import __version__

        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

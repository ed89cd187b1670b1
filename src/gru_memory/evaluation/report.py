"""Results as JSON, with what is needed to run them again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("gru-memory", "torch", "transformers", "safetensors")


def environment() -> dict[str, Any]:
    """Versions and the machine."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write_report(path: str | Path, command: str, seed: int | None, results: Sequence[Any]) -> None:
    """Write {command, seed, environment, results}, whole or not at all. Every result has `to_json`."""
    path = Path(path)
    values = {
        "command": command,
        "seed": seed,
        "environment": environment(),
        "results": [result.to_json() for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


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

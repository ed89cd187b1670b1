"""The help of every command as one page: `python -m gru_memory.cli.reference > docs/cli.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.testing import CliRunner

from .app import app

WIDTH = 100
_HEAD = """# The command line

What `--help` says, command by command. `gru-memory` comes with `pip install -c constraints.txt '.[all]'` in a clone.
"""


def reference() -> str:
    """The page, in Markdown."""
    runner = CliRunner(env={"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb", "TERMINAL_WIDTH": str(WIDTH)})
    parts = [_HEAD]
    for path in _commands(typer.main.get_command(app)):
        shown = runner.invoke(app, [*path, "--help"], prog_name="gru-memory").output
        text = "\n".join(line.rstrip() for line in shown.splitlines()).strip("\n")
        parts.append(f"## `{' '.join(['gru-memory', *path])}`\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from _commands(below, (*path, name))


if __name__ == "__main__":
    sys.stdout.write(reference())

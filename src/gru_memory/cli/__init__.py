"""The command line. It only calls the library and prints what comes back."""

from __future__ import annotations

import os
import sys

_NEEDED = ("typer", "rich", "sqlalchemy", "alembic", "platformdirs")


def main() -> None:
    """Entry point of `gru-memory`."""
    if not sys.stderr.isatty():  # in a log, bars that are drawn over and over are noise; tqdm looks when it is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _NEEDED:
            raise
        sys.exit(f"the command line needs {error.name}, which is not installed: pip install 'gru-memory[all]'")
    app()

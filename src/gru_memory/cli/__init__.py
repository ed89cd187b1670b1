"""The command line. It only calls the library and prints what comes back."""

from __future__ import annotations

import sys

_NEEDED = ("typer", "rich", "sqlalchemy", "alembic", "platformdirs")


def main() -> None:
    """Entry point of `gru-memory`."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _NEEDED:
            raise
        sys.exit(f"the command line needs {error.name}, which is not installed: pip install 'gru-memory[all]'")
    app()

"""`gru-memory sessions`: the conversations that are kept."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table
from rich.text import Text

from ..state import regular_size
from ..store import SessionStore
from ..store.database import sqlite_file, url_of_environment
from .output import STORE_HELP, console, harmless, kilobytes, one_line_errors, write_new

app = typer.Typer(help="The conversations that are kept.", no_args_is_help=True)

Store = Annotated[Optional[str], typer.Option(help=STORE_HELP)]  # noqa: UP045 (typer on Python 3.10)
Name = Annotated[str, typer.Argument(help="of the session")]


@app.command("list")
@one_line_errors
def list_command(store: Store = None) -> None:
    """All sessions, the last one used first."""
    table = Table(box=None)
    for column in ("name", "last used"):
        table.add_column(column)
    for column in ("turns", "tokens", "memory"):
        table.add_column(column, justify="right")
    with _existing(store) as opened:
        for session in opened.list():
            counts = (str(session.turns), f"{session.tokens:,}", kilobytes(session.state_bytes))
            table.add_row(Text(harmless(session.name)), _when(session.updated_at), *counts)
    if table.row_count:
        console.print(table)
    else:
        console.print("There are no sessions yet: `gru-memory chat` begins one.")


@app.command()
@one_line_errors
def show(name: Name, store: Store = None) -> None:
    """What is kept of a session: its numbers, then its text."""
    with _existing(store) as opened:
        session = opened.get(name)
        turns, everything = opened.transcript(session), opened.turns(session)
    rows = {
        "name": session.name,
        "begun": _when(session.created_at),
        "last used": _when(session.updated_at),
        "expires": "never" if session.expires_at is None else _when(session.expires_at),
        "turns": str(session.turns),
        "tokens": f"{session.tokens:,}",
        "memory": kilobytes(session.state_bytes),
        "snapshots": str(sum(turn.has_state for turn in everything)),
        "made by": session.fingerprint or "nothing yet",
    }
    table = Table(box=None, show_header=False)
    for label, value in rows.items():
        table.add_row(label, Text(harmless(value)))
    console.print(table)
    for turn in turns:
        user = "(not kept)" if turn.user is None else harmless(turn.user)
        console.print(Text(f"\n> {user}"), soft_wrap=True)
        if turn.reply:
            console.print(Text(harmless(turn.reply)), soft_wrap=True)


@app.command()
@one_line_errors
def export(
    name: Name, file: Annotated[Path, typer.Argument(help="to write; must not be there yet")], store: Store = None
) -> None:
    """Write a session, with all its snapshots, as one file."""
    with _existing(store) as opened:
        data = opened.export(opened.get(name))
    write_new(file, data)
    console.print(Text(f"{file}: {kilobytes(len(data))}"), soft_wrap=True)


@app.command("import")
@one_line_errors
def import_command(
    file: Annotated[Path, typer.Argument(help="that `export` wrote")],
    name: Annotated[Optional[str], typer.Option(help="instead of the name it had")] = None,  # noqa: UP045
    store: Store = None,
) -> None:
    """Take in a session from a file."""
    if store is not None:
        sqlite_file(store)  # refuses what names no store
    regular_size(file)  # what is not there, or cannot be read, makes none
    with SessionStore(store) as opened:
        session = opened.import_path(file, name=name)
    console.print(Text(f"session {session.name!r}, {session.turns} turns"), soft_wrap=True)


@app.command()
@one_line_errors
def rm(name: Name, store: Store = None) -> None:
    """Remove a session with everything that is kept of it, and no other."""
    with _existing(store) as opened:
        opened.delete(name)


def _existing(store: str | None) -> SessionStore:
    """The store, if there is one where somebody said that it is, by option or variable: looking makes none."""
    told, how = (store, "--store") if store is not None else (url_of_environment(), "$GRU_MEMORY_STORE")
    path = None if told is None else sqlite_file(told)
    if path is not None and not path.exists():
        raise FileNotFoundError(f"there is no store {path}: give {how} as it was when the sessions were made")
    return SessionStore(told)


def _when(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):  # which of them depends on the machine
        return "after the year 9999"

"""The connection: URL, SQLite's settings, migrations, and database errors as ours."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, NoSuchModuleError, TimeoutError

from .errors import StoreError, StoreUnavailable

SQLITE_WAIT_SECONDS = 10.0  # for a lock that another writer holds
_SCRUB_SECONDS = 0.5  # for readers to get out of the way, who hold up writers meanwhile
_NO_FILE = "a SQLite store is a file: give its path, or sqlite:///PATH"
_MIGRATION_LOCK = 0x6772756D  # of PostgreSQL's advisory locks: any number nobody else uses


def default_url() -> str:
    """$GRU_MEMORY_STORE, else a SQLite file in the user's data folder."""
    return (
        url_of_environment()
        or f"sqlite:///{platformdirs.user_data_path('gru-memory', appauthor=False) / 'sessions.sqlite3'}"
    )


def url_of_environment() -> str | None:
    """$GRU_MEMORY_STORE; None where it is not set or empty."""
    return os.environ.get("GRU_MEMORY_STORE") or None


def connect(url: str | None = None) -> Engine:
    """An engine for `url`: sqlite:///FILE, postgresql://..., or the path of a SQLite file.

    Raises:
        ValueError: a URL of another kind.
        StoreError: the folder of the file cannot be made.
    """
    parsed = _parse(default_url() if url is None else url)
    if parsed.get_backend_name() == "sqlite":
        return _connect_sqlite(parsed)
    try:
        return create_engine(
            parsed, pool_pre_ping=True, pool_size=10, max_overflow=10, pool_timeout=SQLITE_WAIT_SECONDS,
            connect_args={"connect_timeout": 5},
        )  # fmt: skip
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"PostgreSQL needs {error.name}, which is not installed: pip install 'gru-memory[postgres]'"
        ) from error


def migrate(engine: Engine) -> None:
    """Bring the tables to this library's version; one process at a time.

    Raises:
        StoreError: a newer version of the library made them.
        StoreUnavailable: no database there.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with transaction(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        at = MigrationContext.configure(connection).get_current_revision()
        if at == ScriptDirectory.from_config(config).get_current_head():
            return
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise StoreError(
                f"{engine.url.render_as_string()} was made by a newer version of gru-memory: upgrade to use it"
            ) from error


@contextlib.contextmanager
def transaction(engine: Engine, read_only: bool = False) -> Iterator[Connection]:
    """All or nothing. What the database itself refuses comes out as `StoreUnavailable`.

    A connection that breaks while it commits leaves open whether the change was made; only what returned is certain.
    """
    where = engine.url.render_as_string()  # without the password
    try:
        with engine.connect().execution_options(gru_read_only=read_only) as connection, connection.begin():
            yield connection
    except (DatabaseError, InterfaceError, TimeoutError, sqlite3.Error) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise StoreUnavailable(f"the session store {where} cannot be used: {reason}") from error


def scrub(engine: Engine) -> None:
    """After something was deleted: leave nothing of it in SQLite's log, which holds pages as they were before.

    Where readers or a full disk are in the way, the log stays as it is, and the next call has another try.
    """
    if engine.dialect.name != "sqlite":
        return
    with contextlib.suppress(DatabaseError, TimeoutError, sqlite3.Error):
        connection = engine.raw_connection()
        try:
            cursor = connection.cursor()
            cursor.execute(f"PRAGMA busy_timeout={round(1e3 * _SCRUB_SECONDS)}")
            try:
                cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                cursor.execute(f"PRAGMA busy_timeout={round(1e3 * SQLITE_WAIT_SECONDS)}")
        finally:
            connection.close()


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite store; None for another kind. Raises ValueError if this is no store."""
    parsed = _parse(url)
    return Path(parsed.database).expanduser() if parsed.get_backend_name() == "sqlite" else None


def _parse(url: str) -> URL:
    if not url.strip():
        raise ValueError("the store is empty: give the path of a SQLite file or a URL, or leave it out")
    if url.strip() == ":memory:":
        raise ValueError(_NO_FILE)
    if "://" not in url:
        return URL.create("sqlite", database=str(Path(url).expanduser()))
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise ValueError(_wrong_url()) from error
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ValueError(_wrong_url())
    if not parsed.database or parsed.database == ":memory:":
        raise ValueError(_NO_FILE)
    return parsed


def _wrong_url() -> str:  # not the URL itself, there may be a password in it
    return (
        "this is no store: give the path of a SQLite file, sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"
    )


def _connect_sqlite(url: URL) -> Engine:
    path = Path(url.database).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():  # what people say to a model is for their own eyes
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise StoreUnavailable(f"the session store {path} cannot be made: {error}") from error
    engine = create_engine(url.set(database=str(path)), connect_args={"timeout": SQLITE_WAIT_SECONDS})

    @event.listens_for(engine, "connect")
    def set_up(connection, record) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        cursor = connection.cursor()
        for setting in ("foreign_keys=ON", "synchronous=FULL", "secure_delete=ON"):
            cursor.execute(f"PRAGMA {setting}")
        _keep_a_log(cursor)
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection) -> None:
        # A transaction that reads first and writes later could not wait for another writer; so writers say so at once.
        read_only = connection.get_execution_options().get("gru_read_only")
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _keep_a_log(cursor: sqlite3.Cursor) -> None:
    """Write-ahead logging, which the file remembers. Switching it on takes a lock that SQLite itself does not wait for."""
    deadline = time.monotonic() + SQLITE_WAIT_SECONDS
    while (mode := cursor.execute("PRAGMA journal_mode").fetchone()) != ("wal",):
        late = time.monotonic() > deadline
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if late:
                raise
        else:
            if late:  # SQLite says nothing where it cannot
                raise sqlite3.OperationalError(f"it keeps no write-ahead log, its journal mode stays {mode[0]!r}")
        time.sleep(0.01)

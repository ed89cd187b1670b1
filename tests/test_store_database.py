"""Many writers at once, and the databases below: migrations, files, locks and restarts."""

import contextlib
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

from stored import (
    TURNS,
    clock_of_the_store,  # noqa: F401 (a fixture)
    states_of_a_conversation,  # noqa: F401 (a fixture)
    store_on_either_database,  # noqa: F401 (a fixture)
    talk,
    url_of_a_new_store,  # noqa: F401 (a fixture)
)

from gru_memory.store import (
    LimitExceeded,
    Limits,
    SessionConflict,
    SessionStore,
    StoreError,
    StoreUnavailable,
    database,
    default_url,
)
from gru_memory.store.database import connect, transaction

# Many at once


def test_of_two_writers_one_wins_and_the_other_is_told(store, states):
    session, ids = talk(store, states, turns=1)
    first, second = store.get("boat"), store.get("boat")
    won = store.commit(first, [TURNS[1]], states[2], ids[0])
    with pytest.raises(SessionConflict, match="'boat' in the meantime"):
        store.commit(second, [("Other.", None)], states[3], ids[0])
    assert store.get("boat") == won.session
    assert len(store.turns(session)) == 2


def test_branches_from_snapshots_do_not_conflict_and_the_head_follows_the_first(store, states):
    session, ids = talk(store, states, turns=1)
    first = store.commit(session, [TURNS[1]], states[2], ids[0], branch=True)
    second = store.commit(session, [("Other.", None)], states[3], ids[0], branch=True)
    after = store.get("boat")
    assert (after.head, after.turns) == (first.id, 2)
    assert second.session == after
    assert store.snapshot(second.id).state == states[3]


def test_many_threads_count_every_turn_once(url, states):
    with SessionStore(url) as store:
        store.create("busy")
        won = []

        def write(worker: int) -> None:
            done = 0
            while done < 5:
                session = store.get("busy")
                try:
                    store.commit(session, [(f"{worker}/{done}", None)], states[1], session.head)
                except SessionConflict:
                    continue
                done += 1
                won.append((worker, done))

        threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 20
        texts = [turn.user for turn in store.transcript(store.get("busy"))]
        assert sorted(texts) == sorted(f"{worker}/{done}" for worker in range(4) for done in range(5))


def test_sessions_made_at_once_are_no_more_than_allowed(url):
    with SessionStore(url, Limits(max_sessions=3)) as store:
        together, made = threading.Barrier(8), []

        def make(number: int) -> None:
            together.wait()
            with contextlib.suppress(LimitExceeded):
                made.append(store.create(f"session {number}"))

        threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == len(store.list()) == 3


def test_all_who_open_a_new_store_at_once_get_it(url):
    """Migrations run once: each thread has connections of its own, as another process would."""
    failed = []

    def open_and_create(name: str) -> None:
        try:
            with SessionStore(url) as store:
                store.create(name)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=open_and_create, args=(f"worker {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with SessionStore(url) as store:
        assert len(store.list()) == 4


def test_a_new_file_that_another_process_writes_to_is_waited_for(tmp_path):
    """As by one that makes the tables before the file has a log: SQLite refuses to begin one then, and does not wait."""
    path = tmp_path / "sessions.sqlite3"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE something (x)")
    other.execute("BEGIN IMMEDIATE")
    ended = threading.Timer(0.3, other.execute, ("COMMIT",))
    ended.start()
    with SessionStore(str(path)) as store:
        assert store.create("talk")
    ended.join()
    other.close()
    with contextlib.closing(sqlite3.connect(path)) as again:
        assert again.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# Migrations


def test_migrations_make_the_tables_that_the_code_expects(store):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    from gru_memory.store.schema import metadata

    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_store_of_the_first_version_goes_on(url, states):
    """What was kept before there was anything to know about snapshots."""
    from alembic import command
    from alembic.config import Config

    with SessionStore(url) as store:
        _, ids = talk(store, states)
        config = Config()
        config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
        with transaction(store.engine) as connection:
            config.attributes["connection"] = connection
            command.downgrade(config, "0001")
    with SessionStore(url) as store:
        assert store.head(store.get("boat")).state == states[3]
        assert store.find_turn(ids[0]).about is None
        store.commit(store.get("boat"), [TURNS[0]], states[1], ids[-1], about={"n": 1})
        assert store.find_turn(store.get("boat").head).about == {"n": 1}


def test_a_store_of_a_newer_version_is_left_alone(url, store):
    with transaction(store.engine) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match="newer version"):
        SessionStore(url)


def test_sessions_are_counted_and_listed_by_indexes(tmp_path):
    """An owner may have a hundred thousand, and each new one counts them."""
    from sqlalchemy import event

    with SessionStore(str(tmp_path / "s"), Limits(max_sessions=3, ttl_seconds=100)) as store:
        asked = []
        event.listen(store.engine, "before_cursor_execute", lambda *call: asked.append(call[2:4]))
        store.get_or_begin("boat")
        store.list(limit=10)
        with store.engine.connect() as connection:
            plans = [
                " ".join(row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", values))
                for query, values in list(asked)
                if query.startswith("SELECT")
            ]
    assert any("COVERING INDEX ix_sessions_owner_expires_at" in plan for plan in plans), plans
    assert any("ix_sessions_owner_updated_at" in plan for plan in plans), plans


# Databases


def test_where_a_store_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("GRU_MEMORY_STORE", raising=False)
    assert default_url().endswith("gru-memory/sessions.sqlite3")
    monkeypatch.setenv("GRU_MEMORY_STORE", f"sqlite:///{tmp_path}/own")
    assert default_url() == f"sqlite:///{tmp_path}/own"
    SessionStore().close()
    assert (tmp_path / "own").exists()
    for wrong in ("mysql://host/db", "no such://thing", "sqlite://", "postgres:///x", "sqlite:///:memory:", ":memory:"):
        with pytest.raises(ValueError, match="this is no store|is a file") as refused:
            connect(wrong)
        assert "host" not in str(refused.value)


def test_the_file_is_for_its_owner_alone_and_durable(tmp_path):
    path = tmp_path / "folder" / "sessions.sqlite3"
    with SessionStore(str(path)) as store, store.engine.connect() as connection:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # every commit reaches the disk
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_a_locked_or_broken_file_is_one_clear_error(tmp_path, states, monkeypatch):
    monkeypatch.setattr("gru_memory.store.database.SQLITE_WAIT_SECONDS", 0.1)
    path = tmp_path / "sessions.sqlite3"
    with SessionStore(str(path)) as store:
        session, ids = talk(store, states, turns=1)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="database is locked"):
            store.commit(session, [TURNS[1]], states[2], ids[0])
        assert store.get("boat") == session  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        store.commit(session, [TURNS[1]], states[2], ids[0])
    (tmp_path / "junk").write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        SessionStore(str(tmp_path / "junk"))
    with pytest.raises(StoreUnavailable, match="cannot be made"):
        SessionStore(str(path / "below a file" / "sessions"))


def test_what_keeps_no_log_is_given_up_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("gru_memory.store.database.SQLITE_WAIT_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreUnavailable, match="no write-ahead log, its journal mode stays 'memory'"):
        SessionStore("sqlite:///file::memory:?uri=true")


def test_a_postgres_that_restarts_is_found_again(postgres, states):
    with SessionStore(postgres.empty()) as store:
        session, ids = talk(store, states, turns=1)
        postgres.stop()
        with pytest.raises(StoreUnavailable, match="cannot be used"):
            store.get("boat")
        postgres.start()
        assert store.get("boat") == session
        store.commit(session, [TURNS[1]], states[2], ids[0])

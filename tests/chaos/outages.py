"""The store goes away while the server writes to it: a full disk, a lock, a PostgreSQL that is restarted."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2

from gru_memory.store import SessionStore

from .result import Result
from .small_disk import SeenFromOutside
from .talkers import Talk, Talkers, check
from .victim import victim

CONVERSATIONS = 8
_CLEAR = {(503, "store_unavailable"), (429, "overloaded"), (503, "timed_out"), (409, "conversation_locked")}


def disk(times: int, size: int = 32 << 20) -> Result:
    """Fill the disk under a SQLite store of a running server, make room again, `times` times."""
    with tempfile.TemporaryDirectory(prefix="gru-chaos-") as folder:
        path, left = Path(folder) / "disk" / "sessions.sqlite3", Path(folder) / "left"
        path.parent.mkdir()
        with victim(path, disk_bytes=size) as (process, url):
            there = SeenFromOutside(process.pid, str(path.parent))

            @contextlib.contextmanager
            def full() -> Iterator[None]:
                filler = there.fill()
                try:
                    yield
                finally:
                    filler.unlink()

            try:
                result, talks = _outages(url, full, times)
                process.kill()  # what is on the disk now is all there is
                process.join()
                shutil.copytree(there.path, left)
            finally:
                there.close()
        with SessionStore(str(left / path.name)) as store:
            _check(store, talks, result)
    return result


def locked(times: int, wait_seconds: float | None = None) -> Result:
    """Lock a SQLite store of a running server for longer than the server waits, `times` times.

    Args:
        times: how often.
        wait_seconds: how long the server waits for a lock; None is as long as it does by default.
    """
    with tempfile.TemporaryDirectory(prefix="gru-chaos-") as folder:
        path = Path(folder) / "sessions.sqlite3"
        with victim(path, sqlite_wait_seconds=wait_seconds) as (_, url):

            @contextlib.contextmanager
            def lock() -> Iterator[None]:
                other = sqlite3.connect(path, isolation_level=None, timeout=60)
                other.execute("BEGIN IMMEDIATE")
                try:
                    # Who only reads is not held up.
                    answer = httpx2.get(f"{url}/v1/memory", timeout=60)
                    if answer.status_code != 200:
                        raise AssertionError(f"a reader got {answer.status_code} while a writer held the store")
                    yield
                finally:
                    other.execute("ROLLBACK")
                    other.close()

            result, talks = _outages(url, lock, times)
        with SessionStore(str(path)) as store:
            _check(store, talks, result)
    return result


def postgres(times: int, kills: int, turns_a_kill: int, down_seconds: float = 1.0) -> Result:
    """Restart the PostgreSQL of a running server, politely and as if it had crashed; then kill servers that use it.

    Args:
        times: restarts.
        kills: of servers.
        turns_a_kill: acknowledged by each of them before.
        down_seconds: how long PostgreSQL stays away.
    """
    from postgres import Postgres

    cluster = Postgres()
    try:
        url_of_store = cluster.empty()
        with victim(url_of_store) as (_, url):
            how = [signal.SIGINT, signal.SIGQUIT]

            @contextlib.contextmanager
            def away() -> Iterator[None]:
                how.reverse()
                cluster.stop(how[0])
                try:
                    yield
                    time.sleep(down_seconds)
                finally:
                    cluster.start()

            result, talks = _outages(url, away, times)
        for _ in range(kills):
            talkers = Talkers(talks)
            with victim(url_of_store) as (process, url):
                talkers.start(url)
                talkers.wait_for(turns_a_kill, seconds=300)
                process.kill()
                talkers.stop()
        with SessionStore(url_of_store) as store:
            _check(store, talks, result)
        result.figures |= {
            "of the restarts, immediate, as after a crash": f"{times // 2}",
            "servers killed": f"{kills}",
        }
    finally:
        cluster.remove()
    return result


def _outages(url: str, outage: Callable[[], Any], times: int) -> tuple[Result, list[Talk]]:
    """Talk; take the store away until the clients are told; give it back, and see that everybody goes on."""
    result, talks, recoveries = Result(), [Talk(f"talk {number}") for number in range(CONVERSATIONS)], []
    talkers = Talkers(talks)
    talkers.start(url)
    try:
        for _ in range(times):
            talkers.wait_for(CONVERSATIONS)
            with outage():
                refused, deadline = talkers.refused.total(), time.monotonic() + 120
                while talkers.refused.total() < refused + CONVERSATIONS:
                    if time.monotonic() > deadline:
                        result.broken.append("the store was away, and nobody was told")
                        break
                    time.sleep(0.02)
            began = time.monotonic()
            talkers.wait_for(1)
            recoveries.append(time.monotonic() - began)
            talkers.wait_for(CONVERSATIONS)
    finally:
        talkers.stop()
    unclear = {answer: count for answer, count in talkers.refused.items() if answer not in _CLEAR}
    result.expect(not unclear, f"answers that explain nothing: {unclear}")
    result.expect(talkers.refused[503, "store_unavailable"], "nobody was told that the store cannot be reached")
    result.expect(not talkers.lost, f"{talkers.lost} connections broke")
    answers = ", ".join(f"{status} {code}: {count}" for (status, code), count in sorted(talkers.refused.items()))
    result.figures = {
        "times": f"{times}",
        "acknowledged turns, all there": f"{talkers.acknowledged:,}",
        "answers while the store was away": answers,
        "first turn kept after it came back": f"{max(recoveries):.1f} s at the latest",
    }
    return result, talks


def _check(store: SessionStore, talks: list[Talk], result: Result) -> None:
    extra, gone = check(store, talks, result, {})
    result.figures |= {
        "acknowledged turns, all there": f"{sum(len(talk.acknowledged) for talk in talks):,}",
        "further turns kept whose answer was lost on the way": f"{extra:,}",
        f"snapshots let go, each with {store.limits.max_states} newer ones": f"{gone:,}",
    }
    if store.engine.dialect.name == "sqlite":
        with store.engine.connect() as connection:
            said = connection.exec_driver_sql("PRAGMA integrity_check").scalar()
        result.expect(said == "ok", f"SQLite finds its file damaged: {said}")

"""A PostgreSQL of the tests' own: a cluster in a temporary folder, on a free port of the loopback, as a plain user."""

import glob
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

USER_IF_ROOT = "postgres"  # PostgreSQL refuses to run as root; Debian's package makes this user


def require(condition: object, reason: str) -> None:
    """Skip, with its reason; in CI, where everything can be installed, fail."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (skipped elsewhere, but CI must run these tests)")
    pytest.skip(reason)


class Postgres:
    """One cluster, with one database."""

    def __init__(self) -> None:
        folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda path: int(path.split("/")[-2]))
        found = shutil.which("initdb")
        require(folders or found, "PostgreSQL is not installed: apt install postgresql")
        require(has_package("psycopg"), "psycopg is not installed: pip install 'gru-memory[postgres]'")
        self.programs = Path(folders[-1] if folders else Path(found).parent)
        self.folder = Path(tempfile.mkdtemp(prefix="gru-postgres-"))
        self.user = USER_IF_ROOT if os.geteuid() == 0 else None
        if self.user:
            shutil.chown(self.folder, self.user)
        self.data, self.port = self.folder / "data", free_port()
        self.process: subprocess.Popen | None = None
        self._run("initdb", "-D", self.data, "-U", "tests", "--auth=trust", "--no-sync", "-E", "UTF8", "--no-locale")
        self.start()

    def start(self) -> None:
        # fsync guards against a machine that loses power, which no test does
        settings = [
            f"port={self.port}",
            "fsync=off",
            "listen_addresses=127.0.0.1",
            f"unix_socket_directories={self.folder}",
        ]
        command = [self.programs / "postgres", "-D", self.data]
        for setting in settings:
            command += ["-c", setting]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **self._as_user())
        for _ in range(100):
            if self._run("pg_isready", "-h", "127.0.0.1", "-p", self.port, check=False) == 0:
                return
            time.sleep(0.1)
        raise RuntimeError((self.folder / "log").read_text())

    def stop(self, how: int = signal.SIGINT) -> None:
        """SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one: as if the machine had crashed."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=30)
            self.process = None

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)

    def empty(self) -> str:
        """The URL of a database, emptied: that is a hundred files less than a new one."""
        import psycopg

        url = f"postgresql://tests@127.0.0.1:{self.port}/postgres"
        with psycopg.connect(url) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return url

    def _run(self, program: str, *arguments: object, check: bool = True) -> int:
        command = [str(self.programs / program), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, **self._as_user())
        if check and result.returncode:
            raise RuntimeError(f"{program}: {result.stderr}")
        return result.returncode

    def _as_user(self) -> dict:
        return {"cwd": self.folder} | ({"user": self.user, "group": self.user} if self.user else {})


def has_package(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def free_port() -> int:
    """One of the loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

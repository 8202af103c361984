"""A real PostgreSQL in a container: image, start, statements, invariants."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.daemon import LAZ, Daemon

from lazarette.runtime.images import postgres

IMAGE = "postgres:latest"
_DATA = "/var/lib/postgresql/data"
_PATIENCE_S = 60.0
SUMS = (
    "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(tbalance) FROM"
    " pgbench_tellers) AND (SELECT sum(bbalance) FROM pgbench_branches) ="
    " (SELECT coalesce(sum(delta), 0) FROM pgbench_history)"
)
"""Whether the balances that pgbench keeps in four tables agree: true after whole transactions."""
_ENTRY_POINT = "postgres-entrypoint.sh"


def archive() -> Path:
    """The image as a docker archive, made once on this machine."""
    made_by = hashlib.sha256()
    for source in (postgres.__file__, Path(postgres.__file__).parent / "files" / _ENTRY_POINT):
        made_by.update(Path(source).read_bytes())
    name = f"postgres-{made_by.hexdigest()[:12]}.tar"
    path = Path(tempfile.gettempdir()) / "lazarette-tests" / name
    path.parent.mkdir(exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            beside = path.with_suffix(".new")
            subprocess.run(
                [sys.executable, "-m", "lazarette.runtime.images.postgres", str(beside)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            beside.rename(path)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Postgres:
    """A database container of a daemon, reached through a published port."""

    daemon: Daemon
    volume: str
    name: str
    port: int

    @classmethod
    def run(
        cls, daemon: Daemon, volume: str = "pgdata", name: str = "db", initdb: str = ""
    ) -> Postgres:
        """Load the image, start the container, wait until it answers."""
        daemon.laz("load", "-q", "-i", str(archive()))
        return cls.start(daemon, volume, name, initdb)

    @classmethod
    def start(cls, daemon: Daemon, volume: str, name: str, initdb: str = "") -> Postgres:
        """Start a container of the loaded image, wait until it answers."""
        port = free_port()
        daemon.laz(
            "run",
            "-d",
            "--name",
            name,
            "-e",
            "POSTGRES_PASSWORD=secret",
            "-e",
            f"POSTGRES_INITDB_ARGS={initdb}",
            "-v",
            f"{volume}:{_DATA}",
            "-p",
            f"127.0.0.1:{port}:5432",
            IMAGE,
        )
        made = cls(daemon, volume, name, port)
        made.wait()
        return made

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": "postgres",
            "PGPASSWORD": "secret",
            "PGDATABASE": "postgres",
        }

    def wait(self) -> None:
        end = time.monotonic() + _PATIENCE_S
        while True:
            done = self._psql("SELECT 1")
            if done.returncode == 0:
                return
            if time.monotonic() > end:
                log = self.daemon.laz("logs", self.name, check=False)
                raise AssertionError(f"no answer: {done.stderr.decode()}\n{log.stdout.decode()}")
            time.sleep(0.05)

    def sql(self, statement: str) -> str:
        done = self._psql(statement)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def pgbench(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``pgbench`` inside the container: clients' packages do not have it."""
        return subprocess.Popen(
            [
                str(LAZ),
                "-H",
                self.daemon.host,
                "exec",
                "-u",
                "postgres",
                self.name,
                "pgbench",
                *arguments,
                "postgres",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def check(self) -> None:
        """Everything the database can say about its own health."""
        self.daemon.laz(
            "exec",
            "-u",
            "postgres",
            self.name,
            "pg_amcheck",
            "--install-missing",
            "--heapallindexed",
            "-d",
            "postgres",
        )

    def _psql(self, statement: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["psql", "-qAtc", statement], env=self.environment, capture_output=True, check=False
        )


class Writer(threading.Thread):
    """Commits numbers to a table ``acknowledged``, and notes when each was acknowledged.

    Args:
        database: where the table is made.

    Attributes:
        acknowledged: each number with its instant, nanoseconds.
    """

    def __init__(self, database: Postgres) -> None:
        super().__init__()
        database.sql("CREATE TABLE acknowledged (id bigint PRIMARY KEY)")
        self.acknowledged: list[tuple[int, int]] = []
        self._database = database
        self._enough = threading.Event()

    def run(self) -> None:
        number = 0
        while not self._enough.wait(0.05):
            number += 1
            self._database.sql(f"INSERT INTO acknowledged VALUES ({number})")
            self.acknowledged.append((number, time.time_ns()))

    def finish(self) -> None:
        """Write no more."""
        self._enough.set()
        self.join()

    def last_before(self, instant_ns: int) -> int:
        """The last number acknowledged before an instant; 0 for none."""
        return max((number for number, at in self.acknowledged if at < instant_ns), default=0)


def lacks(copy: Postgres, number: int) -> int:
    """How many of the numbers up to one a copy of a :class:`Writer`'s database does not have."""
    there = copy.sql(f"SELECT count(*) FROM acknowledged WHERE id <= {number}")
    return number - int(there)

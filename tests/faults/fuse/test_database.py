"""A real database on a union whose server is killed again and again: it must not notice.

``LAZ_KILLS`` sets how often.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.unions import Union, kill, prepare, serving
from tests.support.waiting import until

KILLS = int(os.environ.get("LAZ_KILLS", "4"))
_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"))

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
    pytest.mark.skipif(not _BINARIES, reason="PostgreSQL is not installed"),
]


class Database:
    """A PostgreSQL in a folder of the union."""

    def __init__(self, union: Union) -> None:
        self.folder = union.root / "data"
        self.folder.mkdir()
        shutil.chown(self.folder, "postgres", "postgres")
        self.sockets = Path(tempfile.mkdtemp(prefix="laz-pg-"))
        shutil.chown(self.sockets, "postgres", "postgres")
        self.log = self.sockets / "log"

    def command(self, *arguments: str) -> list[str]:
        program = str(_BINARIES[-1].parent / arguments[0])
        return ["runuser", "-u", "postgres", "--", program, *arguments[1:]]

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=False, cwd="/"
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.messages()
        return done.stdout.strip()

    def start(self) -> None:
        self.run("initdb", "-D", str(self.folder), "-N", "-E", "UTF8", "--locale=C")
        options = f"-k {self.sockets} -c listen_addresses='' -c max_wal_size=64MB"
        self.run(
            *("pg_ctl", "-D", str(self.folder), "-l", str(self.log), "-o", options),
            *("-w", "-t", "120", "start"),
        )

    def sql(self, statement: str) -> str:
        return self.run("psql", "-h", str(self.sockets), "-Atc", statement, "postgres")

    def messages(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self.folder), "-m", "fast", "-w", "-t", "120", "stop")


@pytest.fixture(params=["through", "plain"])
def union(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Union]:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)  # so that the database gets there
    union = prepare(tmp_path, passthrough=request.param == "through")
    for folder in (union.root, union.upper):
        folder.chmod(0o755)
    with serving(union):
        yield union


@pytest.mark.timeout(max(300, 30 * KILLS))
def test_database_does_not_notice_that_servers_are_killed(union: Union) -> None:
    if not union.mounted.status().standby:
        pytest.skip("this kernel does not send requests again")
    database = Database(union)
    database.start()
    at = ("-h", str(database.sockets), "postgres")
    database.run("pgbench", "-i", "-q", "-s", "1", *at)
    command = database.command("pgbench", "-n", "-c", "4", "-T", "3600", *at)
    count = "SELECT count(*) FROM pgbench_history"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as bench:
        try:
            for _ in range(KILLS):
                before = int(database.sql(count))
                kill(union.mounted.status().pid)
                until(
                    lambda before=before: int(database.sql(count)) > before + 20,  # type: ignore[misc]
                    "no transaction any more",
                )
                assert bench.poll() is None, bench.communicate()
        finally:
            bench.terminate()
    assert union.mounted.status().lost == 0
    sums = [
        database.sql(f"SELECT sum({column}) FROM pgbench_{table}")
        for table, column in (
            ("accounts", "abalance"),
            ("tellers", "tbalance"),
            ("branches", "bbalance"),
            ("history", "delta"),
        )
    ]
    assert len(set(sums)) == 1, sums
    assert database.sql("SELECT count(*) FROM pgbench_accounts") == "100000"
    database.stop()
    # That pgbench was ended is all there is to complain about.
    trouble = re.compile(r"PANIC|could not (?!receive data from client|send data to client)")
    assert not [line for line in database.messages().splitlines() if trouble.search(line)]
    shutil.rmtree(database.sockets)

"""A busy PostgreSQL, saved by its schedule again and again, and every backup brought back.

Case A10.  ``LAZ_LIVE_BACKUPS`` says how many backups; twenty for the whole case.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.postgres import SUMS, Postgres, Writer, lacks
from tests.support.waiting import until

BACKUPS = int(os.environ.get("LAZ_LIVE_BACKUPS", "2"))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made = Daemon(tmp_path / "host")
    made.start()
    try:
        made.laz("repo", "init", "--kit-file", str(tmp_path / "kit"), str(tmp_path / "repo"))
        yield made
    finally:
        made.end()


@pytest.mark.slow
@pytest.mark.timeout(max(300, 90 * BACKUPS))
def test_every_backup_of_a_busy_database_comes_back(daemon: Daemon) -> None:
    database = Postgres.run(daemon, initdb="--data-checksums")
    assert database.sql("SHOW data_checksums") == "on"
    daemon.laz("exec", "-u", "postgres", "db", "pgbench", "-i", "-q", "postgres")
    load = database.pgbench("-n", "-c", "4", "-T", "3000")
    writer = Writer(database)
    writer.start()
    try:
        daemon.laz("policy", "set", "pgdata", "--every", "10s", "--keep", "last=100")
        until(lambda: len(good(daemon)) >= BACKUPS, seconds=60.0 + 60 * BACKUPS, pause=0.5)
        daemon.laz("policy", "rm", "pgdata")
        assert load.poll() is None  # it was never stopped
    finally:
        writer.finish()
        load.kill()
        load.wait()
    runs = good(daemon)
    daemon.laz("stop", "db")
    for number, run in enumerate(runs[:BACKUPS]):
        assert run["consistency"] == "crash"
        pause = cast(int, run["pause_ns"])
        print(f"backup {number}: writers paused for {pause / 1e6:.1f} ms")
        volume, name = f"back{number}", f"db{number}"
        daemon.laz("restore", f"pgdata@{run['snapshot']}", "--as", volume)
        again = Postgres.start(daemon, volume, name)
        # what was acknowledged before the run began was there at the instant of its snapshot
        assert lacks(again, writer.last_before(cast(int, run["started_ns"]))) == 0
        assert again.sql(SUMS) == "t"
        again.check()
        assert again.sql("SELECT sum(checksum_failures) FROM pg_stat_database") == "0"
        daemon.laz("rm", "-f", name)
        daemon.laz("volume", "rm", volume)


def good(daemon: Daemon) -> list[dict[str, object]]:
    """Backups that ended well, the oldest first."""
    runs = cast(list[dict[str, object]], daemon.json("backup", "history", "pgdata"))
    done = [run for run in runs if run["outcome"] == "ok" and run["kind"] == "backup"]
    return sorted(done, key=lambda run: cast(int, run["started_ns"]))


def test_a_copy_of_files_alone_is_called_what_it_is(daemon: Daemon, tmp_path: Path) -> None:
    """A driver that cannot snapshot, nobody held: consistency none, whatever was asked for."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a").write_text("1")
    bound = ("-o", "type=none", "-o", "o=bind", "-o", f"device={folder}")
    daemon.laz("volume", "create", "-d", "bind", *bound, "plain")
    (run,) = cast(list[dict[str, object]], daemon.json("backup", "run", "plain"))
    assert run["consistency"] == "none"

"""Recovery of a real PostgreSQL to any moment, by its log in the repository on a real S3 server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.postgres import Postgres, archive
from tests.support.s3 import S3Server
from tests.support.waiting import until

from lazarette.backup.recovery.wal import NotRecoverable
from lazarette.storage.errors import EXIT_WARNINGS

_NOW = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')"


def _log(daemon: Daemon) -> dict:
    return next(iter(json.loads(daemon.laz("wal", "ls", "--json", check=False).stdout)), {})


def _kept(daemon: Daemon, url: str, kit: Path, server: S3Server) -> Postgres:
    """A database whose log is kept, and whose archiving has begun."""
    daemon.laz("repo", "init", "--kit-file", str(kit), url, env=server.environment)
    database = Postgres.run(daemon)
    daemon.laz("policy", "set", "pgdata", "--every", "24h", "--wal")
    until(lambda: _log(daemon).get("state") == "restart", f"not set: {_log(daemon)}")
    daemon.laz("restart", database.name)
    database.wait()
    until(lambda: _log(daemon).get("state") == "on", f"not kept: {_log(daemon)}")
    return database


def _insert(database: Postgres, number: int) -> str:
    """Commit a row; the moment after that."""
    database.sql(f"INSERT INTO rows VALUES ({number})")
    said = database.sql(_NOW)
    time.sleep(0.01)  # the next transaction ends later by the clock
    return said


def _rows(daemon: Daemon, volume: str) -> list[int]:
    """What a restored volume's database holds; it is whole, and it can be written to."""
    copy = Postgres.start(daemon, volume, f"on-{volume}")
    try:
        until(lambda: copy.sql("SELECT pg_is_in_recovery()") == "f", "it stays in recovery")
        copy.check()
        found = [int(row) for row in copy.sql("SELECT id FROM rows ORDER BY id").split()]
        copy.sql("INSERT INTO rows VALUES (1000000)")
        return found
    finally:
        daemon.laz("rm", "-f", copy.name)


def _restore(daemon: Daemon, moment: str, *more: str) -> dict:
    done = daemon.laz("restore", "--json", "--to-time", moment, *more, "pgdata")
    return cast(dict, json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_moment_between_two_backups(
    daemon: Daemon, tmp_path: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    url, kit = s3_server.url(s3_bucket, "host"), tmp_path / "kit"
    database = _kept(daemon, url, kit, s3_server)
    database.sql("CREATE TABLE rows (id bigint PRIMARY KEY)")
    early = _insert(database, 1)
    daemon.laz("backup", "run", "pgdata")
    moments = {number: _insert(database, number) for number in range(2, 6)}
    database.sql("SELECT pg_switch_wal()")
    until(lambda: _log(daemon)["segment"], "nothing is stored")
    moments[6] = _insert(database, 6)
    after = _insert(database, 7)

    for number in (3, 6):  # between two commits of one segment, and of the next
        done = _restore(daemon, moments[number], "--as", f"then-{number}")
        assert done["result"]["outcome"] == "ok", done
        assert _rows(daemon, f"then-{number}") == list(range(1, number + 1))
    to_the_end = _restore(daemon, after, "--as", "end")
    assert to_the_end["result"]["outcome"] == "ok", to_the_end
    assert _rows(daemon, "end") == list(range(1, 8))

    too_early = daemon.laz("restore", "--to-time", early, "--as", "no", "pgdata", check=False)
    assert too_early.returncode == NotRecoverable.exit_code
    assert b"no backup" in too_early.stderr

    # over the volume itself: another history begins, and both can be told apart
    done = _restore(daemon, moments[4], "--yes")
    assert done["safety"]
    database.wait()
    until(lambda: database.sql("SELECT pg_is_in_recovery()") == "f", "it stays in recovery")
    assert database.sql("SELECT count(*) FROM rows") == "4"
    set_back = _insert(database, 40)
    until(lambda: _log(daemon)["state"] == "on", "it is not kept any more")
    daemon.laz("wal", "flush", "pgdata")
    across = daemon.laz("restore", "--to-time", set_back, "--as", "no", "pgdata", check=False)
    assert across.returncode == NotRecoverable.exit_code
    assert b"begins anew" in across.stderr
    assert _restore(daemon, after, "--as", "other")["result"]["outcome"] == "ok"
    assert _rows(daemon, "other") == list(range(1, 8))
    daemon.laz("backup", "run", "pgdata")
    again = _insert(database, 41)
    _insert(database, 42)
    assert _restore(daemon, again, "--as", "again")["result"]["outcome"] == "ok"
    assert _rows(daemon, "again") == [1, 2, 3, 4, 40, 41]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_host_recovers_what_was_stored_to_any_moment(
    tmp_path: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    url, kit = s3_server.url(s3_bucket, "host"), tmp_path / "kit"
    first, second = Daemon(tmp_path / "one"), Daemon(tmp_path / "two")
    try:
        first.start()
        database = _kept(first, url, kit, s3_server)
        database.sql("CREATE TABLE rows (id bigint PRIMARY KEY)")
        first.laz("backup", "run", "pgdata")
        moments = {number: _insert(database, number) for number in range(1, 6)}
        first.laz("wal", "flush", "pgdata")
        first.kill()
        beyond = _insert(database, 6)  # nobody is there any more to store it

        second.start()
        second.laz("load", "-q", "-i", str(archive()))
        second.laz("repo", "add", "--kit", str(kit), url, env=s3_server.environment)
        assert _restore(second, moments[3], "--as", "then")["result"]["outcome"] == "ok"
        assert _rows(second, "then") == [1, 2, 3]
        short = second.laz("restore", "--to-time", beyond, "--as", "end", "pgdata", check=False)
        assert short.returncode == EXIT_WARNINGS, short.stderr
        assert _rows(second, "end") == [1, 2, 3, 4, 5]
    finally:
        first.end()
        second.end()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost_while_the_store_is_away_and_the_daemon_dies(
    daemon: Daemon, tmp_path: Path
) -> None:
    store = tmp_path / "repo"
    daemon.laz("repo", "init", "--kit-file", str(tmp_path / "kit"), str(store))
    database = Postgres.run(daemon)
    daemon.laz("policy", "set", "pgdata", "--every", "24h", "--wal")
    until(lambda: _log(daemon).get("state") == "restart", "not set")
    daemon.laz("restart", database.name)
    database.wait()
    until(lambda: _log(daemon).get("state") == "on", "not kept")
    database.sql("CREATE TABLE rows (id bigint PRIMARY KEY)")
    daemon.laz("backup", "run", "pgdata")
    moments = []
    store.rename(tmp_path / "away")
    for number in range(1, 4):
        moments.append(_insert(database, number))
        database.sql("SELECT pg_switch_wal()")
    until(lambda: _log(daemon)["state"] == "failed", "it goes on without a store")
    daemon.kill()
    (tmp_path / "away").rename(store)
    daemon.start()
    moments.append(_insert(database, 4))
    _insert(database, 5)
    assert _restore(daemon, moments[3], "--as", "then")["result"]["outcome"] == "ok"
    assert _rows(daemon, "then") == [1, 2, 3, 4]


@pytest.mark.timeout(300)
def test_what_a_restored_database_hands_over_unwanted_does_not_pile_up(daemon: Daemon) -> None:
    daemon.laz("load", "-q", "-i", str(busybox_archive()))
    ready = "/v/lazarette.wal/ready"
    make = f"mkdir -p /v/global {ready}; echo 15 > /v/PG_VERSION"
    daemon.laz("run", "--rm", "-v", "copy:/v", "busybox", "sh", "-c", make)
    daemon.laz("run", "-d", "--init", "--name", "user", "-v", "copy:/v", "busybox", "sleep", "600")
    there = ("exec", "user", "test", "-e")
    for segment in ("1", "2"):  # whenever it comes
        name = f"{ready}/{segment.zfill(24)}"
        daemon.laz("exec", "user", "touch", name, f"{ready}/other")
        while daemon.laz(*there, name, check=False).returncode == 0:
            time.sleep(0.5)
    daemon.laz(*there, f"{ready}/other")

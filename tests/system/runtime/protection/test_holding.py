"""Backups that hold their volume's users still, with real containers and a real database."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.postgres import Postgres
from tests.support.waiting import until

SLOW_STOP = (
    "trap 'sleep 2; echo flushed > /data/flushed; exit 0' TERM; touch /data/up; "
    "while :; do sleep 0.1; done"
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "host")
    made.start()
    try:
        made.laz("load", "-q", "-i", str(busybox_archive()))
        made.laz("repo", "init", "--kit-file", str(tmp_path / "kit"), str(tmp_path / "repo"))
        yield made
    finally:
        made.end()


def start(daemon: Daemon, script: str, *labels: str) -> None:
    options = [word for label in labels for word in ("--label", label)]
    daemon.laz(
        "run", "-d", "--name", "app", "--stop-timeout", "20", "-v", "data:/data",
        "--label", "lazarette.backup=@yearly", *options, "busybox", "sh", "-c", script,
    )  # fmt: skip
    until(lambda: inside(daemon, "ls", "/data") != "")


def inside(daemon: Daemon, *argv: str) -> str:
    return daemon.laz("exec", "app", *argv, check=False).stdout.decode().strip()


def state(daemon: Daemon) -> dict[str, object]:
    found = json.loads(daemon.laz("inspect", "app").stdout)
    return cast(dict[str, object], found[0]["State"])


def backup(daemon: Daemon, volume: str = "data") -> dict[str, object]:
    return cast(list[dict[str, object]], daemon.json("backup", "run", volume))[0]


@pytest.mark.slow
def test_stopping_waits_for_the_application_and_starts_it_again(daemon: Daemon) -> None:
    """A33: the container's own timeout counts, and it is never killed."""
    start(daemon, SLOW_STOP, "lazarette.mode=stop")
    done = backup(daemon)
    assert (done["outcome"], done["consistency"]) == ("ok", "application")
    assert cast(int, done["pause_ns"]) > 2e9
    assert state(daemon)["Running"]
    assert inside(daemon, "cat", "/data/flushed") == "flushed"


@pytest.mark.slow
def test_hooks_run_around_the_snapshot(daemon: Daemon, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    start(
        daemon,
        "touch /data/up; sleep 1000",
        "lazarette.consistency=hooks",
        f"lazarette.pre=app: touch /data/before; host: touch {mark}",
        "lazarette.post=app: touch /data/after",
    )
    assert backup(daemon)["consistency"] == "application"
    assert mark.exists()
    assert inside(daemon, "ls", "/data").split() == ["after", "before", "up"]
    mark.unlink()
    daemon.laz("exec", "app", "rm", "/data/after")
    daemon.laz("rm", "-f", "app")
    start(daemon, "sleep 1000", "lazarette.pre=app: false", "lazarette.post=app: touch /data/after")
    failed = daemon.laz("backup", "run", "data", check=False)
    assert failed.returncode != 0
    assert b"before the backup failed" in failed.stderr
    assert "after" in inside(daemon, "ls", "/data").split()


@pytest.mark.slow
def test_a_killed_daemon_leaves_nothing_stopped(daemon: Daemon) -> None:
    """A11: killed while the application is being stopped; it runs again within 30 s."""
    start(daemon, SLOW_STOP, "lazarette.mode=stop")
    asking = threading.Thread(
        target=lambda: daemon.laz("backup", "run", "data", check=False), daemon=True
    )
    asking.start()
    time.sleep(1.5)
    daemon.kill()
    asking.join(30)
    time.sleep(2.0)
    daemon.start()
    assert until(lambda: state(daemon)["Running"]) < 30
    time.sleep(1)
    assert state(daemon)["Running"]


@pytest.mark.slow
def test_postgres_is_brought_into_backup_mode(daemon: Daemon) -> None:
    database = Postgres.run(daemon)
    database.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS id")
    daemon.laz("policy", "set", "pgdata", "--every", "1h", "--consistency", "postgres")
    done = backup(daemon, "pgdata")
    assert (done["outcome"], done["consistency"]) == ("ok", "application")
    assert database.sql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%backup%'") == "1"

"""Backups that hold their volume's users still, with real containers and a real database."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.postgres import Postgres
from tests.support.waiting import until

from lazarette.runtime.protection.guardian import anything_held

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


def held(daemon: Daemon) -> bool:
    return anything_held(str(daemon.root / "data" / "state.db"))


def guardians(daemon: Daemon) -> list[int]:
    """Guardians of this daemon."""
    mark, found = str(daemon.root / "data" / "state.db").encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if mark in words and any(b"guardian.py" in word for word in words):
                    found.append(int(entry.name))
    return found


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
    until(lambda: held(daemon))
    daemon.kill()
    asking.join(30)
    daemon.start()
    until(lambda: not held(daemon))
    assert state(daemon)["Running"]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "ended"), [("stop", True), ("stop", False), ("hooks", False)])
def test_the_guardian_releases_while_no_daemon_runs(
    daemon: Daemon, tmp_path: Path, mode: str, ended: bool
) -> None:
    """A11: the daemon is gone and stays so; everything goes on, hooks run once."""
    after = tmp_path / "after"
    labels = {
        "stop": ["lazarette.mode=stop"],
        "hooks": ["lazarette.consistency=hooks", "lazarette.pre=host: sleep 3"],
    }
    post = f"lazarette.post=host: sh -c 'echo ran >> {after}'"
    start(daemon, SLOW_STOP, *labels[mode], post)
    pid = cast(int, state(daemon)["Pid"])
    asking = threading.Thread(
        target=lambda: daemon.laz("backup", "run", "data", check=False), daemon=True
    )
    asking.start()
    until(lambda: held(daemon))
    if ended:
        until(lambda: not Path(f"/proc/{pid}").exists())
    daemon.kill()  # else while it flushes: it ends only after its daemon
    until(lambda: not held(daemon))
    assert after.read_text() == "ran\n"
    daemon.start()
    asking.join(30)
    assert state(daemon)["Running"]
    assert after.read_text() == "ran\n"
    runs = cast(list[dict[str, object]], daemon.json("backup", "history", "data"))
    assert [run["outcome"] for run in runs] == ["failed"]


@pytest.mark.slow
def test_the_guardian_lets_a_paused_container_go_on(daemon: Daemon) -> None:
    start(daemon, "touch /data/up; while :; do date +%s%N > /data/now; sleep 0.1; done")
    daemon.laz("pause", "app")
    with closing(sqlite3.connect(daemon.root / "data" / "state.db", timeout=30)) as database:
        database.execute(
            "INSERT INTO policy_holds (run, kind, container, argv, state, since_ns)"
            " VALUES (1, 'unpause', 'app', '[]', 'held', 0)"
        )
        database.commit()
    daemon.kill()
    until(lambda: not held(daemon))
    daemon.start()
    assert not state(daemon)["Paused"]
    before = inside(daemon, "cat", "/data/now")
    until(lambda: inside(daemon, "cat", "/data/now") != before)


@pytest.mark.slow
def test_a_killed_guardian_is_replaced(daemon: Daemon) -> None:
    [first] = guardians(daemon)
    os.kill(first, signal.SIGKILL)
    until(lambda: guardians(daemon) not in ([], [first]))
    daemon.kill()
    until(lambda: not guardians(daemon))
    daemon.start()


@pytest.mark.slow
def test_postgres_is_brought_into_backup_mode(daemon: Daemon) -> None:
    database = Postgres.run(daemon)
    database.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS id")
    daemon.laz("policy", "set", "pgdata", "--every", "1h", "--consistency", "postgres")
    done = backup(daemon, "pgdata")
    assert (done["outcome"], done["consistency"]) == ("ok", "application")
    assert database.sql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%backup%'") == "1"

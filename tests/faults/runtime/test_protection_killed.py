"""Daemon or job killed at random moments while policies save busy containers (case A11).

``LAZ_PROTECTION_KILLS`` says how often; a few times by default, fifty for the whole test.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.postgres import SUMS, Postgres
from tests.support.processes import JOBS, kill_programs
from tests.support.s3 import S3Server
from tests.support.waiting import until

from lazarette.runtime.protection.guardian import anything_held

KILLS = int(os.environ.get("LAZ_PROTECTION_KILLS", "3"))
RELEASED_S = 30.0
COUNTER = (
    "trap 'sleep 0.5; exit 0' TERM; i=0; "
    "while :; do i=$((i+1)); echo $i > /data/n; sleep 0.05; done"
)
# name of the container: how it is held
HELD = {
    "stopped": ["lazarette.mode=stop"],
    "paused": ["lazarette.mode=pause"],
    "hooked": ["lazarette.consistency=hooks"],
}


class Host:
    """A daemon, a busy database, and a container for each way to be held."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self.daemon = daemon
        self.folder = folder
        daemon.laz("load", "-q", "-i", str(busybox_archive()))
        self.database = Postgres.run(daemon)
        daemon.laz("exec", "-u", "postgres", "db", "pgbench", "-i", "-q", "postgres")
        self.load = self.database.pgbench("-n", "-c", "2", "-T", "3000")
        for name, labels in HELD.items():
            hooks = [
                f"lazarette.pre=host: sh -c 'echo {name} >> {folder}/before'",
                f"lazarette.post=host: sh -c 'echo {name} >> {folder}/after-{name}'",
            ]
            words = [*labels, *hooks, "lazarette.backup=every 2s", "lazarette.keep=last=100"]
            options = [word for label in words for word in ("--label", label)]
            volume = ("-v", f"{name}-data:/data")
            daemon.laz(
                "run", "-d", "--name", name, *volume, *options, "busybox", "sh", "-c", COUNTER
            )
        daemon.laz(
            "policy", "set", "pgdata", "--every", "2s", "--consistency", "postgres",
            "--keep", "last=100",
        )  # fmt: skip

    def held(self) -> bool:
        return anything_held(str(self.daemon.root / "data" / "state.db"))

    def goes_on(self, name: str) -> bool:
        """Whether the container counts (a backup may hold it just now)."""
        return self._count(name) != self._count(name, 0.3)

    def _count(self, name: str, later: float = 0.0) -> bytes:
        time.sleep(later)
        return self.daemon.laz("exec", name, "cat", "/data/n", check=False).stdout

    def history(self, volume: str = "") -> list[dict]:
        words = (volume,) if volume else ()
        return cast(list[dict], self.daemon.json("backup", "history", "--limit", "10000", *words))

    def keep_busy(self) -> None:
        if self.load.poll() is not None:
            self.load = self.database.pgbench("-n", "-c", "2", "-T", "3000")


@pytest.fixture
def host(daemon: Daemon, tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> Iterator[Host]:
    daemon.laz(
        "repo", "init", "--kit-file", str(tmp_path / "kit"), s3_server.url(s3_bucket, "host"),
        env=s3_server.environment,
    )  # fmt: skip
    made = Host(daemon, tmp_path)
    yield made
    made.load.kill()
    made.load.wait()


@pytest.mark.slow
@pytest.mark.timeout(max(600, 60 * KILLS))
def test_everything_is_released_and_no_run_is_lost(host: Host) -> None:
    daemon = host.daemon
    chosen = random.Random(os.environ.get("LAZ_KILL_SEED", "8"))
    slowest = 0.0
    for turn in range(KILLS):
        time.sleep(chosen.uniform(0.0, 3.0))
        kind = ("daemon", "left dead", "job")[turn % 3]
        if kind == "job":
            kill_programs(daemon.root, JOBS)
        else:
            daemon.kill()
            if kind == "left dead":
                slowest = max(slowest, until(lambda: not host.held()))
            daemon.start()
        for name in HELD:
            until(lambda name=name: host.goes_on(name), f"{name} stands still after {kind}")  # type: ignore[misc]
        host.keep_busy()
    print(f"slowest release by the guardian: {slowest:.1f} s")
    if "LAZ_PROTECTION_KILLS" in os.environ:  # the machine is not shared with other tests then
        assert slowest < RELEASED_S
    _look_at_history(host)
    host.load.kill()
    _look_at_backups(host)


def _look_at_history(host: Host) -> None:
    """Every run has an end, and commands after it ran once each, neither less nor more."""
    daemon = host.daemon
    for volume in ("pgdata", *(f"{name}-data" for name in HELD)):
        before = len(host.history(volume))
        until(
            lambda volume=volume, before=before: len(host.history(volume)) > before,  # type: ignore[misc]
            f"{volume} is saved no more",
        )
    for name in HELD:
        daemon.laz("rm", "-f", name)
    daemon.laz("policy", "rm", "pgdata")
    until(lambda: all(run["outcome"] != "running" for run in host.history()), "a run does not end")
    assert not host.held()
    for name in HELD:
        runs = host.history(f"{name}-data")
        ran = (host.folder / f"after-{name}").read_text().split()
        good = sum(run["outcome"] in ("ok", "warnings") for run in runs)
        assert good <= len(ran) <= len(runs), (name, good, len(ran), len(runs))
        assert good > 0


def _look_at_backups(host: Host) -> None:
    """What was saved of the database meanwhile is a database."""
    daemon = host.daemon
    daemon.laz("backup", "run", "pgdata")
    found = json.loads(daemon.laz("backup", "ls", "--json", "pgdata").stdout)
    daemon.laz("restore", f"pgdata@{found[-1]['id']}", "--as", "back")
    copy = Postgres.start(daemon, "back", "back")
    assert copy.sql(SUMS) == "t"
    copy.check()

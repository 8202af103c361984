"""Restores killed at random points: no volume is ever between two states.

``LAZ_RESTORE_KILLS`` says how often each; a few times by default, fifty for the whole test.
``LAZ_KILL_SEED`` chooses the points.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import LAZ, Daemon
from tests.support.images import busybox_archive
from tests.support.processes import JOBS, SERVERS, kill_programs
from tests.support.waiting import until

KILLS = int(os.environ.get("LAZ_RESTORE_KILLS", "3"))
_LOOK = "cd /v && find . ! -name . | sort && find . -type f | sort | xargs md5sum"
_STATES = ("one", "two")


@dataclass
class Host:
    """A daemon with a repository of a volume in two states, and what each looks like."""

    daemon: Daemon
    chosen: random.Random
    points: dict[str, str]
    looks: dict[str, str]

    def look(self, volume: str) -> str:
        """Names and contents of a volume."""
        return self.daemon.laz(
            "run", "--rm", "-v", f"{volume}:/v", "busybox", "sh", "-c", _LOOK
        ).stdout.decode()

    def ask(self, *command: str) -> subprocess.Popen[bytes]:
        """Begin a command without waiting for it."""
        return subprocess.Popen(
            [str(LAZ), "-H", self.daemon.host, *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def strike(self, kind: str, after: float) -> None:
        """Kill daemon, jobs or FUSE servers, or all of them, so many seconds from now."""
        time.sleep(after)
        if kind in ("daemon", "all"):
            self.daemon.kill()
        if kind in ("job", "all"):
            kill_programs(self.daemon.root, JOBS)
        if kind in ("server", "all"):
            kill_programs(self.daemon.root, SERVERS)
        if kind in ("daemon", "all"):
            self.daemon.start()


@pytest.fixture
def host(daemon: Daemon, tmp_path: Path) -> Iterator[Host]:
    daemon.laz("load", "-q", "-i", str(busybox_archive()))
    daemon.laz("repo", "init", "--kit-file", str(tmp_path / "kit"), str(tmp_path / "repo"))
    made = Host(daemon, random.Random(os.environ.get("LAZ_KILL_SEED", "9")), {}, {})
    scripts = {
        "one": "mkdir d; for i in 1 2 3 4 5 6; do head -c 2000000 /dev/urandom > d/$i; done;"
        " ln d/1 hard; ln -s d/2 soft; echo one > small",
        "two": "dd if=/dev/urandom of=d/3 bs=4096 seek=99 count=3 conv=notrunc;"
        " head -c 5000000 /dev/urandom > d/7; rm d/5 soft; mkdir e; echo two > e/small",
    }
    for state in _STATES:
        script = f"cd /v && {scripts[state]}"
        daemon.laz("run", "--rm", "-v", "data:/v", "busybox", "sh", "-c", script)
        run = cast(list[dict], daemon.json("backup", "run", "data"))[0]
        made.points[state] = run["snapshot"]
        made.looks[state] = made.look("data")
    yield made


@pytest.mark.slow
@pytest.mark.timeout(max(900, 60 * KILLS))
def test_a_new_volume_is_whole_or_not_there(host: Host) -> None:
    whole = 0
    for turn in range(KILLS):
        state, kind = host.chosen.choice(_STATES), ("daemon", "job", "all")[turn % 3]
        asking = host.ask("restore", f"data@{host.points[state]}", "--as", "new")
        host.strike(kind, host.chosen.uniform(0.2, 2.5))
        asking.wait(120)
        until(lambda: not _restoring(host.daemon), "the restore does not end")
        if b"new" in host.daemon.laz("volume", "ls", "-q").stdout.split():
            whole += 1
            assert host.look("new") == host.looks[state], (turn, kind)
            host.daemon.laz("volume", "rm", "new")
    host.daemon.laz("restore", f"data@{host.points['one']}", "--as", "new")
    assert host.look("new") == host.looks["one"]
    print(f"{whole} of {KILLS} were whole")


@pytest.mark.slow
@pytest.mark.timeout(max(900, 60 * KILLS))
def test_a_volume_in_use_is_in_the_old_state_or_the_new(host: Host) -> None:
    daemon = host.daemon
    daemon.laz(
        "run", "-d", "--init", "--restart", "always", "--name", "user", "-v", "data:/v",
        "busybox", "sleep", "100000",
    )  # fmt: skip
    was = "two"
    for turn in range(KILLS):
        state, kind = host.chosen.choice(_STATES), ("daemon", "job", "all")[turn % 3]
        asking = host.ask("restore", "--yes", f"data@{host.points[state]}")
        host.strike(kind, host.chosen.uniform(0.2, 3.0))
        asking.wait(120)
        until(lambda: _runs(daemon), "the container does not run again")
        until(lambda: not _overwriting(daemon), "the restore does not end")
        seen = daemon.laz("exec", "user", "sh", "-c", _LOOK).stdout.decode()
        assert seen in (host.looks[was], host.looks[state]), (turn, kind, was, state)
        was = "one" if seen == host.looks["one"] else "two"


@pytest.mark.slow
@pytest.mark.timeout(max(900, 60 * KILLS))
def test_an_instant_volume_never_shows_a_wrong_byte(host: Host) -> None:
    daemon = host.daemon

    def inside(script: str) -> str:
        done = daemon.laz("exec", "user", "sh", "-c", f"cd /v && {script}", check=False)
        return done.stdout.decode() if done.returncode == 0 else ""

    def looked() -> str:
        seen = [""]
        until(lambda: seen.append(inside(_LOOK)) or seen[-1], "it cannot be read any more")
        return seen[-1]

    def differing(seen: str, state: str) -> set[str]:
        lines = set(seen.splitlines()) ^ set(host.looks[state].splitlines())
        return {line.split()[-1] for line in lines}

    for turn in range(KILLS):
        state = host.chosen.choice(_STATES)
        kind = ("server", "daemon", "all")[turn % 3]
        daemon.laz("restore", f"data@{host.points[state]}", "--as", "new", "--instant",
                   "--rate", "2m")  # fmt: skip
        daemon.laz(
            "run", "-d", "--init", "--restart", "always", "--name", "user", "-v", "new:/v",
            "busybox", "sleep", "100000",
        )  # fmt: skip
        inside("echo kept > mine && printf changed | dd of=d/2 conv=notrunc && sync")
        host.strike(kind, host.chosen.uniform(0.0, 3.0))
        until(lambda: inside("cat small mine") == "one\nkept\n", "it cannot be read again")
        daemon.laz("volume", "fill", "--start", "--rate", "50m", "new", check=False)
        until(
            lambda: all(one["whole"] for one in cast(list[dict], daemon.json("volume", "fill"))),
            "the fill does not end",
        )
        assert differing(looked(), state) == {"./mine", "./d/2"}, (turn, kind)
        daemon.laz("rm", "-f", "user")
        until(lambda: not daemon.json("volume", "fill"), "it does not become ordinary")
        assert differing(host.look("new"), state) == {"./mine", "./d/2"}, (turn, kind)
        daemon.laz("volume", "rm", "new")


def _runs(daemon: Daemon) -> bool:
    return daemon.laz("exec", "user", "true", check=False).returncode == 0


def _rows(daemon: Daemon, table: str) -> int:
    import sqlite3

    with sqlite3.connect(f"file:{daemon.root}/data/state.db?mode=ro", uri=True) as database:
        return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def _restoring(daemon: Daemon) -> bool:
    return _rows(daemon, "restores") > 0


def _overwriting(daemon: Daemon) -> bool:
    return _rows(daemon, "overwrites") > 0

"""SIGKILL of the daemon: containers, logs and backups go on, and are found again."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import LAZ, Daemon
from tests.support.images import busybox_archive
from tests.support.waiting import until

ROUNDS = int(os.environ.get("LAZ_KILL_ROUNDS", "20"))
COUNTER = """i=0
while :; do i=$((i+1)); echo "line $i"; echo $i > /data/m; mv /data/m /data/n; sleep 0.05; done"""


@pytest.fixture
def counting(daemon: Daemon) -> Daemon:
    """A daemon with a container that counts into its log and its volume."""
    daemon.laz("load", "-q", "-i", str(busybox_archive()))
    daemon.laz("run", "-d", "--name", "cc", "-v", "v1:/data", "busybox", "sh", "-c", COUNTER)
    return daemon


def lines(daemon: Daemon) -> list[int]:
    told = daemon.laz("logs", "cc").stdout.decode().splitlines()
    return [int(line.removeprefix("line ")) for line in told]


def counted(daemon: Daemon) -> int:
    """How far the container got; 0 while it cannot be asked."""
    return int(daemon.laz("exec", "cc", "cat", "/data/n", check=False).stdout or 0)


def _followed(daemon: Daemon, count: int) -> list[int]:
    """The next lines that ``logs -f`` shows as they are written."""
    with subprocess.Popen(
        [str(LAZ), "-H", daemon.host, "logs", "-f", "-n", "0", "cc"], stdout=subprocess.PIPE
    ) as following:
        assert following.stdout is not None
        shown = [following.stdout.readline().decode() for _ in range(count)]
        following.kill()
    return [int(line.removeprefix("line ")) for line in shown]


def test_container_and_log_go_on(counting: Daemon) -> None:
    until(lambda: len(lines(counting)) > 3, "the container does not count")
    before = lines(counting)[-1]
    counting.kill()
    time.sleep(1)
    counting.start()
    after = lines(counting)
    assert after == list(range(1, after[-1] + 1)), "a line is lost or doubled"
    assert after[-1] > before + 4, "the container stood still"
    assert [one["State"] for one in cast(list[dict], counting.json("ps"))] == ["running"]
    until(lambda: lines(counting)[-1] > after[-1], "the log does not go on")
    first, *rest = _followed(counting, 4)
    assert first > after[-1]
    assert rest == [first + 1, first + 2, first + 3]
    assert counting.laz("exec", "cc", "cat", "/data/n").returncode == 0
    counting.laz("stop", "-t", "1", "cc")
    assert cast(list[dict], counting.json("ps", "-a"))[0]["State"] == "exited"


def test_container_that_ended_meanwhile_has_its_exit_code(daemon: Daemon) -> None:
    daemon.laz("load", "-q", "-i", str(busybox_archive()))
    daemon.laz("run", "-d", "--name", "cc", "busybox", "sh", "-c", "sleep 0.5; echo done; exit 7")
    daemon.kill()
    time.sleep(1)
    daemon.start()
    assert daemon.laz("wait", "cc").stdout.strip() == b"7"
    assert daemon.laz("logs", "cc").stdout == b"done\n"


@pytest.mark.slow
@pytest.mark.timeout(max(900, 45 * ROUNDS))
def test_backups_killed_at_random(counting: Daemon, tmp_path: Path) -> None:
    """Job or daemon killed at any moment: the repository is whole, nothing is left frozen."""
    counting.laz(
        "exec",
        "cc",
        "sh",
        "-c",
        "for i in $(seq 40); do head -c 200000 /dev/urandom > /data/f$i; done",
    )
    url = str(tmp_path / "repo")
    counting.laz("repo", "init", "--kit-file", str(tmp_path / "kit"), url)
    chosen = random.Random(os.environ.get("LAZ_KILL_SEED", "7"))
    for turn in range(ROUNDS):
        client = _start_backup(counting)
        time.sleep(chosen.uniform(0, 0.8))
        if turn % 2:
            counting.kill()
        else:
            _kill_jobs(counting)
        client.wait(60)
        if turn % 2:
            counting.start()
        _settled(counting)
        until(lambda: counted(counting) > 0, "the container cannot be asked")
        number = counted(counting)
        until(lambda: counted(counting) > number, "left frozen")  # noqa: B023
    counting.laz("backup", "run", "v1")
    runs = cast(list[dict], counting.json("volume", "snapshots", "v1"))
    assert len(runs) == 1, "stray snapshots"
    env = {"LAZ_KEYS": str(tmp_path / "keys")}
    kit = ("--kit", str(tmp_path / "kit"))
    counting.laz("repo", "check", "--read-data", "100%", url, *kit, env=env)
    out = tmp_path / "out"
    counting.laz("restore", "v1@latest", "--repo", url, "--to", str(out), *kit, env=env)
    assert len(list(out.glob("f*"))) == 40


def _start_backup(daemon: Daemon) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(LAZ), "-H", daemon.host, "backup", "run", "v1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _kill_jobs(daemon: Daemon) -> None:
    """SIGKILL the job processes of this daemon."""
    mark = os.fsencode(daemon.root / "data" / "jobs")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if mark in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


def _settled(daemon: Daemon) -> None:
    """Wait until no run is under way."""

    def ended() -> bool:
        done = subprocess.run(
            ["curl", "-s", "--unix-socket", str(daemon.socket), "http://d/lazarette/v1/runs"],
            capture_output=True,
            check=False,
        )
        return done.returncode == 0 and all(
            run["outcome"] != "running" for run in json.loads(done.stdout)
        )

    until(ended, "a run does not end")

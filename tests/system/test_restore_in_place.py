"""A restore over a volume in use: its containers stop, it changes, they run again."""

import glob
import json
import os
import re
import signal
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.waiting import until

_SIZE = 6 << 20


def inside(daemon: Daemon, script: str) -> str:
    return daemon.laz("exec", "user", "sh", "-c", script).stdout.decode().strip()


def running(daemon: Daemon) -> bool:
    shown = cast(list[dict], json.loads(daemon.laz("inspect", "user").stdout))
    return bool(shown[0]["State"]["Running"])


@pytest.fixture
def in_use(daemon: Daemon, tmp_path: Path) -> Daemon:
    """A volume in a repository, changed since, and used by a container that runs."""
    daemon.laz("load", "-q", "-i", str(busybox_archive()))
    daemon.laz(
        "run", "-d", "--init", "--restart", "always", "--name", "user", "-v", "v1:/data",
        "busybox", "sh", "-c", "while :; do sleep 1; done",
    )  # fmt: skip
    inside(daemon, f"head -c {_SIZE} /dev/urandom > /data/big; echo one > /data/small")
    daemon.laz("repo", "init", "--kit-file", str(tmp_path / "kit"), str(tmp_path / "repo"))
    daemon.laz("backup", "run", "v1")
    inside(daemon, "echo two > /data/small; echo more > /data/new")
    return daemon


@pytest.mark.slow
def test_users_are_stopped_and_started_and_it_can_be_undone(in_use: Daemon) -> None:
    daemon = in_use
    refused = daemon.laz("restore", "v1@latest", check=False)
    assert refused.returncode == 22
    assert b"user" in refused.stderr
    assert inside(daemon, "cat /data/small") == "two"

    done = cast(dict, daemon.json("restore", "--yes", "v1@latest"))
    assert done["result"]["outcome"] == "ok"
    assert done["result"]["bytes_read"] < _SIZE, "more than the difference was written"
    assert inside(daemon, "cat /data/small; ls /data") == "one\nbig\nsmall"
    inside(daemon, "echo three > /data/small")

    daemon.laz("restore", "--undo", "--yes", "v1")
    assert inside(daemon, "cat /data/small /data/new") == "two\nmore"
    daemon.laz("restore", "--undo", "--yes", "v1")
    assert inside(daemon, "cat /data/small; ls /data") == "three\nbig\nsmall"
    never = daemon.laz("volume", "create", "other")
    assert never.returncode == 0
    assert daemon.laz("restore", "--undo", "other", check=False).returncode == 23


def test_a_job_that_dies_leaves_the_volume_as_it_was(in_use: Daemon) -> None:
    daemon = in_use
    killed = _restore_and_kill(daemon, jobs=True, the_daemon=False)
    until(lambda: running(daemon), "the container does not run again")
    _must_be_one_state(daemon, killed)


def test_daemon_and_job_killed_leave_the_volume_as_it_was(in_use: Daemon) -> None:
    daemon = in_use
    killed = _restore_and_kill(daemon, jobs=True, the_daemon=True)
    daemon.start()
    until(lambda: running(daemon), "the container does not run again")
    _must_be_one_state(daemon, killed)


def test_daemon_killed_finishes_what_its_job_goes_on_with(in_use: Daemon) -> None:
    daemon = in_use
    _restore_and_kill(daemon, jobs=False, the_daemon=True)
    daemon.start()
    until(lambda: running(daemon), "the container does not run again")
    until(lambda: _idle(daemon), "the restore does not end")
    assert inside(daemon, "cat /data/small; ls /data") == "one\nbig\nsmall"


def _restore_and_kill(daemon: Daemon, *, jobs: bool, the_daemon: bool) -> bool:
    """Kill job processes, the daemon, or both once a restore's job runs; whether it ran."""
    import subprocess

    from tests.support.daemon import LAZ

    command = [str(LAZ), "-H", daemon.host, "restore", "--yes", "v1@latest"]
    asking = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        begun = daemon.root / "data" / "jobs"
        until(
            lambda: glob.glob(f"{begun}/*/progress*") or asking.poll() is not None,
            "no job begins",
            pause=0.005,
        )
        found = _jobs(daemon)
        if the_daemon:
            daemon.kill()
        if jobs:
            for pid in found:
                os.kill(pid, signal.SIGKILL)
    finally:
        asking.wait(90)
    return bool(found)


def _must_be_one_state(daemon: Daemon, killed: bool) -> None:
    until(lambda: _idle(daemon), "the restore does not end")
    seen = inside(daemon, "cat /data/small; ls /data")
    before, after = "two\nbig\nnew\nsmall", "one\nbig\nsmall"
    assert seen == before or (not killed and seen == after)


def _idle(daemon: Daemon) -> bool:
    """Whether the volume may be mounted by others again."""
    done = daemon.laz("restore", "--undo", "v1", check=False)
    return b"cannot be used now" not in done.stderr and running(daemon)


def _jobs(daemon: Daemon) -> list[int]:
    """Job processes of the daemon that run now."""
    found = []
    wanted = re.compile(rb"lazarette\.backup\.jobs\.run\0" + os.fsencode(daemon.root))
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted.search((entry / "cmdline").read_bytes()):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found

"""Branches: writable volumes of any point, shared until changed, gone with their container."""

import json
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.waiting import until

from lazarette.runtime.protection.branches import LABEL
from lazarette.runtime.protection.fills import StillFilling
from lazarette.storage.volumes.store import WrongDriver

_SIZE = 8 << 20


def busybox(daemon: Daemon, volume: str, script: str, *options: str) -> str:
    command = ["run", "--rm", *options, "-v", f"{volume}:/data", "busybox", "sh", "-c", script]
    return daemon.laz(*command).stdout.decode().strip()


def volumes(daemon: Daemon) -> list[str]:
    return daemon.laz("volume", "ls", "-q").stdout.decode().split()


def fills(daemon: Daemon) -> dict[str, dict]:
    found = cast(list[dict], daemon.json("volume", "fill"))
    return {one["volume"]: one for one in found}


@pytest.fixture
def backed_up(daemon: Daemon, tmp_path: Path) -> Daemon:
    """A daemon with a volume, in a repository, that was changed since."""
    daemon.laz("load", "-q", "-i", str(busybox_archive()))
    write = f"head -c {_SIZE} /dev/urandom > /data/big; echo one > /data/small"
    busybox(daemon, "v1", write)
    daemon.laz("repo", "init", "--kit-file", str(tmp_path / "kit"), str(tmp_path / "repo"))
    daemon.laz("backup", "run", "v1")
    busybox(daemon, "v1", "echo two > /data/small")
    return daemon


def test_branches_here_are_clones(backed_up: Daemon) -> None:
    daemon = backed_up
    daemon.laz("volume", "snapshot", "--name", "third", "v1")
    made = cast(dict, daemon.json("branch", "v1", "now"))
    assert not made["shared"]
    assert made["labels"][LABEL] == "v1@present"
    daemon.laz("branch", "v1@latest", "then")
    daemon.laz("branch", "v1@third", "third")
    assert busybox(daemon, "now", "cat /data/small; echo x > /data/small") == "two"
    assert busybox(daemon, "then", "cat /data/small") == "one"
    assert busybox(daemon, "third", "cat /data/small") == "two"
    assert busybox(daemon, "v1", "cat /data/small") == "two"
    assert not fills(daemon)
    assert daemon.laz("branch", "v1@latest", "now", check=False).returncode != 0
    assert daemon.laz("branch", "v1@nothing", "no", check=False).returncode == 23


def test_remote_branches_share_and_have_a_history_of_their_own(backed_up: Daemon) -> None:
    daemon = backed_up
    daemon.laz("volume", "rm", "v1")
    for name in ("b1", "b2"):
        assert cast(dict, daemon.json("branch", "v1@latest", name))["shared"]
    total = "md5sum < /data/big"
    first = busybox(daemon, "b1", f"cat /data/small; echo mine > /data/small; {total}")
    assert first == "one\n" + busybox(daemon, "b2", total)
    assert busybox(daemon, "b2", "cat /data/small") == "one"
    assert busybox(daemon, "b1", "cat /data/small") == "mine"
    refused = daemon.laz("backup", "run", "b1", check=False)
    assert refused.returncode == StillFilling.exit_code

    daemon.kill()
    daemon.start()
    assert fills(daemon)["b1"]["lazy"], "a branch fills itself unasked"
    daemon.laz("volume", "fill", "--start", "b1")
    until(lambda: "b1" not in fills(daemon), "the branch does not become ordinary")
    run = cast(list[dict], daemon.json("backup", "run", "b1"))[0]
    assert run["outcome"] == "ok"
    assert run["result"]["bytes_sent"] < _SIZE / 4, "what the repository has was sent again"
    history = cast(list[dict], daemon.json("backup", "ls", "b1"))
    assert [one["volume"] for one in history] == ["b1"]
    daemon.laz("volume", "rm", "b1", "b2")
    assert not fills(daemon)
    assert volumes(daemon) == []


def test_ephemeral_branch_goes_with_its_container(backed_up: Daemon) -> None:
    daemon = backed_up
    daemon.laz("volume", "rm", "v1")
    daemon.laz("branch", "--ephemeral", "v1@latest", "test")
    assert busybox(daemon, "test", "cat /data/small") == "one"
    until(lambda: volumes(daemon) == [], "it stays")
    daemon.laz("branch", "--ephemeral", "v1@latest", "kept")
    daemon.laz("create", "--name", "user", "-v", "kept:/data", "busybox", "true")
    daemon.kill()
    daemon.start()
    assert volumes(daemon) == ["kept"]
    daemon.laz("rm", "user")
    until(lambda: volumes(daemon) == [], "it stays after a restart")


def test_docker_makes_branches_by_option(backed_up: Daemon) -> None:
    daemon = backed_up
    option = ("-o", "from=v1@latest")
    for _ in range(2):  # as compose does, at every "up"
        assert daemon.docker("volume", "create", *option, "d1").stdout == b"d1\n"
    shown = json.loads(daemon.docker("volume", "inspect", "d1").stdout)[0]
    assert shown["Labels"][LABEL].startswith("v1@")
    other = daemon.laz("volume", "create", "-o", "from=v1", "d1", check=False)
    assert other.returncode == WrongDriver.exit_code
    bad = daemon.laz("volume", "create", "-o", "from=v1", "-o", "colour=red", "d2", check=False)
    assert b"colour" in bad.stderr
    mount = "type=volume,src=d3,dst=/data,volume-opt=from=v1@latest"
    read = daemon.docker("run", "--rm", "--mount", mount, "busybox", "cat", "/data/small")
    assert read.stdout == b"one\n"

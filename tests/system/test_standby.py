"""Warm standby: two daemons and a bucket; the second follows, takes over, fences the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.s3 import S3Server
from tests.support.waiting import until

from lazarette.backup.repository.ownership import Fenced
from lazarette.storage.errors import InUse

_BIG = 8 << 20


def _backup(daemon: Daemon) -> dict:
    return cast(list[dict], daemon.json("backup", "run", "data"))[0]


def _standby(daemon: Daemon) -> dict:
    return cast(list[dict], daemon.json("standby", "ls"))[0]


def _follows(daemon: Daemon, snapshot: str) -> None:
    until(
        lambda: (one := _standby(daemon))["applied"] == snapshot and not one["applying"],
        f"{snapshot} is not applied",
    )


def _content(daemon: Daemon) -> dict[str, bytes]:
    """The volume's files, read beside the daemon from a clone of the volume."""
    daemon.laz("volume", "clone", "data", "seen")
    try:
        script = "cd /seen && for f in *; do echo $f $(md5sum < $f); done"
        shown = daemon.laz("run", "--rm", "-v", "seen:/seen", "busybox", "sh", "-c", script).stdout
    finally:
        daemon.laz("volume", "rm", "seen")
    return {line.split()[0].decode(): line.split()[1] for line in shown.splitlines()}


def _write(daemon: Daemon, script: str) -> None:
    daemon.laz("exec", "app", "sh", "-c", f"cd /data && {script}")


@pytest.mark.slow
def test_follow_promote_and_fence(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:
    url, kit = s3_server.url(s3_bucket, "shared"), tmp_path / "kit"
    first, second = Daemon(tmp_path / "one"), Daemon(tmp_path / "two")
    try:
        first.start()
        second.start()
        for daemon in (first, second):
            daemon.laz("load", "-q", "-i", str(busybox_archive()))
        first.laz("repo", "init", "--kit-file", str(kit), url, env=s3_server.environment)
        first.laz("run", "-d", "--name", "app", "-v", "data:/data", "busybox", "sleep", "100000")
        _write(first, f"head -c {_BIG} /dev/urandom > big; echo one > small; ln small link; sync")
        full = _backup(first)
        second.laz("repo", "add", "--kit", str(kit), url, env=s3_server.environment)
        second.laz("standby", "follow", "data", "--every", "1s")
        _follows(second, full["snapshot"])

        second.laz("create", "--name", "early", "-v", "data:/d", "busybox", "true")
        refused = second.laz("start", "early", check=False)
        second.laz("rm", "early")
        assert refused.returncode != 0
        assert b"standby promote" in refused.stderr
        denied = second.laz("backup", "run", "data", check=False)
        assert denied.returncode == InUse.exit_code

        _write(first, "dd if=/dev/urandom of=big bs=4096 seek=700 count=1 conv=notrunc; rm small")
        _write(first, "echo three > new; sync")
        light = _backup(first)
        _follows(second, light["snapshot"])
        assert _standby(second)["bytes_written"] < _BIG // 4

        second.kill()
        _write(first, "echo four > four; sync")
        last = _backup(first)
        second.start()
        _follows(second, last["snapshot"])
        wanted = first.laz(
            "exec", "app", "sh", "-c", "cd /data && for f in *; do echo $f $(md5sum < $f); done"
        ).stdout
        assert _content(second) == {
            line.split()[0].decode(): line.split()[1] for line in wanted.splitlines()
        }

        report = json.loads(second.laz("standby", "promote", "data", "--json").stdout)
        assert report["outcome"] == "ok", report
        assert second.laz("exec", "app", "cat", "/data/four").stdout == b"four\n"
        assert not second.json("standby", "ls")

        fenced = first.laz("backup", "run", "data", check=False)
        assert fenced.returncode == Fenced.exit_code
        assert b"taken over" in fenced.stderr
        until(lambda: first.json("standby", "fences"), "the old owner does not notice")
        until(lambda: first.laz("ps", "-q").stdout == b"", "the old owner's container still runs")
        assert {one["state"] for one in cast(list[dict], first.json("status"))} == {"fenced"}

        after = _backup(second)
        assert after["outcome"] == "ok"
        first.laz("rm", "-f", "app")
        first.laz("standby", "follow", "data", "--every", "1s", "--over")
        _follows(first, after["snapshot"])
    finally:
        first.end()
        second.end()

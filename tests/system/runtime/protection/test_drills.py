"""A backup proves that it comes back, on a real daemon."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive


@pytest.mark.slow
def test_a_drill_restores_starts_checks_and_removes(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "host")
    daemon.start()
    try:
        daemon.laz("load", "-q", "-i", str(busybox_archive()))
        daemon.laz("repo", "init", "--kit-file", str(tmp_path / "kit"), str(tmp_path / "repo"))
        labels = {
            "lazarette.backup": "@yearly",
            "lazarette.drill": "@yearly",
            "lazarette.drill.command": "grep precious /data/file",
        }
        options = [word for pair in labels.items() for word in ("--label", "=".join(pair))]
        daemon.laz("volume", "create", *options, "data")
        daemon.laz("run", "-d", "--name", "app", "-v", "data:/data", "busybox", "sleep", "1000")
        daemon.laz("exec", "app", "sh", "-c", "echo precious > /data/file")
        daemon.laz("backup", "run", "data")
        before = daemon.laz("volume", "ls", "-q").stdout
        done = cast(dict[str, object], daemon.json("backup", "drill", "data"))
        assert done["outcome"] == "ok", done
        assert cast(int, done["restore_ns"]) > 0
        assert daemon.laz("volume", "ls", "-q").stdout == before
        assert b"drill" not in daemon.laz("ps", "-a").stdout
        state = json.loads(daemon.laz("status", "--json").stdout)
        assert any(one["rto_ns"] == done["restore_ns"] for one in state)
        assert all(one["last_verified_ns"] for one in state if one["volume"] == "data")
        told = daemon.docker("events", "--since", "1", "--until", str(int(time.time()) + 1))
        for what in (b" backup start data ", b" backup ok data ", b" drill ok data "):
            assert what in told.stdout
    finally:
        daemon.end()

"""A standby killed while it applies a snapshot: it shows whole ones only, and catches up.

``LAZ_RESTORE_KILLS`` says how often; three times by default.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.processes import JOBS, kill_programs
from tests.support.proxy import FaultProxy, Rule
from tests.support.s3 import S3Server
from tests.support.waiting import until

KILLS = int(os.environ.get("LAZ_RESTORE_KILLS", "3"))
_LOOK = "cd /v && find . ! -name . | sort && find . -type f | sort | xargs md5sum && stat -c %Y *"
_CHANGE = (
    "for i in 1 2 3 4; do dd if=/dev/urandom of=f$i bs=1M seek=$i count=2 conv=notrunc; done;"
    " rm -f old; mv new old; head -c 3000000 /dev/urandom > new; sync"
)


def _standby(daemon: Daemon) -> dict:
    return cast(list[dict], daemon.json("standby", "ls"))[0]


def _look(daemon: Daemon, volume: str) -> str:
    return daemon.laz(
        "run", "--rm", "-v", f"{volume}:/v", "busybox", "sh", "-c", _LOOK
    ).stdout.decode()


def _clone_look(daemon: Daemon) -> str:
    """What the standby's volume holds, by a clone of it."""
    daemon.laz("volume", "clone", "data", "seen")
    try:
        return _look(daemon, "seen")
    finally:
        daemon.laz("volume", "rm", "seen")


@pytest.mark.slow
@pytest.mark.timeout(max(900, 60 * KILLS))
def test_a_follower_killed_while_it_applies_catches_up_byte_for_byte(
    tmp_path: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    chosen = random.Random(os.environ.get("LAZ_KILL_SEED", "11"))
    kit = tmp_path / "kit"
    first, second = Daemon(tmp_path / "one"), Daemon(tmp_path / "two")
    with FaultProxy(s3_server.endpoint) as proxy:
        slow = S3Server(proxy.endpoint, s3_server.credentials)
        # so that there is a middle to be killed in
        proxy.plan(Rule("delay", match=b"packs/", times=10**6, seconds=1.0))
        try:
            first.start()
            second.start()
            for daemon in (first, second):
                daemon.laz("load", "-q", "-i", str(busybox_archive()))
            first.laz("repo", "init", "--kit-file", str(kit), s3_server.url(s3_bucket, "shared"),
                      env=s3_server.environment)  # fmt: skip
            second.laz("repo", "add", "--kit", str(kit), slow.url(s3_bucket, "shared"),
                       env=s3_server.environment)  # fmt: skip
            _change(first)
            second.laz("standby", "follow", "data", "--every", "1s")
            until(lambda: _standby(second)["applied"], "the first snapshot is not applied")
            for turn in range(KILLS):
                _change(first)
                until(lambda: _standby(second)["applying"], "it does not begin")
                time.sleep(chosen.uniform(0.0, 2.0))
                kind = ("daemon", "job", "all")[turn % 3]
                if kind in ("daemon", "all"):
                    second.kill()
                if kind in ("job", "all"):
                    kill_programs(second.root, JOBS)
                if kind in ("daemon", "all"):
                    second.start()
                until(
                    lambda: (
                        (one := _standby(second))["applied"] == _newest(first)
                        and not one["applying"]
                    ),
                    f"it does not catch up after {kind}",
                )
                assert _clone_look(second) == _look(first, "data"), (turn, kind)
        finally:
            first.end()
            second.end()


def _change(daemon: Daemon) -> None:
    """Change the volume and back it up."""
    daemon.laz("run", "--rm", "-v", "data:/v", "busybox", "sh", "-c", f"cd /v; {_CHANGE}")
    daemon.laz("backup", "run", "data")


def _newest(daemon: Daemon) -> str:
    return str(cast(list[dict], daemon.json("backup", "ls", "data"))[-1]["id"])

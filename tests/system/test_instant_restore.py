"""Instant restore: used before the data are here, whole while used, ordinary afterwards."""

import hashlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.postgres import Postgres
from tests.support.processes import SERVERS, kill_programs
from tests.support.s3 import S3Server
from tests.support.waiting import until

from lazarette.fuse.client import Mount
from lazarette.fuse.spec import LoopbackSpec
from lazarette.runtime.protection.fills import FOLDER, StillFilling

_SIZE = 24 << 20
_RATE = "8m"


def fills(daemon: Daemon) -> list[dict]:
    return cast(list[dict], daemon.json("volume", "fill"))


@pytest.fixture
def backed_up(daemon: Daemon, tmp_path: Path) -> Daemon:
    """A daemon with a volume of one large file and a small one, in a repository."""
    daemon.laz("load", "-q", "-i", str(busybox_archive()))
    daemon.laz(
        "run",
        "--rm",
        "-v",
        "v1:/data",
        "busybox",
        "sh",
        "-c",
        f"head -c {_SIZE} /dev/urandom > /data/big; echo small > /data/small;"
        " ln /data/small /data/link; chown 5:6 /data; chmod 0711 /data; cat /data/big"
        " | md5sum > /data/sum",
    )
    daemon.laz("repo", "init", "--kit-file", str(tmp_path / "kit"), str(tmp_path / "repo"))
    daemon.laz("backup", "run", "v1")
    return daemon


@pytest.mark.slow
def test_volume_is_used_filled_and_becomes_ordinary(backed_up: Daemon) -> None:
    daemon = backed_up
    daemon.laz("restore", "v1@latest", "--as", "v2", "--instant", "--rate", _RATE)
    script = (
        "cat /data/small; stat -c %u:%g:%a /data; echo new > /data/new; while :; do sleep 1; done"
    )
    daemon.laz("run", "-d", "--name", "user", "-v", "v2:/data", "busybox", "sh", "-c", script)
    until(lambda: daemon.laz("logs", "user").stdout == b"small\n5:6:711\n", "first read")
    refused = daemon.laz("volume", "snapshot", "v2", check=False)
    assert refused.returncode == StillFilling.exit_code

    daemon.kill()
    daemon.start()
    until(lambda: fills(daemon)[0]["whole"], "the fill does not end")
    summed = daemon.laz("exec", "user", "sh", "-c", "md5sum < /data/big; cat /data/sum").stdout
    assert len(set(summed.splitlines())) == 1
    backup = cast(list[dict], daemon.json("backup", "run", "v2"))[0]
    assert backup["outcome"] == "ok"

    daemon.laz("rm", "-f", "user")
    until(lambda: not fills(daemon), "it does not become ordinary")
    shown = daemon.laz(
        "run",
        "--rm",
        "-v",
        "v2:/data",
        "busybox",
        "sh",
        "-c",
        "ls -A /data; stat -c %u:%g:%a /data; stat -c %h /data/link",
    ).stdout
    assert shown.split() == [b"big", b"link", b"new", b"small", b"sum", b"5:6:711", b"2"]
    assert FOLDER.encode() not in shown
    daemon.laz("volume", "snapshot", "v2")


def test_killed_server_is_replaced(backed_up: Daemon) -> None:
    daemon = backed_up
    daemon.laz("restore", "v1@latest", "--as", "v2", "--instant", "--rate", "1m")
    merged = daemon.root / "exec" / "fills" / "v2" / "merged"
    assert (merged / "small").read_text() == "small\n"
    (merged / "mine").write_text("kept")
    kill_programs(daemon.root, SERVERS)

    def back() -> bool:
        try:
            return (merged / "small").read_text() == "small\n"
        except OSError:
            return False

    until(back, "the server is not replaced")
    assert (merged / "mine").read_text() == "kept"
    digest = hashlib.md5((merged / "big").read_bytes()).hexdigest()
    assert digest == (merged / "sum").read_text().split()[0]


@pytest.mark.slow
def test_daemon_that_ends_while_a_volume_becomes_ordinary(backed_up: Daemon) -> None:
    """What a cancelled look had begun in a thread must be over before the pool is taken away."""
    daemon = backed_up
    daemon.laz("restore", "v1@latest", "--as", "v2", "--instant")
    sleep = ("busybox", "sleep", "100000")
    daemon.laz("run", "-d", "--init", "--name", "user", "-v", "v2:/data", *sleep)
    control = daemon.root / "exec" / "fills" / "v2" / "control"
    server = Mount(LoopbackSpec(mountpoint="", control=str(control), root="", work="")).status().pid
    until(lambda: fills(daemon)[0]["whole"], "the fill does not end")
    # not by laz, which takes so long to end that the volume may be ordinary by then
    daemon.ask("DELETE", "v1.44/containers/user?force=true")
    os.kill(server, signal.SIGSTOP)  # the look that makes it ordinary takes its time
    time.sleep(1.5)
    again = threading.Timer(2, os.kill, (server, signal.SIGCONT))
    again.start()
    daemon.end()
    again.join()
    assert daemon.process is not None
    assert daemon.process.returncode == 0, daemon.log
    assert str(daemon.root) not in Path("/proc/self/mountinfo").read_text()
    daemon.start()
    until(lambda: not fills(daemon), "it does not become ordinary")
    check = "md5sum < /data/big; cat /data/sum"
    said = daemon.laz("run", "--rm", "-v", "v2:/data", "busybox", "sh", "-c", check).stdout
    assert len(set(said.splitlines())) == 1


def test_a_pool_that_is_just_let_go_is_unmounted_at_the_end(backed_up: Daemon) -> None:
    """What ends holds its files until it is gone; nobody's delay leaves a pool mounted."""
    daemon = backed_up
    daemon.laz("restore", "v1@latest", "--as", "v2", "--instant", "--rate", "1m")
    control = daemon.root / "exec" / "fills" / "v2" / "control"
    status = Mount(LoopbackSpec(mountpoint="", control=str(control), root="", work="")).status()
    (pool,) = (daemon.root / "data" / "volumes").glob("*/pool")
    held = os.open(pool, os.O_RDONLY)
    # the daemon finds a server that was killed, whose standby is about to go on
    os.kill(status.standby, signal.SIGSTOP)
    os.kill(status.pid, signal.SIGKILL)
    timers = [
        threading.Timer(1, os.kill, (status.standby, signal.SIGCONT)),
        threading.Timer(3, os.close, (held,)),
    ]
    for timer in timers:
        timer.start()
    daemon.end()
    for timer in timers:
        timer.join()
    assert daemon.process is not None
    assert daemon.process.returncode == 0, daemon.log
    assert str(daemon.root) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.slow
def test_database_answers_before_its_data_have_arrived(
    daemon: Daemon, s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    database = Postgres.run(daemon)
    assert database.pgbench("-i", "-q", "-s", "5").wait() == 0
    url = s3_server.url(s3_bucket, "host")
    daemon.laz("repo", "init", "--kit-file", str(tmp_path / "kit"), url, env=s3_server.environment)
    rows = database.sql("SELECT count(*), sum(abalance) FROM pgbench_accounts")
    daemon.laz("backup", "run", "pgdata")
    daemon.laz("restore", "pgdata@latest", "--as", "copy", "--instant", "--rate", "2m")
    second = Postgres.start(daemon, "copy", "db2")
    assert not fills(daemon)[0]["whole"], "the whole volume was here before the first answer"
    assert second.sql("SELECT count(*), sum(abalance) FROM pgbench_accounts") == rows
    assert second.pgbench("-c", "2", "-t", "50").wait() == 0
    second.check()

"""Instant volumes whose store goes away, or whose disk is full, while they fill."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.postgres import SUMS, Postgres
from tests.support.processes import SERVERS, kill_programs
from tests.support.proxy import FaultProxy
from tests.support.s3 import S3Server
from tests.support.waiting import until

_AWAY_S = 60.0
_PATIENCE_S, _SILENCE_S = 6, 10.0
_BLOCK = 128 << 10
_ACCOUNTS = "SELECT count(*), sum(abalance) FROM pgbench_accounts"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the daemon needs root")


@dataclass
class Writer:
    """Commits one row after the other, and knows which were acknowledged."""

    database: Postgres
    acknowledged: list[int] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.database.sql("CREATE TABLE rows (id bigint PRIMARY KEY)")
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        number = 0
        while not self._ended.is_set():
            number += 1
            if _answer(self.database, f"INSERT INTO rows VALUES ({number})") is None:
                time.sleep(0.1)
            else:
                self.acknowledged.append(number)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def lost(self) -> set[int]:
        """What was acknowledged and is not there."""
        return set(self.acknowledged) - set(
            map(int, self.database.sql("SELECT id FROM rows").split())
        )


@dataclass
class Edited:
    """A file of an instant volume that is read and written beside a model of it."""

    path: Path
    model: bytearray
    chosen: random.Random

    def edit(self) -> None:
        """Write somewhere; what is around that may have to be fetched."""
        start = self.chosen.randrange(len(self.model) - 5000)
        data = self.chosen.randbytes(self.chosen.choice((7, 5000)))
        with self.path.open("r+b", buffering=0) as stream:
            done = os.pwrite(stream.fileno(), data, start)
        self.model[start : start + done] = data[:done]

    def read(self, block: int) -> None:
        """Read a block, which must be as in the model."""
        start = block * _BLOCK
        with self.path.open("rb", buffering=0) as stream:
            assert os.pread(stream.fileno(), _BLOCK, start) == self.model[start:][:_BLOCK]


def _answer(database: Postgres, statement: str) -> str | None:
    """What a database says; None when it does not answer."""
    try:
        return database.sql(statement)
    except AssertionError:
        return None


def _fills(daemon: Daemon) -> dict[str, dict]:
    return {one["volume"]: one for one in cast(list[dict], daemon.json("volume", "fill"))}


def _whole(daemon: Daemon, volume: str) -> bool:
    return bool(_fills(daemon).get(volume, {"whole": True})["whole"])


def _shown(daemon: Daemon, volume: str) -> Path:
    return daemon.root / "exec" / "fills" / volume / "merged"


def _file(daemon: Daemon, size: int) -> str:
    """Back up a volume ``files`` of one file; its digest."""
    daemon.laz("load", "-q", "-i", str(busybox_archive()))
    make = f"head -c {size} /dev/urandom > /v/big; md5sum < /v/big"
    said = daemon.laz("run", "--rm", "-v", "files:/v", "busybox", "sh", "-c", make)
    daemon.laz("backup", "run", "files")
    return said.stdout.decode().split()[0]


def _content(daemon: Daemon, volume: str) -> bytes:
    return daemon.laz("run", "--rm", "-v", f"{volume}:/v", "busybox", "cat", "/v/big").stdout


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon whose readers soon give the store up."""
    (tmp_path / "daemon.toml").write_text(f"store_patience = {_PATIENCE_S}\n")
    one = Daemon(tmp_path / "d", arguments=("--config", str(tmp_path / "daemon.toml")))
    one.start()
    yield one
    one.end()


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as one:
        yield one


def _repository(daemon: Daemon, server: S3Server, proxy: FaultProxy, bucket: str) -> None:
    url = S3Server(proxy.endpoint, server.credentials).url(bucket, "host")
    kit = str(daemon.root / "kit")
    daemon.laz("repo", "init", "--kit-file", kit, url, env=server.environment)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_database_and_files_go_on_while_the_store_is_away_for_a_minute(
    daemon: Daemon, s3_server: S3Server, s3_bucket: str, proxy: FaultProxy
) -> None:
    _repository(daemon, s3_server, proxy, s3_bucket)
    digest = _file(daemon, 64 << 20)
    original = Postgres.run(daemon)
    assert original.pgbench("-i", "-q", "-s", "5").wait() == 0
    accounts = original.sql(_ACCOUNTS)
    original.sql("CHECKPOINT")  # else the restored one begins with a replay of all that
    daemon.laz("backup", "run", "pgdata")
    for volume in ("pgdata", "files"):
        daemon.laz("restore", f"{volume}@latest", "--as", f"new-{volume}", "--instant",
                   "--rate", "200k")  # fmt: skip
    database = Postgres.start(daemon, "new-pgdata", "new")
    writer = Writer(database)
    until(lambda: len(writer.acknowledged) > 3, "the writer does not begin")
    edited = Edited(_shown(daemon, "new-files") / "big", bytearray(), random.Random(6))
    with edited.path.open("rb") as stream:
        edited.model = bytearray(stream.read(4 << 20))  # so much is here
    assert not _whole(daemon, "new-pgdata")

    proxy.leave()
    began = time.monotonic()
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(database.sql(_ACCOUNTS)))
    reader.start()
    before = len(writer.acknowledged)
    while time.monotonic() < began + _AWAY_S:
        edited.edit()
        edited.read(edited.chosen.randrange(32))
        time.sleep(0.2)
    during = len(writer.acknowledged) - before
    assert not found, "it was all here"
    assert database.sql("SELECT 1") == "1"
    proxy.come_back()
    reader.join()
    writer.end()
    assert during > 10, "the writer stood still"
    assert found == [accounts]

    for volume in ("new-pgdata", "new-files"):
        daemon.laz("volume", "fill", "--start", volume)
        until(lambda volume=volume: _whole(daemon, volume), "the fill does not go on")  # type: ignore[misc]
    assert writer.lost() == set()
    assert database.sql(SUMS) == "t"
    database.check()
    until(lambda: "new-files" not in _fills(daemon), "it does not become ordinary")
    content = _content(daemon, "new-files")
    assert content[: len(edited.model)] == edited.model
    beginning = _content(daemon, "files")[: len(edited.model)]
    assert hashlib.md5(beginning + content[len(beginning) :]).hexdigest() == digest


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
@pytest.mark.timeout(300)
def test_what_is_not_here_fails_after_the_set_time_and_what_is_here_never(
    impatient: Daemon, s3_server: S3Server, s3_bucket: str, proxy: FaultProxy, silent: bool
) -> None:
    daemon = impatient
    _repository(daemon, s3_server, proxy, s3_bucket)
    _file(daemon, 24 << 20)
    daemon.laz("restore", "files@latest", "--as", "new", "--instant", "--rate", "1")
    content = _content(daemon, "files")
    edited = Edited(_shown(daemon, "new") / "big", bytearray(content), random.Random(7))
    edited.read(1)
    proxy.leave(silent=silent)
    began = time.monotonic()
    with pytest.raises(OSError) as failed:
        edited.read(150)
    took = time.monotonic() - began
    assert failed.value.errno == errno.EIO
    assert _PATIENCE_S - 2 < took < _PATIENCE_S + _SILENCE_S + 5
    edited.read(1)

    assert kill_programs(daemon.root, SERVERS) > 0
    until(lambda: _is_shown(edited), "it is not shown any more")
    edited.read(1)
    daemon.kill()
    daemon.start()
    edited.read(1)

    proxy.come_back()
    until(lambda: _is_shown(edited, 150), "it cannot be read again")
    daemon.laz("volume", "fill", "--start", "new")
    until(lambda: "new" not in _fills(daemon), "it does not become ordinary")
    assert _content(daemon, "new") == edited.model


def _is_shown(edited: Edited, block: int = 1) -> bool:
    try:
        edited.read(block)
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_database_of_a_full_volume_goes_on_or_stops_and_loses_nothing(
    daemon: Daemon, s3_server: S3Server, s3_bucket: str, proxy: FaultProxy
) -> None:
    _repository(daemon, s3_server, proxy, s3_bucket)
    daemon.laz("volume", "create", "-o", "size=400m", "pgdata")
    original = Postgres.run(daemon)
    assert original.pgbench("-i", "-q", "-s", "5").wait() == 0
    accounts = original.sql(_ACCOUNTS)
    original.sql("CHECKPOINT")  # else the restored one begins with a replay of all that
    daemon.laz("backup", "run", "pgdata")
    daemon.laz("restore", "pgdata@latest", "--as", "new", "--instant", "--rate", "200k")
    database = Postgres.start(daemon, "new", "new")
    writer = Writer(database)
    until(lambda: len(writer.acknowledged) > 3, "the writer does not begin")
    assert not _whole(daemon, "new")

    ballast = _shown(daemon, "new") / "ballast"
    _fill_up(ballast)
    daemon.laz("volume", "fill", "--start", "new")
    until(lambda: _fills(daemon)["new"]["error"], "the fill does not notice")
    for _ in range(5):
        _fill_up(ballast)  # whatever was let go of meanwhile
        assert _answer(database, _ACCOUNTS) in (accounts, None)
    ballast.unlink()
    daemon.laz("restart", database.name)
    database.wait()
    before = len(writer.acknowledged)
    until(lambda: len(writer.acknowledged) > before, "nothing can be written again")
    writer.end()
    assert database.sql(_ACCOUNTS) == accounts
    until(lambda: _whole(daemon, "new"), "the fill does not go on")
    assert writer.lost() == set()
    assert database.sql(SUMS) == "t"
    database.check()


def _fill_up(ballast: Path) -> None:
    """Take all the room there is."""
    with ballast.open("ab", buffering=0) as stream:
        for size in (1 << 20, 4096):
            with pytest.raises(OSError) as full:
                while True:
                    stream.write(bytes(size))
            assert full.value.errno in (errno.ENOSPC, errno.EDQUOT)

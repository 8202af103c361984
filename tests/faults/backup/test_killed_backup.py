"""Case A15: a backup killed at any moment loses nothing, and the next one goes on."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.repositories import bring_back
from tests.support.trees import describe

from lazarette.backup.repository import keys, prune
from lazarette.backup.repository.ingest import PACK_SIZE
from lazarette.backup.repository.repository import Repository
from lazarette.backup.stores.local import LocalStore
from lazarette.storage import process
from lazarette.storage.clock import SystemClock

KILLS = int(os.environ.get("LAZ_TEST_KILLS", "6"))
WORKER = Path(__file__).with_name("worker.py")
SIZE = 96 << 20


def _fill(source: Path, chance: random.Random) -> None:
    source.mkdir()
    for number in range(3):
        (source / f"big{number}").write_bytes(chance.randbytes(SIZE // 3))
    for number in range(400):
        below = source / f"d{number % 20}"
        below.mkdir(exist_ok=True)
        (below / f"f{number}").write_bytes(chance.randbytes(chance.randrange(20_000)))


def _start(arguments: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start the worker; returns it and the end of the pipe it writes to."""
    reading, writing = os.pipe()
    worker = process.spawn([sys.executable, str(WORKER), *arguments], stdout=writing, stderr=2)
    os.close(writing)
    assert os.read(reading, 6) == b"begin\n"
    return worker, reading


def _duration(folder: Path, source: Path) -> float:
    """Seconds a whole backup takes on this machine now: kills are to meet all of it."""
    folder.mkdir()
    (folder / "store").mkdir()
    store = LocalStore(str(folder / "store"))
    key = keys.KeyFile.generate()
    key.write(str(folder / "key"))
    Repository.create(store, keys.create(store, [key], clock=SystemClock()), SystemClock())
    names = [str(folder / name) for name in ("store", "cache", "key")]
    worker, pipe = _start([*names, str(source)])
    began = time.monotonic()
    worker.wait()
    taken = time.monotonic() - began
    assert os.read(pipe, 100)
    os.close(pipe)
    store.close()
    process.run(["rm", "-rf", str(folder)])
    return taken


@pytest.mark.timeout(max(300, 30 * KILLS))
def test_backup_killed_at_random_moments(tmp_path: Path) -> None:
    chance = random.Random(int.from_bytes(os.urandom(4), "little"))
    source = tmp_path / "source"
    _fill(source, chance)
    (tmp_path / "store").mkdir()
    store = LocalStore(str(tmp_path / "store"))
    key = keys.KeyFile.generate()
    key.write(str(tmp_path / "key"))
    clock = SystemClock()
    Repository.create(store, keys.create(store, [key], clock=clock), clock)
    arguments = [str(tmp_path / name) for name in ("store", "cache", "key", "source")]
    length = _duration(tmp_path / "rehearsal", source)
    snapshots = 0
    state = describe(source)
    for kill in range(KILLS):
        began = time.monotonic()
        worker, pipe = _start(arguments)
        time.sleep(chance.uniform(0, length))
        worker.kill()
        status = worker.wait()
        said = os.read(pipe, 100)
        os.close(pipe)
        if said:
            length = time.monotonic() - began
            assert kill >= 0
        repo = Repository.open(store, keys.unlock(store, key), clock)
        report = repo.check(1.0 if kill % 3 == 0 else 0.1)
        assert report.problems == [], f"after kill {kill} ({status})"
        found = repo.snapshots()
        assert len(found) in (snapshots, snapshots + 1) and (len(found) > snapshots) >= bool(said)
        fresh = len(found) > snapshots
        snapshots = len(found)
        if fresh:
            state = describe(source)
        if found:
            target = tmp_path / f"target{kill}"
            assert bring_back(repo, found[-1], target).damaged == ()
            assert describe(target) == state
            process.run(["rm", "-rf", str(target)])
        if fresh:
            (source / "d1" / "f1").write_bytes(chance.randbytes(9000))
            (source / "big0").write_bytes(chance.randbytes(SIZE // 3))
    worker, pipe = _start(arguments)
    worker.wait()
    assert os.read(pipe, 100)
    os.close(pipe)
    repo = Repository.open(store, keys.unlock(store, key), clock)
    prune.run(repo)
    assert repo.check(1.0).problems == []
    assert repo.check(0.0).unused_packs == []
    last = repo.snapshots()[-1]
    bring_back(repo, last, tmp_path / "last")
    assert describe(tmp_path / "last") == describe(source)
    store.close()


def test_next_run_sends_only_what_was_in_flight(tmp_path: Path) -> None:
    """Killed near its end, the rest is a few packs and not everything."""
    chance = random.Random(5)
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "big", "wb") as file:
        for _ in range(24):
            file.write(chance.randbytes(PACK_SIZE))
    (tmp_path / "store").mkdir()
    store = LocalStore(str(tmp_path / "store"))
    key = keys.KeyFile.generate()
    key.write(str(tmp_path / "key"))
    clock = SystemClock()
    Repository.create(store, keys.create(store, [key], clock=clock), clock)
    arguments = [str(tmp_path / name) for name in ("store", "cache", "key", "source")]
    worker, pipe = _start(arguments)
    packs = tmp_path / "store" / "packs"
    while sum(1 for path in packs.rglob("*") if path.is_file()) < 18 if packs.exists() else True:
        time.sleep(0.01)
    worker.kill()
    worker.wait()
    os.close(pipe)
    worker, pipe = _start(arguments)
    worker.wait()
    sent = int(os.read(pipe, 100))
    os.close(pipe)
    assert sent < 17 * PACK_SIZE
    store.close()

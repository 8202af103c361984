"""A copy that is refreshed while its source changes equals it after the last refresh."""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.volumes import snapshot_of

from lazarette.storage import beneath, copying
from lazarette.storage.pool import GIB, Pool, PoolFormat
from lazarette.storage.refresh import RefreshedCopy

ROUNDS = int(os.environ.get("LAZ_REFRESH_ROUNDS", "6"))


@pytest.fixture(params=list(PoolFormat), ids=lambda kind: kind.value)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    pool = Pool(tmp_path / "file", tmp_path / "disk", request.param, GIB)
    pool.open()
    try:
        yield pool.target
    finally:
        pool.close()


VERBS = (
    *("new", "new", "write", "write", "unlink", "rename", "link", "mkdir", "chmod"),
    *("xattr", "unxattr", "truncate", "symlink", "move", "map"),
)


def mutate(root: Path, rnd: random.Random, count: int) -> None:
    for _ in range(count):
        files = [Path(d) / f for d, _, names in os.walk(root) for f in names]
        folders = [Path(d) for d, _, _ in os.walk(root)]
        place = rnd.choice(folders) / f"n{rnd.randrange(30)}"
        file = rnd.choice(files) if files else place
        verb = rnd.choice(VERBS)
        try:
            if verb == "new":
                place.write_bytes(rnd.randbytes(rnd.choice([0, 100, 50_000])))
            elif verb == "write":
                with open(file, "r+b") as writing:
                    writing.seek(rnd.randrange(1 + file.stat().st_size))
                    writing.write(b"changed")
            elif verb == "unlink":
                file.unlink()
            elif verb == "rename":
                os.rename(file, place)
            elif verb == "link":
                os.link(file, place)
            elif verb == "mkdir":
                place.mkdir()
            elif verb == "chmod":
                file.chmod(rnd.choice([0o600, 0o644, 0o4755]))
            elif verb == "xattr":
                os.setxattr(rnd.choice([*files, *folders]), "user.k", rnd.randbytes(3))
            elif verb == "unxattr":
                os.removexattr(rnd.choice([*files, *folders]), "user.k")
            elif verb == "truncate":
                os.truncate(file, rnd.randrange(60_000))
            elif verb == "symlink":
                place.symlink_to("x")
            elif verb == "move" and len(folders) > 2:
                os.rename(rnd.choice(folders[1:]), place)
            elif verb == "map":
                with open(file, "r+b") as mapped, mmap.mmap(mapped.fileno(), 0) as memory:
                    memory[rnd.randrange(len(memory))] = rnd.randrange(256)
        except (OSError, ValueError):
            continue


def test_nothing_stays_of_what_vanishes_while_it_is_copied(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = disk / "source", disk / "target"
    source.mkdir()
    target.mkdir()
    for name in "ab":
        (source / name).write_text("x")
    read_xattrs = copying.read_xattrs

    def vanishing(parent: int, name: bytes) -> dict[str, bytes]:
        if name == b"b":
            (source / "b").unlink(missing_ok=True)
        return read_xattrs(parent, name)

    monkeypatch.setattr(copying, "read_xattrs", vanishing)
    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        RefreshedCopy(reading, writing).refresh()
        assert snapshot_of(target) == snapshot_of(source)


@pytest.mark.parametrize("seed", range(3))
def test_the_last_refresh_makes_the_copy_equal(disk: Path, seed: int) -> None:
    rnd = random.Random(seed)
    source, target = disk / "source", disk / "target"
    source.mkdir()
    target.mkdir()
    mutate(source, rnd, 60)
    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        copy = RefreshedCopy(reading, writing)
        for _ in range(ROUNDS):
            copy.refresh()
            mutate(source, rnd, rnd.choice([0, 1, 5, 20]))
        copy.refresh()
        assert snapshot_of(target) == snapshot_of(source)


def test_a_tree_that_changes_all_the_while_is_caught_at_the_end(disk: Path) -> None:
    source, target = disk / "source", disk / "target"
    source.mkdir()
    target.mkdir()
    mutate(source, random.Random(7), 60)
    stop = threading.Event()

    def work() -> None:
        rnd = random.Random(8)
        while not stop.is_set():
            mutate(source, rnd, 1)

    worker = threading.Thread(target=work)
    worker.start()
    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        copy = RefreshedCopy(reading, writing)
        try:
            for _ in range(ROUNDS):
                copy.refresh()
        finally:
            stop.set()
            worker.join()
        copy.refresh()
        assert snapshot_of(target) == snapshot_of(source)


def test_a_mapping_that_stays_writable_is_caught(disk: Path) -> None:
    source, target = disk / "source", disk / "target"
    source.mkdir()
    target.mkdir()
    (source / "f").write_bytes(bytes(50_000))
    with open(source / "f", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        with beneath.opened(source) as reading, beneath.opened(target) as writing:
            copy = RefreshedCopy(reading, writing)
            for number in range(1, 20):
                memory[number * 1000] = number
                copy.refresh()
                assert (target / "f").read_bytes() == (source / "f").read_bytes()


def test_what_did_not_change_is_not_copied_again(disk: Path) -> None:
    source, target = disk / "source", disk / "target"
    source.mkdir()
    target.mkdir()
    for number in range(20):
        (source / f"f{number}").write_text("x")
    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        copy = RefreshedCopy(reading, writing)
        assert copy.refresh() == 20
        threading.Event().wait(0.1)
        copy.refresh()
        assert copy.refresh() == 0

"""A copy that is refreshed while its source changes equals it after the last refresh."""

from __future__ import annotations

import mmap
import os
import random
import threading
from pathlib import Path

import pytest
from tests.support.volumes import mutate, snapshot_of

from lazarette.storage import beneath, copying, mounts
from lazarette.storage.errors import Cancelled
from lazarette.storage.refresh import RefreshedCopy, copy_tree

ROUNDS = int(os.environ.get("LAZ_REFRESH_ROUNDS", "6"))


def test_nothing_stays_of_what_vanishes_while_it_is_copied(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = disk / "source", disk / "target"
    source.mkdir()
    target.mkdir()
    for name in "ab":
        (source / name).write_text("x")
        os.setxattr(source / name, "user.k", b"v")
    read_xattrs = copying.read_xattrs

    def vanishing(parent: int, name: bytes) -> dict[str, bytes]:
        if name == b"b":
            (source / "b").unlink(missing_ok=True)
        return read_xattrs(parent, name)

    monkeypatch.setattr(copying, "read_xattrs", vanishing)
    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        RefreshedCopy(reading, writing).refresh()
        assert snapshot_of(target) == snapshot_of(source)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.timeout(max(300, 30 * ROUNDS))
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


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("seed", range(8, 14))
@pytest.mark.timeout(max(300, 30 * ROUNDS))
def test_a_tree_that_changes_all_the_while_is_caught_at_the_end(disk: Path, seed: int) -> None:
    source, target = disk / "source", disk / "target"
    source.mkdir()
    target.mkdir()
    mutate(source, random.Random(7), 60)
    stop = threading.Event()

    def work() -> None:
        rnd = random.Random(seed)
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


@pytest.mark.usefixtures("calls")
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


@pytest.mark.usefixtures("calls")
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


def _folders(disk: Path) -> tuple[Path, Path]:
    source, target = disk / "source", disk / "target"
    source.mkdir()
    target.mkdir()
    return source, target


def test_hard_links_hold_when_the_folder_of_one_moves(disk: Path) -> None:
    source, target = _folders(disk)
    for name in ("a", "z"):
        (source / name).mkdir()
    (source / "a/f").write_text("x")
    os.link(source / "a/f", source / "z/f")
    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        copy = RefreshedCopy(reading, writing)
        copy.refresh()
        threading.Event().wait(0.1)
        copy.refresh()
        for was, now in (("a", "b"), ("z", "c"), ("b", "y")):
            (source / was).rename(source / now)
            os.utime(source / now, ns=(1, 2))
            copy.refresh()
            assert snapshot_of(target) == snapshot_of(source)
            names = [path / "f" for path in target.iterdir()]
            assert len({name.stat().st_ino for name in names}) == 1


def test_hard_links_hold_when_one_is_removed(disk: Path) -> None:
    source, target = _folders(disk)
    (source / "a").write_text("x")
    (source / "folder").mkdir()
    for name in ("b", "c", "folder/d"):
        os.link(source / "a", source / name)
    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        copy = RefreshedCopy(reading, writing)
        copy.refresh()
        for name in ("a", "c", "b"):
            threading.Event().wait(0.1)
            copy.refresh()
            (source / name).unlink()
            copy.refresh()
            assert snapshot_of(target) == snapshot_of(source)


def test_a_file_that_lost_its_other_names_is_alone(disk: Path) -> None:
    source, target = _folders(disk)
    (source / "a").write_text("x")
    for name in "bc":
        os.link(source / "a", source / name)
    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        copy = RefreshedCopy(reading, writing)
        copy.refresh()
        for name in "bc":
            (source / name).unlink()
            (source / name).write_text("other")
            (source / "a").write_text(f"after {name}")
            copy.refresh()
            assert snapshot_of(target) == snapshot_of(source)


def test_a_mount_point_is_an_empty_folder_and_back(disk: Path) -> None:
    source, target = _folders(disk)
    (source / "m/deep").mkdir(parents=True)
    (source / "m/below").write_text("x")
    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        copy = RefreshedCopy(reading, writing)
        copy.refresh()
        mounts.mount("tmpfs", source / "m", [])
        try:
            (source / "m/foreign").touch()
            copy.refresh()
            assert list((target / "m").iterdir()) == []
        finally:
            mounts.unmount(source / "m")
        copy.refresh()
        assert snapshot_of(target) == snapshot_of(source)


def test_a_tree_deeper_than_a_path_is_long(disk: Path) -> None:
    source, target = _folders(disk)
    depth, name = 300, "d" * 100
    here = os.open(source, os.O_RDONLY)
    for number in range(depth):
        os.mkdir(name, dir_fd=here)
        deeper = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
        os.close(os.open(f"f{number}", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        copy = RefreshedCopy(reading, writing)
        assert copy.refresh() == 2 * depth
        last = os.open("last", os.O_CREAT | os.O_WRONLY, dir_fd=here)
        copy.refresh()
        paths = {entry.path for entry in beneath.walk(reading)}
        assert {entry.path for entry in beneath.walk(writing)} == paths
        assert any(path.endswith(b"/last") for path in paths)
    os.close(last)
    os.close(here)
    for path in (source, target):
        beneath.remove_path(path)


def test_a_copy_stops_when_asked(disk: Path) -> None:
    source, target = _folders(disk)
    for number in range(600):
        (source / f"f{number:03}").touch()
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        with pytest.raises(Cancelled):
            copy_tree(reading, writing, cancelled=cancelled)
    assert 0 < len(list(target.iterdir())) < 600


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("instead", ["nothing", "link", "folder"])
def test_what_is_no_copy_any_more_is_copied_anew(disk: Path, instead: str) -> None:
    """A file moved about during a refresh may have lost its copy, or have another thing there."""
    source, target = disk / "source", disk / "target"
    source.mkdir()
    target.mkdir()
    (source / "file").write_text("one")
    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        copy = RefreshedCopy(reading, writing)
        copy.refresh()
        (target / "file").unlink()
        if instead == "link":
            (target / "file").symlink_to("elsewhere")
        elif instead == "folder":
            (target / "file").mkdir()
        (source / "file").write_text("another")
        copy.refresh()
        assert snapshot_of(target) == snapshot_of(source)

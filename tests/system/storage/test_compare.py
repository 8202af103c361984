"""What differs between two states of a tree on a disk with reflinks."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.volumes import mutate, replay, snapshot_of

from lazarette.storage import beneath, native
from lazarette.storage.changes import ByteRange, Change, ChangeKind
from lazarette.storage.compare import by_extents, tree_changes
from lazarette.storage.refresh import copy_tree

pytestmark = pytest.mark.usefixtures("calls")


def _clone(source: Path, target: Path) -> Path:
    target.mkdir()
    with beneath.opened(source) as reading, beneath.opened(target) as writing:
        copy_tree(reading, writing)
    os.sync()
    return target


def _changes(base: Path, target: Path, *, reflinks: bool = True) -> list[Change]:
    with beneath.opened(base) as was, beneath.opened(target) as now:
        return list(tree_changes(was, now, by_extents, reflinks=reflinks))


def _unlike(base: Path, target: Path) -> list[bytes]:
    with beneath.opened(base) as was, beneath.opened(target) as now:
        return native.unlike_files(was, now, [b"f"])


@pytest.fixture
def source(disk: Path) -> Path:
    made = disk / "source"
    made.mkdir()
    (made / "f").write_bytes(os.urandom(200_000))
    os.utime(made / "f", ns=(1, 2))
    os.sync()
    return made


def _write(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"changed")


@pytest.mark.parametrize(
    "change",
    [
        lambda path: _write(path, 0),
        lambda path: _write(path, 199_990),
        lambda path: os.truncate(path, 199_999),
        lambda path: os.truncate(path, 300_000),
        lambda path: path.write_bytes(path.read_bytes()),
    ],
)
def test_other_content_is_seen_whatever_the_times(
    source: Path, disk: Path, change: Callable[[Path], object]
) -> None:
    base = _clone(source, disk / "base")
    assert _unlike(base, source) == []
    change(source / "f")
    os.utime(source / "f", ns=(1, 2))
    os.sync()
    assert _unlike(base, source) == _unlike(source, base) == [b"f"]


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.chmod(0o600),
        lambda path: os.chown(path, 1, 0),
        lambda path: os.chown(path, 0, 1),
        lambda path: os.utime(path, ns=(1, 3)),
        lambda path: os.setxattr(path, "user.k", b"v"),
        lambda path: os.link(path, path.with_name("other")),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to("f")),
    ],
)
def test_other_metadata_are_seen(
    source: Path, disk: Path, change: Callable[[Path], object]
) -> None:
    base = _clone(source, disk / "base")
    change(source / "f")
    assert _unlike(base, source) == _unlike(source, base) == [b"f"]


def test_only_what_changed_of_a_file_is_a_change(source: Path, disk: Path) -> None:
    base = _clone(source, disk / "base")
    _write(source / "f", 70_000)
    os.utime(source / "f", ns=(1, 2))
    target = _clone(source, disk / "target")
    assert _changes(base, target) == [
        Change(ChangeKind.MODIFIED, b"f", ranges=(ByteRange(69_632, 4096),))
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_quick_look_finds_the_same_changes(disk: Path, seed: int) -> None:
    rnd = random.Random(seed)
    source = disk / "tree"
    source.mkdir()
    mutate(source, rnd, 80)
    base = _clone(source, disk / "base")
    mutate(source, rnd, 10)
    target = _clone(source, disk / "target")
    found = _changes(base, target)
    assert found == _changes(base, target, reflinks=False)
    assert replay(snapshot_of(base), found, snapshot_of(target)) == snapshot_of(target)

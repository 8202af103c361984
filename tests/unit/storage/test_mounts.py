from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazarette.storage import mounts
from lazarette.storage.mounts import MountFailed
from lazarette.storage.syscalls import MountAttr


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    try:
        yield tmp_path
    finally:
        mounts.detach_beneath(tmp_path)


def _refused(path: Path) -> bool:
    try:
        path.touch()
    except OSError as refused:
        assert refused.errno == errno.EROFS
        return True
    return False


def test_mount_unmount_and_asking(place: Path) -> None:
    target = place / "m"
    target.mkdir()
    assert not mounts.is_mount_point(target)
    mounts.mount("tmpfs", target, {"size": "1m", "mode": "0700"})
    assert mounts.is_mount_point(target)
    assert [m.target for m in mounts.mounts_beneath(place)] == [os.fsencode(target)]
    mounts.unmount(target)
    mounts.unmount(target)
    assert not mounts.is_mount_point(target)


def test_a_bind_of_the_same_filesystem_is_a_mount_point(place: Path) -> None:
    (place / "a").mkdir()
    (place / "b").mkdir()
    mounts.bind(place / "a", place / "b")
    assert mounts.is_mount_point(place / "b")
    assert not mounts.is_mount_point(place / "a")
    assert not mounts.is_mount_point(place / "missing" / "deeper")


def test_a_refused_mount_says_why(place: Path) -> None:
    with pytest.raises(MountFailed, match="size"):
        mounts.mount("tmpfs", place, {"size": "nonsense"})
    with pytest.raises(MountFailed, match="No such device"):
        mounts.mount("nonsense", place, {})


def test_odd_names_are_read_back(place: Path) -> None:
    target = place / "a b\n\\t"
    target.mkdir()
    mounts.mount("tmpfs", target, {})
    assert os.fsencode(target) in [m.target for m in mounts.mounts()]


def _with_inner(place: Path) -> tuple[Path, Path]:
    source, target = place / "source", place / "target"
    (source / "sub").mkdir(parents=True)
    target.mkdir()
    mounts.mount("tmpfs", source / "sub", {})
    return source, target


def test_a_recursive_bind_takes_mounts_along(place: Path) -> None:
    source, target = _with_inner(place)
    (source / "sub" / "f").touch()
    mounts.bind(source, target)
    assert (target / "sub" / "f").exists()


def test_a_plain_bind_leaves_mounts_behind(place: Path) -> None:
    source, target = _with_inner(place)
    (source / "sub" / "f").touch()
    mounts.bind(source, target, recursive=False)
    assert not (target / "sub" / "f").exists()


def test_read_only_leaves_submounts_writable(place: Path) -> None:
    """Case A23, the old behaviour."""
    source, target = _with_inner(place)
    mounts.bind(source, target, read_only=True)
    assert _refused(target / "x")
    assert not _refused(target / "sub" / "x")
    assert not _refused(source / "x")


def test_recursive_read_only_covers_submounts(place: Path) -> None:
    """Case A23."""
    source, target = _with_inner(place)
    mounts.bind(source, target, recursive_read_only=True)
    assert _refused(target / "x")
    assert _refused(target / "sub" / "x")
    assert not _refused(source / "sub" / "x")


def test_move_and_change(place: Path) -> None:
    (place / "a").mkdir()
    (place / "b").mkdir()
    mounts.mount("tmpfs", place / "a", {})
    (place / "a" / "f").touch()
    mounts.move(place / "a", place / "b")
    assert (place / "b" / "f").exists()
    mounts.change(place / "b", add=MountAttr.READ_ONLY)
    assert _refused(place / "b" / "g")
    mounts.change(place / "b", remove=MountAttr.READ_ONLY)
    assert not _refused(place / "b" / "g")


def test_reconfigure_changes_a_mounted_filesystem(place: Path) -> None:
    mounts.mount("tmpfs", place, {"size": "1m"})
    mounts.reconfigure(place, [("size", "4m")])
    space = os.statvfs(place)
    assert space.f_blocks * space.f_frsize == 4 << 20
    mounts.unmount(place)


def test_unmounting_what_is_in_use_fails_unless_detached(place: Path) -> None:
    target = place / "m"
    target.mkdir()
    mounts.mount("tmpfs", target, {})
    with open(target / "held", "w") as held:
        with pytest.raises(MountFailed, match="busy"):
            mounts.unmount(target)
        mounts.unmount(target, detach=True)
        held.write("still works")


def test_a_descriptor_can_be_bound(place: Path) -> None:
    (place / "a").mkdir()
    (place / "b").mkdir()
    (place / "a" / "f").touch()
    folder = os.open(place / "a", os.O_PATH)
    try:
        mounts.bind(folder, place / "b")
    finally:
        os.close(folder)
    assert (place / "b" / "f").exists()


def test_who_is_just_letting_go_is_waited_for(place: Path) -> None:
    target = place / "m"
    target.mkdir()
    mounts.mount("tmpfs", target, {"size": "1m"})
    with open(target / "file", "w"):
        with pytest.raises(MountFailed, match="busy"):
            mounts.unmount(target)
        own = [each for each in mounts.users(target) if each.startswith(f"{os.getpid()} ")]
        assert len(own) == 1
        with pytest.raises(MountFailed, match="busy"):
            mounts.unmount(target, patience=0.05)
    assert mounts.users(target) == []
    late = open(target / "file")  # noqa: SIM115 - closed by the timer
    timer = threading.Timer(0.3, late.close)
    timer.start()
    mounts.unmount(target, patience=60)
    assert not mounts.is_mount_point(target)
    timer.join()

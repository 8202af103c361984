"""V2, V4, V5, V7, V8: snapshots, clones, rollback and changes, for every driver."""

from __future__ import annotations

import mmap
import os
import stat
import threading
from pathlib import Path

import pytest
from tests.support.volumes import Bench, LockGate, replay, snapshot_of

from lazarette.storage.changes import ChangeKind
from lazarette.storage.errors import (
    InUse,
    InvalidArgument,
    SnapshotNotFound,
    Unsupported,
    VolumeNotFound,
)
from lazarette.storage.volumes.contract import ChangeSource, OpenGate, SnapshotKind


def fill(root: Path) -> None:
    """One of everything."""
    (root / "dir").mkdir()
    (root / "dir" / "file").write_bytes(os.urandom(50_000))
    (root / "empty").touch()
    (root / "link").symlink_to("dir/file")
    (root / "dangling").symlink_to("/nowhere")
    os.link(root / "dir" / "file", root / "second name")
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (root / "setuid").write_text("#!/bin/true")
    os.chown(root / "setuid", 12, 34)
    (root / "setuid").chmod(0o6755)
    os.setxattr(root / "empty", "user.key", b"\x00value\xff")
    os.setxattr(
        root / "setuid", "security.capability", bytes.fromhex("0100000200040000" + "00" * 12)
    )
    with open(root / "sparse", "wb") as sparse:
        sparse.seek(5 << 20)
        sparse.write(b"end")
    (root / os.fsdecode(b"odd\xff\n")).write_text("odd")
    os.utime(root / "dir" / "file", ns=(1, 1_234_567_890_123_456_789))
    os.utime(root / "dir", ns=(1, 987_654_321))


def test_v1_snapshot_is_idempotent(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "f").write_text("one")
    first = volumes.driver.snapshot(name, "s1", OpenGate())
    (root / "f").write_text("two")
    assert volumes.driver.snapshot(name, "s1", OpenGate()) == first
    assert (volumes.driver.view(name, "s1") / "f").read_text() == "one"
    volumes.driver.release_view(name, "s1")


def test_v1_delete_snapshot_is_idempotent(volumes: Bench) -> None:
    name, _ = volumes.volume()
    volumes.driver.snapshot(name, "s1", OpenGate())
    volumes.driver.delete_snapshot(name, "s1")
    volumes.driver.delete_snapshot(name, "s1")
    volumes.driver.delete_snapshot(name, "never")
    assert list(volumes.driver.snapshots(name)) == []


def test_v2_a_snapshot_without_record_is_removed_by_recover(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "f").write_text("x")
    volumes.driver.snapshot(name, "kept", OpenGate())
    pool = volumes.root / "driver" / "pool"
    folder = (pool if pool.exists() else volumes.root / "driver") / "volumes" / name / "snapshots"
    (folder / "half").mkdir()
    (folder / "half" / "f").write_text("x")
    volumes.driver.recover()
    assert not (folder / "half").exists()
    assert [info.id for info in volumes.driver.snapshots(name)] == ["kept"]


def test_v2_a_killed_snapshot_can_be_taken_again(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "f").write_text("right")
    pool = volumes.root / "driver" / "pool"
    folder = (pool if pool.exists() else volumes.root / "driver") / "volumes" / name / "snapshots"
    (folder / "s1").mkdir()
    (folder / "s1" / "f").write_text("half")
    volumes.driver.snapshot(name, "s1", OpenGate())
    assert (volumes.driver.view(name, "s1") / "f").read_text() == "right"
    volumes.driver.release_view(name, "s1")


def test_v4_a_snapshot_keeps_everything(volumes: Bench) -> None:
    name, root = volumes.volume()
    fill(root)
    os.chown(root, 7, 8)
    root.chmod(0o750)
    before = snapshot_of(root)
    volumes.driver.snapshot(name, "s1", OpenGate())
    seen = snapshot_of(volumes.driver.view(name, "s1"))
    volumes.driver.release_view(name, "s1")
    assert seen == before


def test_v4_holes_stay_holes(volumes: Bench) -> None:
    name, root = volumes.volume()
    with open(root / "sparse", "wb") as sparse:
        sparse.truncate(40 << 20)
        sparse.seek(20 << 20)
        sparse.write(b"x" * 4096)
    os.sync()
    volumes.driver.snapshot(name, "s1", OpenGate())
    view = volumes.driver.view(name, "s1")
    status = (view / "sparse").stat()
    volumes.driver.release_view(name, "s1")
    assert status.st_size == 40 << 20
    assert status.st_blocks * 512 < 1 << 20


def test_v4_the_gate_is_closed_unless_snapshots_are_atomic(volumes: Bench) -> None:
    name, _ = volumes.volume()
    gate = LockGate()
    info = volumes.driver.snapshot(name, "s1", gate)
    assert gate.closed == gate.opened
    if info.kind is SnapshotKind.ATOMIC:
        assert gate.closed == 0
    else:
        assert gate.closed == 1
        assert info.kind is volumes.driver.capabilities.snapshot
    assert info.pause_ns > 0


def test_v4_the_gate_opens_again_after_a_failure(volumes: Bench) -> None:
    name, _ = volumes.volume()
    gate = LockGate()
    with pytest.raises(VolumeNotFound):
        volumes.driver.snapshot_group([name, "nowhere"], "s1", gate)
    assert gate.closed == gate.opened
    assert list(volumes.driver.snapshots(name)) == []


def test_v4_a_snapshot_under_writers_is_one_instant(volumes: Bench) -> None:
    name, root = volumes.volume()
    gate = LockGate()
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            with gate.lock:
                number += 1
                for file in ("a", "b"):
                    (root / file).write_text(str(number))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not (root / "b").exists():
            pass
        # for an atomic driver the pair is torn by the writer, never by the snapshot
        volumes.driver.snapshot_group([name], "s1", gate)
    finally:
        stop.set()
        writer.join()
    view = volumes.driver.view(name, "s1")
    assert (view / "a").read_text() == (view / "b").read_text()
    volumes.driver.release_view(name, "s1")


def test_v4_a_group_is_one_instant_over_all_volumes(volumes: Bench) -> None:
    (one, first), (two, second) = volumes.volume(), volumes.volume()
    gate = LockGate()
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            with gate.lock:
                number += 1
                (first / "n").write_text(str(number))
                (second / "n").write_text(str(number))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not (second / "n").exists():
            pass
        made = volumes.driver.snapshot_group([one, two], "g", gate)
    finally:
        stop.set()
        writer.join()
    seen = [(volumes.driver.view(name, "g") / "n").read_text() for name in (one, two)]
    for name in (one, two):
        volumes.driver.release_view(name, "g")
    assert seen[0] == seen[1]
    assert made[one].created_ns == made[two].created_ns
    assert gate.closed == gate.opened == 1


def test_v5_a_snapshot_never_changes(volumes: Bench) -> None:
    name, root = volumes.volume()
    fill(root)
    before = snapshot_of(root)
    volumes.driver.snapshot(name, "s1", OpenGate())
    (root / "dir" / "file").write_bytes(b"overwritten")
    with open(root / "sparse", "r+b") as file:
        file.write(b"in place")
    (root / "empty").unlink()
    os.rename(root / "dir", root / "renamed")
    (root / "setuid").chmod(0o600)
    seen = snapshot_of(volumes.driver.view(name, "s1"))
    volumes.driver.release_view(name, "s1")
    assert {p: n.content for p, n in seen.items()} == {p: n.content for p, n in before.items()}
    assert seen == before


def test_v5_a_view_is_read_only_for_root(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "f").write_text("x")
    volumes.driver.snapshot(name, "s1", OpenGate())
    view = volumes.driver.view(name, "s1")
    try:
        for attempt in (
            lambda: (view / "f").write_text("y"),
            lambda: (view / "new").touch(),
            lambda: (view / "f").unlink(),
            lambda: (view / "f").chmod(0o777),
        ):
            with pytest.raises(OSError, match="Read-only"):
                attempt()
    finally:
        volumes.driver.release_view(name, "s1")


def test_v5_a_view_can_be_taken_twice(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "f").write_text("x")
    volumes.driver.snapshot(name, "s1", OpenGate())
    view = volumes.driver.view(name, "s1")
    assert volumes.driver.view(name, "s1") == view
    volumes.driver.release_view(name, "s1")
    assert (view / "f").read_text() == "x"
    volumes.driver.release_view(name, "s1")


def test_snapshots_are_listed_oldest_first(volumes: Bench) -> None:
    name, _ = volumes.volume()
    for snapshot in ("zz", "aa", "mm"):
        volumes.driver.snapshot(name, snapshot, OpenGate())
    listed = list(volumes.driver.snapshots(name))
    assert [info.id for info in listed] == ["zz", "aa", "mm"]
    assert [info.created_ns for info in listed] == sorted(info.created_ns for info in listed)


def test_a_missing_snapshot_is_named_in_the_error(volumes: Bench) -> None:
    name, _ = volumes.volume()
    with pytest.raises(SnapshotNotFound, match="ghost"):
        volumes.driver.view(name, "ghost")


@pytest.mark.parametrize("bad", ["", "..", "a/b", ".hidden", "x.json", "a b", "-x"])
def test_a_bad_snapshot_id_is_refused(volumes: Bench, bad: str) -> None:
    name, _ = volumes.volume()
    with pytest.raises(InvalidArgument):
        volumes.driver.snapshot(name, bad, OpenGate())


def test_a_snapshot_survives_unmount_and_a_new_driver_object(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "f").write_text("x")
    made = volumes.driver.snapshot(name, "s1", OpenGate())
    volumes.driver.unmount(name)
    again = volumes.kind.make(volumes.root / "driver")
    again.recover()
    assert list(again.snapshots(name)) == [made]
    assert (again.view(name, "s1") / "f").read_text() == "x"
    again.release_view(name, "s1")


def test_remove_takes_the_snapshots_along(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "f").write_text("x")
    for snapshot in ("s1", "s2"):
        volumes.driver.snapshot(name, snapshot, OpenGate())
    volumes.driver.view(name, "s1")
    volumes.driver.release_view(name, "s1")
    volumes.driver.unmount(name)
    volumes.driver.remove(name)
    volumes.driver.create(name, volumes.options())
    assert list(volumes.driver.snapshots(name)) == []


# ---- clones


def _clones(volumes: Bench) -> bool:
    """Whether this driver clones; one that does not says so."""
    if volumes.driver.capabilities.clone:
        return True
    name, _ = volumes.volume()
    with pytest.raises(Unsupported):
        volumes.driver.clone(name, None, volumes.name())
    return False


def test_a_clone_starts_as_its_source_is(volumes: Bench) -> None:
    if not _clones(volumes):
        return
    name, root = volumes.volume()
    fill(root)
    os.chown(root, 7, 8)
    clone = volumes.name()
    volumes.driver.clone(name, None, clone)
    assert snapshot_of(volumes.driver.mount(clone)) == snapshot_of(root)


def test_a_clone_of_a_snapshot_starts_as_that(volumes: Bench) -> None:
    if not _clones(volumes):
        return
    name, root = volumes.volume()
    (root / "f").write_text("then")
    volumes.driver.snapshot(name, "s1", OpenGate())
    (root / "f").write_text("now")
    clone = volumes.name()
    volumes.driver.clone(name, "s1", clone)
    assert (volumes.driver.mount(clone) / "f").read_text() == "then"


def test_a_clone_and_its_source_are_independent(volumes: Bench) -> None:
    if not _clones(volumes):
        return
    name, root = volumes.volume()
    (root / "f").write_bytes(b"a" * 10_000)
    clone = volumes.name()
    volumes.driver.clone(name, None, clone)
    other = volumes.driver.mount(clone)
    with open(other / "f", "r+b") as file:
        file.write(b"b")
    with open(root / "f", "r+b") as file:
        file.seek(5000)
        file.write(b"c")
    assert (root / "f").read_bytes() == b"a" * 5000 + b"c" + b"a" * 4999
    assert (other / "f").read_bytes() == b"b" + b"a" * 9999
    volumes.driver.unmount(name)
    volumes.driver.remove(name)
    assert (other / "f").read_bytes() == b"b" + b"a" * 9999


def test_v1_clone_is_idempotent(volumes: Bench) -> None:
    if not _clones(volumes):
        return
    name, root = volumes.volume()
    (root / "f").write_text("x")
    clone = volumes.name()
    volumes.driver.clone(name, None, clone)
    (volumes.driver.mount(clone) / "g").write_text("y")
    volumes.driver.clone(name, None, clone)
    assert (volumes.driver.mount(clone) / "g").read_text() == "y"


def test_a_clone_of_a_missing_snapshot_leaves_nothing(volumes: Bench) -> None:
    if not _clones(volumes):
        return
    name, _ = volumes.volume()
    clone = volumes.name()
    with pytest.raises(SnapshotNotFound):
        volumes.driver.clone(name, "ghost", clone)
    assert not volumes.driver.exists(clone)


# ---- rollback


def _rolls_back(volumes: Bench) -> bool:
    if volumes.driver.capabilities.rollback:
        return True
    name, _ = volumes.volume()
    volumes.driver.snapshot(name, "s1", OpenGate())
    volumes.driver.unmount(name)
    with pytest.raises(Unsupported):
        volumes.driver.rollback(name, "s1")
    return False


def test_v7_rollback_sets_everything_back(volumes: Bench) -> None:
    if not _rolls_back(volumes):
        return
    name, root = volumes.volume()
    fill(root)
    root.chmod(0o700)
    before = snapshot_of(root)
    volumes.driver.snapshot(name, "s1", OpenGate())
    (root / "empty").unlink()
    (root / "new").write_text("x")
    root.chmod(0o777)
    volumes.driver.unmount(name)
    volumes.driver.rollback(name, "s1")
    assert snapshot_of(volumes.driver.mount(name)) == before


def test_v7_rollback_refuses_while_mounted(volumes: Bench) -> None:
    if not _rolls_back(volumes):
        return
    name, root = volumes.volume()
    volumes.driver.snapshot(name, "s1", OpenGate())
    (root / "f").write_text("x")
    with pytest.raises(InUse):
        volumes.driver.rollback(name, "s1")
    assert (root / "f").read_text() == "x"


def test_v7_rollback_keeps_the_snapshots(volumes: Bench) -> None:
    if not _rolls_back(volumes):
        return
    name, root = volumes.volume()
    (root / "f").write_text("one")
    volumes.driver.snapshot(name, "s1", OpenGate())
    (root / "f").write_text("two")
    volumes.driver.snapshot(name, "s2", OpenGate())
    volumes.driver.unmount(name)
    volumes.driver.rollback(name, "s1")
    volumes.driver.rollback(name, "s2")
    assert (volumes.driver.mount(name) / "f").read_text() == "two"
    assert [info.id for info in volumes.driver.snapshots(name)] == ["s1", "s2"]


def test_v7_rollback_to_a_missing_snapshot_changes_nothing(volumes: Bench) -> None:
    if not _rolls_back(volumes):
        return
    name, root = volumes.volume()
    (root / "f").write_text("x")
    volumes.driver.unmount(name)
    with pytest.raises(SnapshotNotFound):
        volumes.driver.rollback(name, "ghost")
    assert (volumes.driver.mount(name) / "f").read_text() == "x"


def test_v6_rollback_leaves_what_is_mounted_inside_alone(volumes: Bench, tmp_path: Path) -> None:
    from lazarette.storage import mounts

    if not _rolls_back(volumes):
        return
    name, root = volumes.volume()
    (root / "inner").mkdir()
    volumes.driver.snapshot(name, "s1", OpenGate())
    (tmp_path / "precious").write_text("still here")
    mounts.bind(tmp_path, root / "inner")
    volumes.driver.unmount(name)
    volumes.driver.rollback(name, "s1")
    mounts.detach_beneath(root)
    assert (tmp_path / "precious").read_text() == "still here"


# ---- changes


def _mutate(root: Path) -> None:
    with open(root / "dir" / "file", "r+b") as file:
        file.seek(20_000)
        file.write(b"changed in the middle")
    (root / "empty").unlink()
    os.rename(root / "dir", root / "moved")
    (root / "new").mkdir()
    (root / "new" / "inner").write_bytes(os.urandom(9000))
    (root / "setuid").chmod(0o700)
    (root / "link").unlink()
    (root / "link").symlink_to("elsewhere")
    os.truncate(root / "sparse", 1 << 20)
    (root / os.fsdecode(b"odd\xff\n")).unlink()
    (root / os.fsdecode(b"odd\xff\n")).mkdir()
    os.chown(root, 5, 6)


def test_v8_reading_only_what_changed_gives_the_target(volumes: Bench) -> None:
    name, root = volumes.volume()
    fill(root)
    volumes.driver.snapshot(name, "s1", OpenGate())
    _mutate(root)
    volumes.driver.snapshot(name, "s2", OpenGate())
    base = snapshot_of(volumes.driver.view(name, "s1"))
    target = snapshot_of(volumes.driver.view(name, "s2"))
    changes = list(volumes.driver.changes(name, "s1", "s2"))
    backwards = list(volumes.driver.changes(name, "s2", "s1"))
    for snapshot in ("s1", "s2"):
        volumes.driver.release_view(name, snapshot)
    built = replay(base, changes, target)
    assert {p: n.content for p, n in built.items()} == {p: n.content for p, n in target.items()}
    assert built == target
    assert replay(target, backwards, base) == base


def test_v8_nothing_changed_gives_no_content(volumes: Bench) -> None:
    name, root = volumes.volume()
    fill(root)
    volumes.driver.snapshot(name, "s1", OpenGate())
    volumes.driver.snapshot(name, "s2", OpenGate())
    assert not [c for c in volumes.driver.changes(name, "s1", "s2") if c.ranges != ()]


def test_v8_a_store_through_a_mapping_is_reported(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "mapped").write_bytes(bytes(100_000))
    with open(root / "mapped", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[1] = 1
        volumes.driver.snapshot(name, "s1", OpenGate())
        memory[70_000] = 7
        volumes.driver.snapshot(name, "s2", OpenGate())
        found = [c for c in volumes.driver.changes(name, "s1", "s2") if c.path == b"mapped"]
    assert len(found) == 1
    ranges = found[0].ranges
    assert ranges is None or any(r.offset <= 70_000 < r.end for r in ranges)


def test_v8_ranges_are_narrow(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "big").write_bytes(os.urandom(4 << 20))
    volumes.driver.snapshot(name, "s1", OpenGate())
    with open(root / "big", "r+b") as file:
        file.seek(1 << 20)
        file.write(b"x" * 4096)
    volumes.driver.snapshot(name, "s2", OpenGate())
    (change,) = [c for c in volumes.driver.changes(name, "s1", "s2") if c.path == b"big"]
    assert change.kind is ChangeKind.MODIFIED
    assert change.ranges is not None
    assert any(r.offset <= 1 << 20 and r.end >= (1 << 20) + 4096 for r in change.ranges)
    assert sum(r.length for r in change.ranges) <= 1 << 17


def test_v8_a_same_sized_file_with_old_times_is_reported(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "f").write_bytes(b"a" * 5000)
    os.utime(root / "f", ns=(1, 1))
    volumes.driver.snapshot(name, "s1", OpenGate())
    (root / "f").write_bytes(b"b" * 5000)
    os.utime(root / "f", ns=(1, 1))
    volumes.driver.snapshot(name, "s2", OpenGate())
    (change,) = [c for c in volumes.driver.changes(name, "s1", "s2") if c.path == b"f"]
    assert change.ranges != ()


def test_v8_changes_across_a_rollback_are_right(volumes: Bench) -> None:
    if not volumes.driver.capabilities.rollback:
        return
    name, root = volumes.volume()
    (root / "f").write_bytes(b"a" * 50_000)
    volumes.driver.snapshot(name, "s1", OpenGate())
    (root / "f").write_bytes(b"b" * 50_000)
    (root / "g").write_text("late")
    volumes.driver.snapshot(name, "s2", OpenGate())
    volumes.driver.unmount(name)
    volumes.driver.rollback(name, "s1")
    root = volumes.driver.mount(name)
    (root / "h").write_text("after")
    volumes.driver.snapshot(name, "s3", OpenGate())
    base = snapshot_of(volumes.driver.view(name, "s2"))
    target = snapshot_of(volumes.driver.view(name, "s3"))
    changes = list(volumes.driver.changes(name, "s2", "s3"))
    for snapshot in ("s2", "s3"):
        volumes.driver.release_view(name, snapshot)
    built = replay(base, changes, target)
    assert {p: n.content for p, n in built.items()} == {p: n.content for p, n in target.items()}


def test_v8_a_missing_snapshot_is_an_error_before_any_change(volumes: Bench) -> None:
    name, _ = volumes.volume()
    volumes.driver.snapshot(name, "s1", OpenGate())
    with pytest.raises(SnapshotNotFound):
        list(volumes.driver.changes(name, "s1", "ghost"))


def test_capabilities_say_how_changes_are_found(volumes: Bench) -> None:
    assert volumes.driver.capabilities.changes is not ChangeSource.NONE

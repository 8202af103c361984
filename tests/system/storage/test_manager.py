"""Named volumes over real drivers."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.managers import DRIVERS, Host
from tests.support.volumes import LockGate, snapshot_of

from lazarette.storage import mounts
from lazarette.storage.clock import SystemClock
from lazarette.storage.errors import (
    Conflict,
    InUse,
    InvalidArgument,
    NameTaken,
    NoSpace,
    NotFound,
    SourceMissing,
    Unsupported,
    VolumeNotFound,
)
from lazarette.storage.volumes.contract import OpenGate
from lazarette.storage.volumes.manager import ANONYMOUS_LABEL, VolumeManager, WrongDriver

# ---- names and creation (case A24)


@pytest.mark.parametrize(
    "name", ["/test", "..", ".hidden", "a/b", "ünïcode", "x" * 256, "-ab", "a b"]
)
def test_a_bad_name_is_refused(host: Host, name: str) -> None:
    with pytest.raises(InvalidArgument):
        host.manager.create(name)
    assert host.manager.list() == []


def test_a_name_of_one_character_is_too_short(host: Host) -> None:
    with pytest.raises(InvalidArgument, match="too short"):
        host.manager.create("a")


@pytest.mark.parametrize("name", ["ab", "A_b.c-9", "0x", "x" * 255])
def test_a_good_name_is_taken(host: Host, name: str) -> None:
    assert host.manager.create(name).name == name


@pytest.mark.parametrize("none", [None, ""])
def test_no_name_makes_an_anonymous_volume(host: Host, none: str | None) -> None:
    volume = host.manager.create(none, labels={"k": "v"})
    assert len(volume.name) == 64
    assert set(volume.name) <= set("0123456789abcdef")
    assert volume.anonymous
    assert volume.labels == {"k": "v", ANONYMOUS_LABEL: ""}


def test_create_is_idempotent_for_the_same_driver_and_options(host: Host) -> None:
    first = host.manager.create("data", "btrfs", {"size": "100m"}, {"a": "b"})
    assert host.manager.create("data", "btrfs", {"size": "100m"}) == first
    assert host.manager.create("data") == first


def test_create_with_another_driver_or_options_is_a_conflict(host: Host) -> None:
    host.manager.create("data", "btrfs", {"size": "100m"})
    with pytest.raises(WrongDriver, match="btrfs") as refused:
        host.manager.create("data", "tmpfs")
    assert refused.value.http_status == 409
    with pytest.raises(WrongDriver):
        host.manager.create("data", "btrfs", {"size": "200m"})
    with pytest.raises(WrongDriver):
        host.manager.create("data", "of-nobody")


def test_a_volume_nobody_has_used_moves_to_the_driver_that_suits(host: Host) -> None:
    host.manager.create("data", labels={"a": "b"})
    made = host.manager.create("data", suited="overlay")
    assert (made.driver, made.labels) == ("overlay", {"a": "b"})
    assert "data" not in host.drivers["tmpfs"].names()
    assert host.manager.create("data", suited="btrfs").driver == "overlay", "it is decided"
    assert host.manager.create("new", suited="overlay").driver == "overlay"
    assert host.manager.create("new2", "bind", suited="overlay").driver == "bind"
    assert host.manager.create("new3", options={"size": "1m"}, suited="btrfs").driver == "tmpfs"
    local = host.manager.create("new4", "local")
    assert host.manager.create("new4", "local", suited="btrfs").driver == "btrfs" != local.driver
    with pytest.raises(WrongDriver):
        host.manager.create("new4", "tmpfs", suited="overlay")


def _mounted_once(host: Host) -> None:
    host.manager.mount("data", "user")
    host.manager.unmount("data", "user")


def _owned(host: Host) -> None:
    with host.manager._reachable("data") as root:
        os.chown(root, 5, 5)


def _filled(host: Host) -> None:
    with host.manager._reachable("data") as root:
        (root / "f").touch()


UNFIT: dict[str, Callable[[Host], object]] = {
    "in use": lambda host: host.manager.mount("data", "user"),
    "used": _mounted_once,
    "with a snapshot": lambda host: host.manager.snapshot(["data"], OpenGate(), "s1"),
    "with an owner": _owned,
    "with content": _filled,
    "being filled": lambda host: host.manager.redirect("data", host.root),
    "reserved": lambda host: host.manager.reserve("data", "job", "a restore"),
}


@pytest.mark.parametrize("state", UNFIT)
def test_a_volume_that_somebody_would_miss_does_not_move(host: Host, state: str) -> None:
    host.manager = VolumeManager(host.state, host.drivers, SystemClock(), "btrfs")
    host.manager.create("data")
    UNFIT[state](host)
    assert host.manager.create("data", suited="overlay").driver == "btrfs"
    assert "data" in host.drivers["btrfs"].names()
    assert "data" not in host.drivers["overlay"].names()
    host.manager.unmount("data", "user")


def test_a_volume_stays_where_the_other_driver_cannot_have_it(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host.manager.create("data")

    def refuse(name: str, options: object) -> None:
        raise NoSpace("no space for a pool")

    monkeypatch.setattr(host.drivers["overlay"], "create", refuse)
    assert host.manager.create("data", suited="overlay").driver == "tmpfs"
    assert "no space for a pool" in caplog.text
    with host.manager._reachable("data") as root:
        assert list(root.iterdir()) == []


def test_an_unknown_driver_is_refused_with_the_list(host: Host) -> None:
    with pytest.raises(NotFound, match="nonsense") as refused:
        host.manager.create("data", "nonsense")
    assert "btrfs" in refused.value.hint


def test_options_of_the_local_driver_choose_the_kind(host: Host, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    bound = host.manager.create(
        "bound", "local", {"type": "none", "o": "bind", "device": str(tmp_path / "host")}
    )
    assert bound.driver == "bind"
    assert bound.mountpoint == tmp_path / "host"
    memory = host.manager.create(
        "memory", "", {"type": "tmpfs", "device": "tmpfs", "o": "size=8m,uid=33,mode=1770"}
    )
    assert memory.driver == "tmpfs"
    status = memory.mountpoint.stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (33, 0o1770)
    with pytest.raises(Unsupported, match="nfs"):
        host.manager.create("net", "local", {"type": "nfs", "device": ":/x", "o": "addr=x"})
    assert host.manager.create("bound", "local") == bound


def test_a_failed_create_leaves_nothing(host: Host) -> None:
    with pytest.raises(InvalidArgument):
        host.manager.create("data", "btrfs", {"size": "nonsense"})
    assert host.manager.list() == []
    host.restart()
    assert host.manager.list() == []


def test_two_callers_create_one_volume(host: Host) -> None:
    made: list[object] = []
    threads = [
        threading.Thread(target=lambda: made.append(host.manager.create("one", "btrfs")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(map(repr, made))) == 1


# ---- users (case A35)


def test_users_are_counted_by_id(host: Host) -> None:
    host.manager.create("shared", "tmpfs")
    root = host.manager.mount("shared", "one")
    host.manager.mount("shared", "one")
    host.manager.mount("shared", "two")
    assert host.manager.users("shared") == ("one", "two")
    host.manager.unmount("shared", "one")
    (root / "f").write_text("still mounted")
    with pytest.raises(InUse, match="two"):
        host.manager.remove("shared")
    with pytest.raises(InUse):
        host.manager.remove("shared", force=True)
    host.manager.unmount("shared", "one")
    assert host.manager.users("shared") == ("two",)
    host.manager.unmount("shared", "two")
    host.manager.remove("shared")


def test_users_outlive_a_restart(host: Host) -> None:
    host.manager.create("shared", "btrfs")
    host.manager.mount("shared", "one")
    host.restart()
    assert host.manager.users("shared") == ("one",)
    with pytest.raises(InUse):
        host.manager.rollback("shared", "any")
    host.manager.unmount("shared", "one")
    host.manager.remove("shared")


def test_unmounting_a_removed_volume_does_nothing(host: Host) -> None:
    host.manager.unmount("never", "one")
    assert host.manager.list() == []


def test_a_mount_that_fails_counts_nobody(host: Host, tmp_path: Path) -> None:
    """Case A36."""
    (tmp_path / "host").mkdir()
    host.manager.create("bound", "bind", {"device": str(tmp_path / "host")})
    (tmp_path / "host").rmdir()
    with pytest.raises(SourceMissing):
        host.manager.mount("bound", "one")
    assert host.manager.users("bound") == ()
    with pytest.raises(SourceMissing):
        host.manager.snapshot(["bound"], OpenGate())
    assert list(host.manager.snapshots("bound")) == []


def test_memory_lost_by_a_restart_of_the_host_counts_as_missing(host: Host) -> None:
    """Case A36."""
    volume = host.manager.create("memory", "tmpfs")
    (volume.mountpoint / "f").write_text("x")
    mounts.unmount(volume.mountpoint, detach=True)
    host.restart()
    with pytest.raises(SourceMissing):
        host.manager.snapshot(["memory"], OpenGate())
    host.manager.mount("memory", "one")
    assert host.manager.snapshot(["memory"], OpenGate())
    host.manager.unmount("memory", "one")


# ---- verbs


@pytest.mark.parametrize("driver", DRIVERS)
def test_remove_and_missing_volumes(host: Host, driver: str) -> None:
    host.manager.create("data", driver)
    host.manager.remove("data")
    with pytest.raises(VolumeNotFound):
        host.manager.remove("data")
    host.manager.remove("data", force=True)


@pytest.mark.parametrize("driver", DRIVERS)
def test_rename_keeps_users_and_content(host: Host, driver: str) -> None:
    host.manager.create("old", driver, labels={"k": "v"})
    root = host.manager.mount("old", "one")
    (root / "f").write_text("x")
    renamed = host.manager.rename("old", "new")
    assert renamed.users == ("one",)
    assert renamed.labels == {"k": "v"}
    assert (renamed.mountpoint / "f").read_text() == "x"
    host.manager.create("other", driver)
    with pytest.raises(NameTaken):
        host.manager.rename("new", "other")
    host.manager.unmount("new", "one")


def test_an_anonymous_volume_that_is_renamed_is_kept_by_prune(host: Host) -> None:
    host.manager.rename(host.manager.create(None).name, "named")
    assert host.manager.prune().names == ()


def test_prune_removes_unused_anonymous_volumes(host: Host) -> None:
    named = host.manager.create("named", "btrfs").name
    unused = host.manager.create(None, "btrfs")
    used = host.manager.create(None, "btrfs").name
    kept = host.manager.create(None, "btrfs").name
    (unused.mountpoint / "f").write_bytes(bytes(1 << 20))
    os.sync()
    host.manager.mount(used, "one")
    assert host.manager.prune([kept], dry_run=True).names == (unused.name,)
    pruned = host.manager.prune([kept])
    assert pruned.names == (unused.name,)
    assert pruned.reclaimed >= 1 << 20
    assert host.manager.prune([kept], all_volumes=True).names == (named,)
    assert {v.name for v in host.manager.list()} == {used, kept}
    host.manager.unmount(used, "one")


def test_prune_leaves_foreign_data_alone(host: Host, tmp_path: Path) -> None:
    """Case A22."""
    volume = host.manager.create(None, "btrfs")
    (tmp_path / "important").mkdir()
    (tmp_path / "important" / "f").write_text("still here")
    (volume.mountpoint / "inner").mkdir()
    mounts.bind(tmp_path / "important", volume.mountpoint / "inner")
    host.manager.prune()
    assert (tmp_path / "important" / "f").read_text() == "still here"
    assert host.manager.list() == []


def test_labels_can_be_replaced(host: Host) -> None:
    host.manager.create("data", labels={"a": "1"})
    assert host.manager.set_labels("data", {"b": "2"}).labels == {"b": "2"}


# ---- snapshots over drivers


def test_a_group_over_all_drivers_is_one_instant(host: Host) -> None:
    roots = [
        host.manager.mount(host.manager.create(f"on-{driver}", driver).name, "u")
        for driver in DRIVERS
    ]
    names = [f"on-{driver}" for driver in DRIVERS]
    gate = LockGate()
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            with gate.lock:
                number += 1
                for root in roots:
                    (root / "n").write_text(str(number))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not (roots[-1] / "n").exists():
            pass
        made = host.manager.snapshot(names, gate, "group")
    finally:
        stop.set()
        writer.join()
    assert gate.closed == gate.opened == 1
    assert len({info.pause_ns for info in made.values()}) == 1
    seen = {(host.manager.view(name, "group") / "n").read_text() for name in names}
    for name in names:
        host.manager.release_view(name, "group")
        host.manager.unmount(name, "u")
    assert len(seen) == 1


def test_a_group_that_fails_leaves_no_snapshot(host: Host, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    host.manager.create("good", "btrfs")
    host.manager.create("bad", "bind", {"device": str(tmp_path / "host")})
    (tmp_path / "host").rmdir()
    gate = LockGate()
    with pytest.raises(SourceMissing):
        host.manager.snapshot(["good", "bad"], gate, "group")
    assert gate.closed == gate.opened
    assert list(host.manager.snapshots("good")) == []


def test_rollback_takes_a_safety_snapshot(host: Host) -> None:
    volume = host.manager.create("data", "btrfs")
    (volume.mountpoint / "f").write_text("one")
    host.manager.snapshot(["data"], OpenGate(), "s1")
    (volume.mountpoint / "f").write_text("two")
    safety = host.manager.rollback("data", "s1")
    assert (volume.mountpoint / "f").read_text() == "one"
    assert (host.manager.view("data", safety) / "f").read_text() == "two"
    host.manager.rollback("data", safety)
    assert (volume.mountpoint / "f").read_text() == "two"


def test_rollback_of_a_bind_volume_is_refused(host: Host) -> None:
    host.manager.create("data", "bind")
    host.manager.snapshot(["data"], OpenGate(), "s1")
    with pytest.raises(Unsupported):
        host.manager.rollback("data", "s1")


@pytest.mark.parametrize("source", DRIVERS)
@pytest.mark.parametrize("target", ["", "btrfs", "tmpfs"])
def test_clones_go_into_any_driver(host: Host, source: str, target: str) -> None:
    volume = host.manager.create("data", source)
    (volume.mountpoint / "f").write_text("then")
    os.chown(volume.mountpoint, 5, 6)
    os.setxattr(volume.mountpoint / "f", "user.k", b"v")
    host.manager.snapshot(["data"], OpenGate(), "s1")
    want = snapshot_of(volume.mountpoint)
    (volume.mountpoint / "f").write_text("now")
    clone = host.manager.clone("data", "s1", "copy", {"of": "data"}, target)
    assert snapshot_of(clone.mountpoint) == want
    assert clone.labels == {"of": "data"}
    with pytest.raises(NameTaken):
        host.manager.clone("data", None, "copy")


# ---- whole contents (case A20)


def image_folder(path: Path) -> Path:
    """As in case A20."""
    folder = path / "image-data"
    folder.mkdir()
    (folder / "file").write_text("content")
    (folder / "dangling").symlink_to("/nowhere")
    (folder / "one").write_text("linked")
    os.link(folder / "one", folder / "two")
    (folder / "suid").write_text("x")
    os.chown(folder / "suid", 9, 9)
    (folder / "suid").chmod(0o4755)
    os.mkfifo(folder / "fifo")
    os.setxattr(folder / "file", "user.k", b"v")
    os.chown(folder, 1000, 1000)
    folder.chmod(0o770)
    return folder


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_empty_volume_takes_everything_of_the_image(
    host: Host, driver: str, tmp_path: Path
) -> None:
    folder = image_folder(tmp_path)
    volume = host.manager.create("data", driver)
    assert host.manager.populate("data", folder)
    assert snapshot_of(volume.mountpoint) == snapshot_of(folder)


def test_a_volume_with_content_is_left_alone(host: Host, tmp_path: Path) -> None:
    volume = host.manager.create("data", "btrfs")
    (volume.mountpoint / "own").write_text("x")
    assert not host.manager.populate("data", image_folder(tmp_path))
    assert os.listdir(volume.mountpoint) == ["own"]


def test_two_containers_racing_both_see_everything(host: Host, tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    for number in range(300):
        (folder / f"many{number}").write_text("x")
    volume = host.manager.create("data", "btrfs")
    seen: list[int] = []

    def first_use(user: str) -> None:
        host.manager.mount("data", user)
        host.manager.populate("data", folder)
        seen.append(len(os.listdir(volume.mountpoint)))
        host.manager.unmount("data", user)

    threads = [threading.Thread(target=first_use, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [len(os.listdir(folder))] * 4


def test_a_volume_goes_out_and_in_as_a_tar(host: Host, tmp_path: Path) -> None:
    volume = host.manager.create("data", "btrfs")
    host.manager.populate("data", image_folder(tmp_path))
    out = io.BytesIO()
    host.manager.export("data", out)
    assert list(host.manager.snapshots("data")) == []
    for driver in DRIVERS:
        target = host.manager.create(f"into-{driver}", driver)
        host.manager.import_(target.name, io.BytesIO(out.getvalue()))
        assert snapshot_of(target.mountpoint) == snapshot_of(volume.mountpoint)
    with pytest.raises(Conflict):
        host.manager.import_("data", io.BytesIO(out.getvalue()))


def test_a_hostile_or_broken_tar_leaves_the_volume_empty(host: Host) -> None:
    volume = host.manager.create("data", "btrfs")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        good = tarfile.TarInfo("good")
        tar.addfile(good)
        tar.addfile(tarfile.TarInfo("../evil"))
    for data in (out.getvalue(), b"garbage" * 500):
        with pytest.raises(InvalidArgument):
            host.manager.import_("data", io.BytesIO(data))
        assert os.listdir(volume.mountpoint) == []
    assert not (volume.mountpoint.parent / "evil").exists()


def test_wh_names_are_plain_names_in_a_volume(host: Host) -> None:
    volume = host.manager.create("data", "btrfs")
    (volume.mountpoint / ".wh.file").write_text("plain")
    out = io.BytesIO()
    host.manager.export("data", out)
    host.manager.create("copy", "btrfs")
    host.manager.import_("copy", io.BytesIO(out.getvalue()))
    assert (host.manager.get("copy").mountpoint / ".wh.file").read_text() == "plain"

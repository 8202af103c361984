"""V1-V3, V6, V10, V11: volumes as such.  Runs for every driver and option set."""

from __future__ import annotations

import os
import secrets
import stat
import threading
from pathlib import Path

import pytest
from tests.support.volumes import Bench, snapshot_of

from lazarette.storage import mounts
from lazarette.storage.errors import (
    InvalidArgument,
    NameTaken,
    VolumeNotFound,
)


def test_v1_create_is_idempotent(volumes: Bench) -> None:
    name, options = volumes.name(), volumes.options()
    volumes.driver.create(name, options)
    root = volumes.driver.mount(name)
    (root / "kept").write_text("yes")
    volumes.driver.create(name, options)
    assert (root / "kept").read_text() == "yes"


def test_v1_remove_is_idempotent(volumes: Bench) -> None:
    name, _ = volumes.volume()
    volumes.driver.unmount(name)
    volumes.driver.remove(name)
    volumes.driver.remove(name)
    assert not volumes.driver.exists(name)


def test_v1_rename_is_idempotent(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "f").write_text("x")
    new = volumes.name()
    volumes.driver.rename(name, new)
    volumes.driver.rename(name, new)
    assert (volumes.driver.mount(new) / "f").read_text() == "x"


def test_v1_callers_on_different_volumes_do_not_disturb_each_other(volumes: Bench) -> None:
    names = [volumes.name() for _ in range(6)]
    options = [volumes.options() for _ in names]
    failures: list[BaseException] = []

    def work(name: str, chosen: dict[str, str]) -> None:
        try:
            volumes.driver.create(name, chosen)
            (volumes.driver.mount(name) / "own").write_text(name)
            volumes.driver.unmount(name)
        except BaseException as failed:  # noqa: BLE001 - shown by the assertion below
            failures.append(failed)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(names, options, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for name in names:
        assert (volumes.driver.mount(name) / "own").read_text() == name


def test_exists_and_names_tell_what_is_there(volumes: Bench) -> None:
    name = volumes.name()
    assert not volumes.driver.exists(name)
    volumes.driver.create(name, volumes.options())
    assert volumes.driver.exists(name)
    assert name in volumes.driver.names()
    assert volumes.driver.names() == sorted(volumes.driver.names())


def test_a_missing_volume_is_named_in_the_error(volumes: Bench) -> None:
    with pytest.raises(VolumeNotFound, match="nowhere"):
        volumes.driver.mount("nowhere")
    with pytest.raises(VolumeNotFound):
        volumes.driver.usage("nowhere")
    with pytest.raises(VolumeNotFound):
        volumes.driver.snapshots("nowhere")


def test_v2_leftovers_of_a_killed_create_are_removed(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "f").write_text("x")
    staging = _staging(volumes)
    (staging / "half" / "data").mkdir(parents=True)
    (staging / "half" / "data" / "f").write_text("x")
    volumes.driver.recover()
    assert not (staging / "half").exists()
    assert (volumes.driver.location(name) / "f").read_text() == "x"


def _staging(volumes: Bench) -> Path:
    pool = volumes.root / "driver" / "pool"
    return (pool if pool.exists() else volumes.root / "driver") / "staging"


def test_v3_the_root_keeps_its_own_metadata(volumes: Bench) -> None:
    name, root = volumes.volume()
    os.chown(root, 999, 998)
    root.chmod(0o2770)
    os.setxattr(root, "user.mark", b"\x00\xff")
    os.utime(root, ns=(1_000_000_001, 1_000_000_002))
    before = snapshot_of(root)[b""]
    volumes.driver.unmount(name)
    assert snapshot_of(volumes.driver.mount(name))[b""] == before


def test_v3_mounting_twice_gives_the_same_place(volumes: Bench) -> None:
    name, root = volumes.volume()
    assert volumes.driver.mount(name) == root
    assert volumes.driver.location(name) == root


def test_v3_a_fresh_volume_is_empty_and_open_to_read(volumes: Bench) -> None:
    _, root = volumes.volume()
    assert os.listdir(root) == []
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


def test_content_outlives_unmounting(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "f").write_bytes(b"x" * 100_000)
    volumes.driver.unmount(name)
    assert (volumes.driver.mount(name) / "f").stat().st_size == 100_000


def test_v6_remove_leaves_what_is_mounted_inside_alone(volumes: Bench, tmp_path: Path) -> None:
    """Case A22."""
    name, root = volumes.volume()
    foreign = tmp_path / "importantdata"
    foreign.mkdir()
    (foreign / "precious").write_text("still here")
    (root / "importantdata").mkdir()
    mounts.bind(foreign, root / "importantdata")
    volumes.driver.unmount(name)
    volumes.driver.remove(name)
    mounts.detach_beneath(root)
    assert (foreign / "precious").read_text() == "still here"
    assert not volumes.driver.exists(name)


def test_v6_remove_follows_no_symlink(volumes: Bench, tmp_path: Path) -> None:
    name, root = volumes.volume()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "f").write_text("x")
    (root / "link").symlink_to(tmp_path / "outside")
    volumes.driver.unmount(name)
    volumes.driver.remove(name)
    assert (tmp_path / "outside" / "f").read_text() == "x"


def test_v6_remove_survives_open_files(volumes: Bench) -> None:
    name, root = volumes.volume()
    with open(root / "open", "wb") as held:
        held.write(b"x" * 10)
        volumes.driver.unmount(name)
        volumes.driver.remove(name)
        assert not volumes.driver.exists(name)
        held.write(b"y")


def test_v6_remove_takes_a_path_longer_than_the_kernel_does(volumes: Bench) -> None:
    name, root = volumes.volume()
    here = os.open(root, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=here)
        deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    volumes.driver.unmount(name)
    volumes.driver.remove(name)
    assert not volumes.driver.exists(name)


def test_v6_remove_takes_odd_names(volumes: Bench) -> None:
    name, root = volumes.volume()
    for odd in (b"a\nb", b"\xff\xfe", b"-rf", b"..\\x", b" ", b"x" * 255):
        (root / os.fsdecode(odd)).write_text("x")
    volumes.driver.unmount(name)
    volumes.driver.remove(name)
    assert not volumes.driver.exists(name)


def test_v10_an_unknown_option_is_refused_with_the_valid_ones(volumes: Bench) -> None:
    with pytest.raises(InvalidArgument, match="nonsense") as refused:
        volumes.driver.create(volumes.name(), {"nonsense": "1"})
    for valid in volumes.driver.capabilities.options:
        assert valid in refused.value.hint


def test_v10_a_refused_volume_is_not_there(volumes: Bench) -> None:
    name = volumes.name()
    with pytest.raises(InvalidArgument):
        volumes.driver.create(name, {"nonsense": "1"})
    assert not volumes.driver.exists(name)


def test_v10_encryption_is_refused_clearly(volumes: Bench) -> None:
    with pytest.raises(InvalidArgument, match="encryption"):
        volumes.driver.create(volumes.name(), {"encryption": "true"})


@pytest.mark.parametrize("size", ["", "0", "-1", "10x", "many"])
def test_v10_a_bad_size_is_refused(volumes: Bench, size: str) -> None:
    if "size" not in volumes.driver.capabilities.options:
        with pytest.raises(InvalidArgument, match="size"):
            volumes.driver.create(volumes.name(), {"size": "1g"})
        return
    with pytest.raises(InvalidArgument):
        volumes.driver.create(volumes.name(), {"size": size})


def test_v11_another_driver_object_finds_the_volumes(volumes: Bench) -> None:
    name, root = volumes.volume()
    (root / "f").write_text("x")
    again = volumes.kind.make(volumes.root / "driver")
    again.recover()
    try:
        assert (again.mount(name) / "f").read_text() == "x"
        assert name in again.names()
    finally:
        again.unmount(name)


def test_rename_keeps_content_snapshots_and_open_files(volumes: Bench) -> None:
    from lazarette.storage.volumes.contract import OpenGate

    name, root = volumes.volume()
    (root / "f").write_text("one")
    volumes.driver.snapshot(name, "s1", OpenGate())
    new = volumes.name()
    with open(root / "held", "w") as held:
        volumes.driver.rename(name, new)
        held.write("through")
    moved = volumes.driver.mount(new)
    assert (moved / "held").read_text() == "through"
    assert [info.id for info in volumes.driver.snapshots(new)] == ["s1"]
    assert not volumes.driver.exists(name)


def test_rename_onto_another_volume_is_refused(volumes: Bench) -> None:
    (one, _), (two, root) = volumes.volume(), volumes.volume()
    (root / "f").write_text("two")
    with pytest.raises(NameTaken):
        volumes.driver.rename(one, two)
    assert (root / "f").read_text() == "two"


def test_a_name_of_255_characters_works(volumes: Bench) -> None:
    name = ("n" + secrets.token_hex(6)).ljust(255, "x")
    volumes.driver.create(name, volumes.options())
    try:
        (volumes.driver.mount(name) / "f").write_text("x")
    finally:
        volumes.driver.unmount(name)
        volumes.driver.remove(name)

"""V9 and V12: usage, limits, and space that is really there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tests.support.volumes import Bench

from lazarette.storage.errors import NoSpace, Unsupported
from lazarette.storage.volumes.contract import OpenGate

MIB = 1 << 20


def write(path: Path, mib: int) -> bool:
    """Whether so much incompressible data fits; what does not is left out."""
    try:
        with open(path, "wb", buffering=0) as file:
            for _ in range(mib):
                file.write(os.urandom(MIB))
            os.fsync(file.fileno())
    except OSError as full:
        assert full.errno in (errno.ENOSPC, errno.EDQUOT)
        return False
    return True


def limited(volumes: Bench, mib: int) -> tuple[str, Path] | None:
    if "size" not in volumes.driver.capabilities.options:
        return None
    name = volumes.name()
    volumes.driver.create(name, {**volumes.options(), "size": f"{mib}m"})
    return name, volumes.driver.mount(name)


def test_usage_follows_what_is_written(volumes: Bench) -> None:
    name, root = volumes.volume()
    before = volumes.driver.usage(name)
    assert write(root / "f", 8)
    after = volumes.driver.usage(name)
    assert 8 * MIB <= after.referenced - before.referenced <= 9 * MIB
    assert after.exclusive <= after.referenced


def test_usage_tells_shared_from_own(volumes: Bench) -> None:
    name, root = volumes.volume()
    assert write(root / "f", 4)
    volumes.driver.snapshot(name, "s1", OpenGate())
    usage = volumes.driver.usage(name)
    if volumes.driver.capabilities.name in ("btrfs", "overlay", "fuse"):
        assert usage.exclusive < MIB
        assert write(root / "own", 2)
        assert 2 * MIB <= volumes.driver.usage(name).exclusive <= 3 * MIB
    else:
        assert usage.exclusive == usage.referenced


def test_v9_a_size_limit_is_met_as_an_error_of_the_write(volumes: Bench) -> None:
    made = limited(volumes, 24)
    if made is None:
        return
    name, root = made
    assert write(root / "fits", 12)
    assert not write(root / "too much", 24)
    assert volumes.driver.usage(name).limit == 24 * MIB
    assert (root / "fits").stat().st_size == 12 * MIB


def test_v9_a_volume_without_size_says_that_it_has_none(volumes: Bench) -> None:
    if volumes.driver.capabilities.resize_shrink or "size" in volumes.options():
        return
    name, _ = volumes.volume()
    with pytest.raises(Unsupported):
        volumes.driver.resize(name, 64 * MIB)
    assert volumes.driver.usage(name).limit is None


def test_v9_a_limit_can_be_raised_while_nobody_uses_the_volume(volumes: Bench) -> None:
    made = limited(volumes, 16)
    if made is None:
        return
    name, _ = made
    volumes.driver.unmount(name)
    volumes.driver.resize(name, 48 * MIB)
    assert write(volumes.driver.mount(name) / "f", 40)


def test_v9_a_limit_that_was_raised_stays_over_a_rollback(volumes: Bench) -> None:
    made = limited(volumes, 16)
    if made is None:
        return
    name, root = made
    (root / "f").write_text("x")
    volumes.driver.snapshot(name, "s1", OpenGate())
    volumes.driver.resize(name, 48 * MIB)
    volumes.driver.unmount(name)
    volumes.driver.rollback(name, "s1")
    root = volumes.driver.mount(name)
    assert (root / "f").read_text() == "x"
    assert volumes.driver.usage(name).limit == 48 * MIB
    assert write(root / "g", 40)


def test_v9_growing_needs_no_unmount(volumes: Bench) -> None:
    made = limited(volumes, 16)
    if made is None:
        return
    name, root = made
    with open(root / "held", "wb") as held:
        assert not write(root / "f", 24)
        (root / "f").unlink()
        volumes.driver.resize(name, 48 * MIB)
        assert write(root / "f", 24)
        held.write(b"still open")
    assert volumes.driver.usage(name).limit == 48 * MIB


def test_v9_shrinking_holds_for_later_writes(volumes: Bench) -> None:
    made = limited(volumes, 64)
    if made is None:
        return
    name, root = made
    assert write(root / "f", 8)
    if not volumes.driver.capabilities.resize_shrink:
        with pytest.raises(Unsupported, match="cannot shrink"):
            volumes.driver.resize(name, 16 * MIB)
        assert volumes.driver.usage(name).limit == 64 * MIB
        return
    volumes.driver.resize(name, 16 * MIB)
    assert not write(root / "g", 24)


def test_v9_shrinking_below_the_content_loses_nothing(volumes: Bench) -> None:
    made = limited(volumes, 64)
    if made is None:
        return
    name, root = made
    assert write(root / "f", 16)
    try:
        volumes.driver.resize(name, 8 * MIB)
    except (NoSpace, Unsupported):
        pass
    assert (root / "f").stat().st_size == 16 * MIB


def test_v9_a_snapshot_does_not_forbid_overwriting(volumes: Bench) -> None:
    made = limited(volumes, 24)
    if made is None:
        return
    name, root = made
    assert write(root / "f", 16)
    volumes.driver.snapshot(name, "s1", OpenGate())
    with open(root / "f", "r+b", buffering=0) as file:
        for _ in range(16):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
    assert not write(root / "more", 24)


def test_v9_a_new_driver_object_keeps_the_limit(volumes: Bench) -> None:
    made = limited(volumes, 16)
    if made is None:
        return
    name, root = made
    again = volumes.kind.make(volumes.root / "driver")
    again.recover()
    assert again.usage(name).limit == 16 * MIB
    assert not write(root / "f", 24)


def test_v12_a_size_beyond_the_host_is_refused(volumes: Bench) -> None:
    if "size" not in volumes.driver.capabilities.options:
        return
    name = volumes.name()
    with pytest.raises(NoSpace):
        volumes.driver.create(name, {**volumes.options(), "size": "9p"})
    assert not volumes.driver.exists(name)
    volumes.driver.create(name, {**volumes.options(), "size": "16m"})
    with pytest.raises(NoSpace):
        volumes.driver.resize(name, 9 << 50)
    assert volumes.driver.usage(name).limit == 16 * MIB

from __future__ import annotations

from pathlib import Path

import pytest

from lazarette.storage.clock import SystemClock
from lazarette.storage.errors import InvalidArgument
from lazarette.storage.pool import Pool, PoolFormat
from lazarette.storage.registry import (
    VolumeDrivers,
    open_layers,
    probe_layers,
    probe_volumes,
)


def test_every_driver_is_reported_with_a_reason(tmp_path: Path) -> None:
    for findings in (probe_layers(tmp_path), probe_volumes(tmp_path)):
        assert len({found.name for found in findings}) == len(findings)
        assert all(found.reason for found in findings)
        assert any(found.usable for found in findings)
    assert not list(tmp_path.iterdir())


def test_the_layer_driver_is_chosen_and_explained(tmp_path: Path) -> None:
    driver, choice = open_layers(tmp_path, SystemClock())
    assert driver.capabilities.name == choice.name == "overlay"
    assert choice.reason
    driver, choice = open_layers(tmp_path, SystemClock(), "copy")
    assert driver.capabilities.name == "copy"
    assert "configured" in choice.reason


def test_an_unknown_or_unusable_driver_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as refused:
        open_layers(tmp_path, SystemClock(), "zfs")
    assert "overlay" in refused.value.hint
    with pytest.raises(InvalidArgument, match="not on btrfs"):
        open_layers(tmp_path, SystemClock(), "btrfs")


def test_volume_drivers_are_opened_when_asked_for(tmp_path: Path) -> None:
    drivers = VolumeDrivers(tmp_path / "volumes", SystemClock())
    assert set(drivers) >= {"btrfs", "overlay", "tmpfs", "bind"}
    assert list((tmp_path / "volumes").iterdir()) == []
    assert drivers["tmpfs"] is drivers["tmpfs"]
    assert [path.name for path in (tmp_path / "volumes").iterdir()] == ["tmpfs"]
    assert drivers.choice.name in drivers
    drivers.close()


def test_databases_get_the_quicker_driver_unless_one_is_wanted(tmp_path: Path) -> None:
    drivers = VolumeDrivers(tmp_path / "volumes", SystemClock())
    assert (drivers.choice.name, drivers.databases.name) == ("btrfs", "overlay")
    assert "xfs" in drivers.databases.reason
    for wanted in ("btrfs", "bind"):
        drivers = VolumeDrivers(tmp_path / "volumes", SystemClock(), wanted)
        assert drivers.databases.name == drivers.choice.name == wanted


def test_volumes_are_subvolumes_in_place_where_the_folder_is_on_btrfs(tmp_path: Path) -> None:
    (first, *_) = probe_volumes(tmp_path)
    assert first.name == "btrfs"
    assert "pool file" in first.reason
    folder = tmp_path / "native"
    pool = Pool(tmp_path / "disk", folder, PoolFormat.BTRFS, 256 << 20)
    pool.open()
    try:
        (first, *_) = probe_volumes(folder)
        assert first.name == "btrfs"
        assert "pool file" not in first.reason
        drivers = VolumeDrivers(folder, SystemClock())
        assert drivers.databases.name == drivers.choice.name == "btrfs"
    finally:
        pool.close()

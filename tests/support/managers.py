"""A volume manager over every driver, as a daemon has it, and its restart."""

from __future__ import annotations

import os
from pathlib import Path

from lazarette.storage import mounts
from lazarette.storage.clock import SystemClock
from lazarette.storage.state import State
from lazarette.storage.volumes.bind import BindVolumeDriver
from lazarette.storage.volumes.btrfs import BtrfsVolumeDriver
from lazarette.storage.volumes.contract import VolumeDriver
from lazarette.storage.volumes.fuse import FuseVolumeDriver
from lazarette.storage.volumes.manager import VolumeManager
from lazarette.storage.volumes.overlay import OverlayVolumeDriver
from lazarette.storage.volumes.tmpfs import TmpfsVolumeDriver

POOL = 1 << 30
DRIVERS = ("bind", "btrfs", "overlay", "tmpfs")


class Host:
    """Drivers, database and manager below one folder.

    Args:
        root: of everything.
        drivers: those to open; all by default.
    """

    def __init__(self, root: Path, drivers: tuple[str, ...] = DRIVERS) -> None:
        self.root = root
        self._wanted = drivers
        self.open()

    def open(self) -> None:
        """Start, as a daemon does."""
        clock = SystemClock()
        makers = {
            "btrfs": lambda: BtrfsVolumeDriver(self.root / "btrfs", clock, pool_size=POOL),
            "overlay": lambda: OverlayVolumeDriver(self.root / "overlay", clock, pool_size=POOL),
            "fuse": lambda: FuseVolumeDriver(self.root / "fuse", clock, pool_size=POOL),
            "tmpfs": lambda: TmpfsVolumeDriver(self.root / "tmpfs", clock),
            "bind": lambda: BindVolumeDriver(self.root / "bind", clock),
        }
        self.drivers: dict[str, VolumeDriver] = {name: makers[name]() for name in self._wanted}
        self.state = State(self.root / "state.db")
        self.manager = VolumeManager(self.state, self.drivers, clock, self._wanted[-1])

    def restart(self) -> None:
        """Forget everything in memory, as after a kill, and recover."""
        self.state.close()
        self.open()
        self.manager.recover()

    def clean(self) -> None:
        """Take everything away."""
        self.state.close()
        for driver in self.drivers.values():
            for name in driver.names():
                driver.unmount(name)
                driver.remove(name)
            driver.close()
        left = [m.target for m in mounts.mounts_beneath(self.root)]
        for target in reversed(left):
            mounts.unmount(target, detach=True)
        assert not left, [os.fsdecode(target) for target in left]

"""Volumes as folders on a filesystem with reflinks: xfs, or an xfs pool file.

The best throughput of all drivers (a database writes at nearly the speed of the host's own
filesystem), at the price of snapshots that are made file by file while writers are held.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lazarette.storage import extents
from lazarette.storage.clock import Clock
from lazarette.storage.pool import Pool, PoolFormat
from lazarette.storage.volumes.contract import (
    ChangeSource,
    SnapshotKind,
    VolumeCapabilities,
)
from lazarette.storage.volumes.options import check_options
from lazarette.storage.volumes.record import VolumeRecord
from lazarette.storage.volumes.tree import TreeVolumeDriver

_OPTIONS: tuple[str, ...] = ()


class OverlayVolumeDriver(TreeVolumeDriver):
    """Folders with reflinked snapshots, native or in an xfs pool file.

    Args:
        root: the driver's folder.
        clock: for the instants of snapshots and measured pauses.
        pool_size: fixed size of a pool file, bytes; by default it grows by itself.
    """

    def __init__(self, root: Path, clock: Clock, *, pool_size: int | None = None) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.pool: Pool | None = None
        base = root
        if not extents.reflinks_work(root):
            base = root / "pool"
            self.pool = Pool(root / "pool.xfs", base, PoolFormat.XFS, pool_size)
            self.pool.open()
        super().__init__(root, base, clock, reflinks=True)

    @property
    def capabilities(self) -> VolumeCapabilities:
        """See :class:`VolumeCapabilities`."""
        return VolumeCapabilities(
            name="overlay",
            snapshot=SnapshotKind.GATED,
            clone_constant_time=False,
            resize_grow=False,
            resize_shrink=False,
            rollback=True,
            changes=ChangeSource.FILES,
            options=_OPTIONS,
            needs=("xfs with reflinks", "loop devices (on a host without reflinks)"),
        )

    def close(self) -> None:
        """See :meth:`VolumeDriver.close`; unmounts the pool."""
        super().close()
        if self.pool is not None:
            self.pool.close()

    def create(self, name: str, options: Mapping[str, str]) -> None:
        """See :meth:`VolumeDriver.create`."""
        check_options(self.capabilities.name, options, _OPTIONS)
        if self._shelf.exists(name):
            return
        self._shelf.make(
            name, VolumeRecord(dict(options)), lambda staged: self._prepare(staged, options)
        )

"""What all drivers do alike that keep their volumes on a shelf."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from lazarette.storage.clock import Clock
from lazarette.storage.volumes.contract import SnapshotInfo, VolumeCapabilities, WriteGate
from lazarette.storage.volumes.shelf import VolumeShelf, check_snapshot_id


class ShelvedVolumeDriver(ABC):
    """A driver whose volumes are on a shelf.

    Args:
        shelf: where they are.
        clock: for the instants of snapshots and measured pauses.
    """

    def __init__(self, shelf: VolumeShelf, clock: Clock) -> None:
        self._shelf = shelf
        self._clock = clock

    @property
    @abstractmethod
    def capabilities(self) -> VolumeCapabilities:
        """See :class:`VolumeCapabilities`."""

    def recover(self) -> None:
        """See :meth:`VolumeDriver.recover`."""
        self._shelf.recover()

    def exists(self, name: str) -> bool:
        """See :meth:`VolumeDriver.exists`."""
        return self._shelf.exists(name)

    def names(self) -> list[str]:
        """See :meth:`VolumeDriver.names`."""
        return self._shelf.names()

    def location(self, name: str) -> Path:
        """See :meth:`VolumeDriver.location`."""
        return self._shelf.location(name)

    def mount(self, name: str) -> Path:
        """See :meth:`VolumeDriver.mount`."""
        self._shelf.folder(name)
        self._shelf.mark(name)
        return self.location(name)

    def unmount(self, name: str) -> None:
        """See :meth:`VolumeDriver.unmount`."""
        self._shelf.unmark(name)

    def remove(self, name: str) -> None:
        """See :meth:`VolumeDriver.remove`."""
        self._shelf.remove(name)

    def rename(self, name: str, new_name: str) -> None:
        """See :meth:`VolumeDriver.rename`; open files and mounts stay valid."""
        self._shelf.rename(name, new_name)

    def snapshot(self, name: str, snapshot: str, gate: WriteGate) -> SnapshotInfo:
        """See :meth:`VolumeDriver.snapshot`."""
        return self.snapshot_group([name], snapshot, gate)[name]

    def snapshot_group(
        self, names: Sequence[str], snapshot: str, gate: WriteGate
    ) -> dict[str, SnapshotInfo]:
        """See :meth:`VolumeDriver.snapshot_group`."""
        check_snapshot_id(snapshot)
        missing = [name for name in names if not self._shelf.has_snapshot(name, snapshot)]
        if missing:
            self._snapshot_missing(missing, snapshot, gate)
        return {name: self._shelf.info(name, snapshot) for name in names}

    @abstractmethod
    def _snapshot_missing(self, names: Sequence[str], snapshot: str, gate: WriteGate) -> None:
        """Take a snapshot of volumes that have none of that name, all at one instant."""

    def snapshots(self, name: str) -> list[SnapshotInfo]:
        """See :meth:`VolumeDriver.snapshots`."""
        return self._shelf.snapshots(name)

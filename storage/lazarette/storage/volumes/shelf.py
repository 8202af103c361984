"""Where every volume driver keeps its volumes: one folder a volume, one record a thing.

Layout below a driver's folder::

    volumes/NAME/volume.json        record; a folder without one is not there
    volumes/NAME/data               the volume's content, or what the driver keeps for it
    volumes/NAME/snapshots/ID       a snapshot's content
    volumes/NAME/snapshots/ID.json  written last: a snapshot without one is a leftover
    staging/…  trash/…              half made and half removed; emptied by ``recover``

A volume appears, changes its name and disappears by one rename of its folder.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lazarette.storage import beneath, files, mounts, steps, syscalls
from lazarette.storage.errors import (
    InUse,
    InvalidArgument,
    NameTaken,
    NoSpace,
    SnapshotNotFound,
    VolumeNotFound,
)
from lazarette.storage.volumes import record
from lazarette.storage.volumes.contract import SnapshotInfo
from lazarette.storage.volumes.record import SnapshotRecord, VolumeRecord


class Destroy(Protocol):
    """Deletes an entry of a folder with all below it, whatever the driver made it of."""

    def __call__(self, parent: int, name: bytes) -> None:
        """Nothing happens if it is not there."""
        ...


class VolumeShelf:
    """The volumes of one driver.

    Args:
        base: the driver's folder on the filesystem that holds the volumes.
        destroy: how to delete content; plain removal by default.
    """

    def __init__(self, base: Path, destroy: Destroy = beneath.remove_tree) -> None:
        self._destroy_entry = destroy
        self._volumes = base / "volumes"
        self.staging = base / "staging"
        self._trash = base / "trash"
        self._lock = threading.Lock()
        self._mounted: set[str] = set()
        for folder in (self._volumes, self.staging, self._trash):
            folder.mkdir(parents=True, exist_ok=True, mode=0o711)

    def recover(self) -> None:
        """Delete what a killed process left."""
        for folder in (self.staging, self._trash):
            for entry in os.listdir(folder):
                self.destroy(folder / entry)
        for name in self.names():
            snapshots = self.snapshots_folder(name)
            for entry in os.listdir(snapshots):
                if not entry.endswith(".json") and not (snapshots / f"{entry}.json").exists():
                    self.destroy(snapshots / entry)

    # ---- volumes

    def exists(self, name: str) -> bool:
        """Whether the volume is there."""
        return (self._volumes / name / "volume.json").exists()

    def names(self) -> list[str]:
        """All volumes, sorted."""
        return sorted(os.listdir(self._volumes))

    def location(self, name: str) -> Path:
        """Where a volume's content is, there or not."""
        return self._volumes / name / "data"

    def folder(self, name: str) -> Path:
        """The folder of a volume.

        Raises:
            VolumeNotFound: there is none.
        """
        if not self.exists(name):
            raise VolumeNotFound(f"no such volume: {name}")
        return self._volumes / name

    def record(self, name: str) -> VolumeRecord:
        """The record of a volume."""
        return record.read_volume(self.folder(name) / "volume.json")

    def update(self, name: str, changed: VolumeRecord) -> None:
        """Replace the record of a volume."""
        record.write(self.folder(name) / "volume.json", changed)

    def make(self, name: str, made: VolumeRecord, fill: Callable[[Path], None]) -> None:
        """Build a volume in staging and show it by one rename; nothing is left of a failure.

        Args:
            name: the volume.
            made: its record.
            fill: makes ``data`` in the folder it is given.

        Raises:
            NameTaken: somebody else made it meanwhile.
            NoSpace: the disk is full.
        """
        staged = self.stage()
        (staged / "snapshots").mkdir(mode=0o711)
        try:
            fill(staged)
            steps.reached("shelf.make.filled")
            record.write(staged / "volume.json", made)
            steps.reached("shelf.make.staged")
            self._appear(staged, name)
        except BaseException as failed:
            self.destroy(staged)
            if isinstance(failed, OSError) and failed.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"making the volume {name}: the disk is full") from failed
            raise

    def stage(self) -> Path:
        """A fresh folder in which to build something."""
        staged = self.staging / secrets.token_hex(8)
        staged.mkdir(mode=0o711)
        return staged

    def _appear(self, source: Path, name: str) -> None:
        try:
            exchange(source, self._volumes / name, syscalls.RENAME_NOREPLACE)
        except FileExistsError as taken:
            raise NameTaken(f"making the volume {name}: it exists already") from taken
        files.sync_folder(self._volumes)

    def rename(self, name: str, new_name: str) -> bool:
        """Give a volume another name; False when that is done already."""
        if not self.exists(name) and self.exists(new_name):
            return False
        self._appear(self.folder(name), new_name)
        with self._lock:
            if name in self._mounted:
                self._mounted.discard(name)
                self._mounted.add(new_name)
        return True

    def remove(self, name: str) -> None:
        """Delete a volume with its snapshots; nothing happens if it is not there."""
        if self.exists(name):
            self.discard(self._volumes / name)
        self.unmark(name)

    # ---- disappearing

    def discard(self, path: Path) -> None:
        """Take something out of sight by one rename, then delete it."""
        mounts.detach_beneath(path)
        mounts.unmount(path, detach=True)
        trash = self._trash / secrets.token_hex(8)
        os.rename(path, trash)
        steps.reached("shelf.discard.trashed")
        self.destroy(trash)

    def destroy(self, path: Path) -> None:
        """Delete with all below; mounts inside are detached, never entered (case A22)."""
        mounts.detach_beneath(path)
        mounts.unmount(path, detach=True)
        with beneath.opened(path.parent) as parent:
            self._destroy_entry(parent, os.fsencode(path.name))

    # ---- snapshots

    def snapshots_folder(self, name: str) -> Path:
        """The folder of a volume's snapshots."""
        return self.folder(name) / "snapshots"

    def has_snapshot(self, name: str, snapshot: str) -> bool:
        """Whether a volume has a snapshot."""
        return (self.snapshots_folder(name) / f"{snapshot}.json").exists()

    def snapshot(self, name: str, snapshot: str) -> Path:
        """Where a snapshot's content is.

        Raises:
            SnapshotNotFound: there is none.
        """
        if not self.has_snapshot(name, snapshot):
            raise SnapshotNotFound(f"the volume {name} has no snapshot {snapshot}")
        return self.snapshots_folder(name) / snapshot

    def info(self, name: str, snapshot: str) -> SnapshotInfo:
        """What is known of a snapshot."""
        path = self.snapshots_folder(name) / f"{snapshot}.json"
        return record.read_snapshot(path).info(snapshot)

    def snapshots(self, name: str) -> list[SnapshotInfo]:
        """The snapshots of a volume, oldest first."""
        found = [
            self.info(name, entry.removesuffix(".json"))
            for entry in os.listdir(self.snapshots_folder(name))
            if entry.endswith(".json")
        ]
        return sorted(found, key=lambda info: (info.created_ns, info.id))

    def keep_snapshot(self, name: str, snapshot: str, made: SnapshotRecord) -> None:
        """Write a snapshot's record, after its content is there."""
        record.write(self.snapshots_folder(name) / f"{snapshot}.json", made)

    def delete_snapshot(self, name: str, snapshot: str) -> bool:
        """Delete a snapshot; False if there is none."""
        folder = self.snapshots_folder(name)
        (folder / f"{snapshot}.json").unlink(missing_ok=True)
        steps.reached("shelf.delete_snapshot.unlisted")
        if not (folder / snapshot).exists():
            return False
        # not by way of the trash: a read-only subvolume cannot be moved, and without its
        # record a half deleted snapshot is a leftover already
        self.destroy(folder / snapshot)
        return True

    # ---- use

    def mark(self, name: str) -> None:
        """Note that a volume is in use."""
        with self._lock:
            self._mounted.add(name)

    def unmark(self, name: str) -> None:
        """Note that nobody uses a volume."""
        with self._lock:
            self._mounted.discard(name)

    def refuse_if_mounted(self, name: str, doing: str) -> None:
        """Raise if a volume is in use.

        Raises:
            InUse: it is.
        """
        if name in self._mounted:
            raise InUse(
                f"{doing} the volume {name}: it is mounted",
                hint="stop what uses it first",
            )


def check_snapshot_id(snapshot: str) -> str:
    """A snapshot's id, when it can be a file name of its own.

    Raises:
        InvalidArgument: it cannot.
    """
    allowed = snapshot.replace("-", "").replace("_", "").replace(".", "")
    if (
        not allowed.isalnum()
        or not snapshot.isascii()
        or snapshot[0] in ".-"
        or (len(snapshot) > 128 or snapshot.endswith(".json"))
    ):
        raise InvalidArgument(
            f"{snapshot!r} is no id of a snapshot", hint="use letters, digits, . _ and -"
        )
    return snapshot


def exchange(source: Path, target: Path, flags: int = syscalls.RENAME_EXCHANGE) -> None:
    """``renameat2`` by paths: two entries change places, or one moves only to a free name."""
    here = syscalls.AT_FDCWD
    syscalls.renameat2(here, os.fsencode(source), here, os.fsencode(target), flags)

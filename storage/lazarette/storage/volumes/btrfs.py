"""Volumes as btrfs subvolumes: atomic snapshots, clones in constant time, extent changes.

Layout below the driver's folder on the btrfs::

    volumes/NAME/volume.json        record of the volume
    volumes/NAME/data               its subvolume
    volumes/NAME/snapshots/ID       read-only subvolumes
    volumes/NAME/snapshots/ID.json  written after the snapshot: one without is a leftover
    staging/…  trash/…              half made and half removed; emptied by ``recover``

A volume appears and disappears by one rename of its folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lazarette.storage import beneath, btrfs, extents, mounts, steps, syscalls
from lazarette.storage.changes import Change, ChangesUnknown
from lazarette.storage.clock import Clock
from lazarette.storage.errors import (
    InUse,
    NameTaken,
    NoSpace,
    SnapshotNotFound,
    VolumeNotFound,
)
from lazarette.storage.pool import Pool, PoolFormat
from lazarette.storage.volumes import record
from lazarette.storage.volumes.contract import (
    ChangeSource,
    OpenGate,
    SnapshotInfo,
    SnapshotKind,
    VolumeCapabilities,
    VolumeUsage,
    WriteGate,
)
from lazarette.storage.volumes.options import check_options, parse_choice, parse_flag, parse_size
from lazarette.storage.volumes.record import SnapshotRecord, VolumeRecord

_OPTIONS = ("compression", "nodatacow", "size")
_COMPRESSIONS = ("none", "zlib", "lzo", "zstd")

_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000


class BtrfsVolumeDriver:
    """Volumes on a native btrfs, or in a btrfs pool file where the host has another one.

    Args:
        root: the driver's folder.
        clock: for the instants of snapshots and measured pauses.
        pool_size: fixed size of a pool file, bytes; by default it grows by itself.
    """

    def __init__(self, root: Path, clock: Clock, *, pool_size: int | None = None) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._mounted: set[str] = set()
        root.mkdir(parents=True, exist_ok=True)
        self.pool: Pool | None = None
        with beneath.opened(root) as folder:
            native = btrfs.is_btrfs(folder)
        if native:
            self._base = root
        else:
            self.pool = Pool(root / "pool.btrfs", root / "pool", PoolFormat.BTRFS, pool_size)
            self.pool.open()
            self._base = root / "pool"
        self._volumes = self._base / "volumes"
        self._staging = self._base / "staging"
        self._trash = self._base / "trash"
        for folder_path in (self._volumes, self._staging, self._trash):
            folder_path.mkdir(exist_ok=True, mode=0o711)

    @property
    def capabilities(self) -> VolumeCapabilities:
        """See :class:`VolumeCapabilities`."""
        return VolumeCapabilities(
            name="btrfs",
            snapshot=SnapshotKind.ATOMIC,
            clone_constant_time=True,
            resize_grow=True,
            resize_shrink=True,
            rollback=True,
            changes=ChangeSource.EXTENTS,
            options=_OPTIONS,
            needs=("btrfs", "loop devices (on a host with another filesystem)"),
        )

    def close(self) -> None:
        """Unmount the pool; volumes stay."""
        if self.pool is not None:
            self.pool.close()

    def recover(self) -> None:
        """See :meth:`VolumeDriver.recover`."""
        for folder in (self._staging, self._trash):
            for entry in os.listdir(folder):
                self._destroy(folder / entry)
        for name in self.names():
            snapshots = self._snapshots(name)
            for entry in os.listdir(snapshots):
                if not entry.endswith(".json") and not (snapshots / f"{entry}.json").exists():
                    self._destroy(snapshots / entry)

    # ---- volumes

    def create(self, name: str, options: Mapping[str, str]) -> None:
        """See :meth:`VolumeDriver.create`."""
        check_options("btrfs", options, _OPTIONS)
        limit = parse_size(options["size"]) if "size" in options else None
        nodatacow = parse_flag("nodatacow", options.get("nodatacow", "false"))
        compression = parse_choice("compression", options.get("compression", "none"), _COMPRESSIONS)
        if self.exists(name):
            return

        def fill(folder: int) -> None:
            btrfs.create_subvolume(folder, b"data")
            data = beneath.open_folder(folder, b"data")
            try:
                os.fchmod(data, 0o755)
                if nodatacow:
                    _set_nodatacow(data)
                if compression != "none":
                    os.setxattr(data, "btrfs.compression", compression.encode())
            finally:
                os.close(data)

        self._make(name, VolumeRecord(dict(options), limit), fill)

    def _make(self, name: str, made: VolumeRecord, fill: Callable[[int], None]) -> None:
        """Build a volume in staging and show it by one rename."""
        staged = self._staging / secrets.token_hex(8)
        (staged / "snapshots").mkdir(parents=True)
        try:
            with beneath.opened(staged) as folder:
                fill(folder)
            steps.reached("btrfs.create.filled")
            if made.limit is not None:
                self._limit(staged, made)
            record.write(staged / "volume.json", made)
            steps.reached("btrfs.create.staged")
            self._appear(staged, name)
        except BaseException as failed:
            self._destroy(staged)
            if isinstance(failed, OSError) and failed.errno == errno.ENOSPC:
                raise NoSpace(f"creating the volume {name}: the pool is full") from failed
            raise

    def _appear(self, staged: Path, name: str) -> None:
        try:
            syscalls.renameat2(
                syscalls.AT_FDCWD,
                os.fsencode(staged),
                syscalls.AT_FDCWD,
                os.fsencode(self._volumes / name),
                syscalls.RENAME_NOREPLACE,
            )
        except FileExistsError as taken:
            raise NameTaken(f"creating the volume {name}: it exists already") from taken

    def _limit(self, folder: Path, made: VolumeRecord) -> None:
        with beneath.opened(folder / "data") as data:
            if not btrfs.quotas_enabled(data):
                btrfs.enable_quotas(data)
            size = None if made.limit is None else made.limit + made.held
            btrfs.set_limit(data, btrfs.subvolume_id(data), size)

    def exists(self, name: str) -> bool:
        """See :meth:`VolumeDriver.exists`."""
        return (self._volumes / name / "volume.json").exists()

    def names(self) -> list[str]:
        """See :meth:`VolumeDriver.names`."""
        return sorted(os.listdir(self._volumes))

    def _folder(self, name: str) -> Path:
        if not self.exists(name):
            raise VolumeNotFound(f"no such volume: {name}")
        return self._volumes / name

    def _snapshots(self, name: str) -> Path:
        return self._folder(name) / "snapshots"

    def _snapshot_path(self, name: str, snapshot: str) -> Path:
        folder = self._snapshots(name)
        if not (folder / f"{snapshot}.json").exists():
            raise SnapshotNotFound(f"the volume {name} has no snapshot {snapshot}")
        return folder / snapshot

    def location(self, name: str) -> Path:
        """See :meth:`VolumeDriver.location`."""
        return self._volumes / name / "data"

    def mount(self, name: str) -> Path:
        """See :meth:`VolumeDriver.mount`; a subvolume is reachable without a mount of its own."""
        folder = self._folder(name)
        with self._lock:
            self._mounted.add(name)
        return folder / "data"

    def unmount(self, name: str) -> None:
        """See :meth:`VolumeDriver.unmount`."""
        with self._lock:
            self._mounted.discard(name)

    def remove(self, name: str) -> None:
        """See :meth:`VolumeDriver.remove`."""
        if not self.exists(name):
            return
        self._discard(self._volumes / name)
        self.unmount(name)

    def _discard(self, path: Path) -> None:
        """Take something out of sight by one rename, then delete it."""
        mounts.detach_beneath(path)
        trash = self._trash / secrets.token_hex(8)
        os.rename(path, trash)
        steps.reached("btrfs.remove.trashed")
        self._destroy(trash)

    def _destroy(self, path: Path) -> None:
        """Delete a folder, subvolume or file with all below, subvolumes included."""
        mounts.detach_beneath(path)
        try:
            with beneath.opened(path.parent) as parent:
                btrfs.destroy_tree(parent, os.fsencode(path.name))
        except FileNotFoundError:
            return

    def rename(self, name: str, new_name: str) -> None:
        """See :meth:`VolumeDriver.rename`; open files and mounts stay valid."""
        if not self.exists(name) and self.exists(new_name):
            return
        self._appear(self._folder(name), new_name)
        with self._lock:
            if name in self._mounted:
                self._mounted.discard(name)
                self._mounted.add(new_name)

    # ---- snapshots

    def snapshot(self, name: str, snapshot: str, gate: WriteGate) -> SnapshotInfo:
        """See :meth:`VolumeDriver.snapshot`; atomic, so the gate stays open."""
        return self.snapshot_group([name], snapshot, OpenGate())[name]

    def snapshot_group(
        self, names: Sequence[str], snapshot: str, gate: WriteGate
    ) -> dict[str, SnapshotInfo]:
        """See :meth:`VolumeDriver.snapshot_group`."""
        folders = {name: self._snapshots(name) for name in names}
        sources = {
            name: folder
            for name, folder in folders.items()
            if not (folder / f"{snapshot}.json").exists()
        }
        if not sources:
            return {name: _info(folder, snapshot) for name, folder in folders.items()}
        started = self._clock.monotonic_ns()
        gate.close()
        try:
            created = self._clock.now_ns()
            for folder in sources.values():
                self._snap(folder, snapshot)
        finally:
            gate.open()
        pause = self._clock.monotonic_ns() - started
        steps.reached("btrfs.snapshot.made")
        made = SnapshotRecord(created, pause, SnapshotKind.ATOMIC)
        for name, folder in sources.items():
            record.write(folder / f"{snapshot}.json", made)
            self._widen(name)
        return {name: _info(folder, snapshot) for name, folder in folders.items()}

    def _snap(self, snapshots: Path, snapshot: str) -> None:
        with beneath.opened(snapshots.parent / "data") as data, beneath.opened(snapshots) as into:
            try:
                btrfs.snapshot_subvolume(data, into, os.fsencode(snapshot), read_only=True)
            except FileExistsError:
                # a leftover: its record was never written
                btrfs.destroy_tree(into, os.fsencode(snapshot))
                btrfs.snapshot_subvolume(data, into, os.fsencode(snapshot), read_only=True)

    def _widen(self, name: str) -> None:
        """Let a limited volume overwrite what its new snapshot holds (see the drivers' text)."""
        folder = self._folder(name)
        now = record.read_volume(folder / "volume.json")
        if now.limit is None:
            return
        with beneath.opened(folder / "data") as data:
            held = btrfs.charged(data, btrfs.subvolume_id(data)) or 0
        if not self.snapshots(name):
            held = 0
        widened = VolumeRecord(now.options, now.limit, held)
        self._limit(folder, widened)
        record.write(folder / "volume.json", widened)

    def snapshots(self, name: str) -> list[SnapshotInfo]:
        """See :meth:`VolumeDriver.snapshots`."""
        folder = self._snapshots(name)
        found = [
            _info(folder, entry.removesuffix(".json"))
            for entry in os.listdir(folder)
            if entry.endswith(".json")
        ]
        return sorted(found, key=lambda info: (info.created_ns, info.id))

    def view(self, name: str, snapshot: str) -> Path:
        """See :meth:`VolumeDriver.view`; a read-only subvolume needs no mount."""
        return self._snapshot_path(name, snapshot)

    def release_view(self, name: str, snapshot: str) -> None:
        """See :meth:`VolumeDriver.release_view`."""

    def delete_snapshot(self, name: str, snapshot: str) -> None:
        """See :meth:`VolumeDriver.delete_snapshot`."""
        folder = self._snapshots(name)
        (folder / f"{snapshot}.json").unlink(missing_ok=True)
        steps.reached("btrfs.delete_snapshot.unlisted")
        if (folder / snapshot).exists():
            self._discard(folder / snapshot)
            self._widen(name)

    def clone(self, source: str, snapshot: str | None, name: str) -> None:
        """See :meth:`VolumeDriver.clone`; constant time."""
        if self.exists(name):
            return
        folder = self._folder(source)
        origin = folder / "data" if snapshot is None else self._snapshot_path(source, snapshot)

        def fill(into: int) -> None:
            with beneath.opened(origin) as data:
                btrfs.snapshot_subvolume(data, into, b"data", read_only=False)

        kept = record.read_volume(folder / "volume.json")
        self._make(name, VolumeRecord(kept.options, kept.limit), fill)

    def rollback(self, name: str, snapshot: str) -> None:
        """See :meth:`VolumeDriver.rollback`: a writable snapshot changes places with the data."""
        origin = self._snapshot_path(name, snapshot)
        if name in self._mounted:
            raise InUse(f"rolling back the volume {name}: it is mounted")
        folder = self._folder(name)
        staged = self._staging / secrets.token_hex(8)
        with beneath.opened(origin) as data, beneath.opened(self._staging) as into:
            btrfs.snapshot_subvolume(data, into, os.fsencode(staged.name), read_only=False)
        steps.reached("btrfs.rollback.staged")
        syscalls.renameat2(
            syscalls.AT_FDCWD,
            os.fsencode(staged),
            syscalls.AT_FDCWD,
            os.fsencode(folder / "data"),
            syscalls.RENAME_EXCHANGE,
        )
        steps.reached("btrfs.rollback.exchanged")
        self._discard(staged)
        now = record.read_volume(folder / "volume.json")
        if now.limit is not None:
            record.write(folder / "volume.json", VolumeRecord(now.options, now.limit))
            self._limit(folder, VolumeRecord(now.options, now.limit))

    def changes(self, name: str, base: str, target: str) -> Iterator[Change]:
        """See :meth:`VolumeDriver.changes`; ranges come from the trees' generations."""
        self._snapshot_path(name, base)
        self._snapshot_path(name, target)
        raise ChangesUnknown(f"what changed in {name} from {base} to {target} is not recorded")

    # ---- space

    def usage(self, name: str) -> VolumeUsage:
        """See :meth:`VolumeDriver.usage`; walks the extent maps."""
        folder = self._folder(name)
        limit = record.read_volume(folder / "volume.json").limit
        with beneath.opened(folder / "data") as data:
            os.fsync(data)
            referenced, shared = _extents(data)
        return VolumeUsage(referenced, referenced - shared, limit)

    def resize(self, name: str, size: int) -> None:
        """See :meth:`VolumeDriver.resize`."""
        folder = self._folder(name)
        now = record.read_volume(folder / "volume.json")
        resized = VolumeRecord(now.options, size, now.held)
        record.write(folder / "volume.json", resized)
        self._limit(folder, resized)


def _info(snapshots: Path, snapshot: str) -> SnapshotInfo:
    return record.read_snapshot(snapshots / f"{snapshot}.json").info(snapshot)


def _set_nodatacow(folder: int) -> None:
    flags = bytearray(8)
    fcntl.ioctl(folder, _FS_IOC_GETFLAGS, flags)
    wanted = struct.unpack("=Q", flags)[0] | _FS_NOCOW_FL
    fcntl.ioctl(folder, _FS_IOC_SETFLAGS, struct.pack("=Q", wanted))


def _extents(root: int) -> tuple[int, int]:
    """Bytes of all extents below a folder, and of those that something else shares."""
    total = shared = 0
    seen: set[int] = set()
    for entry in beneath.walk(root):
        if not stat.S_ISREG(entry.status.st_mode) or entry.status.st_ino in seen:
            continue
        if entry.status.st_nlink > 1:
            seen.add(entry.status.st_ino)
        try:
            file = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=entry.parent)
        except FileNotFoundError:
            continue
        try:
            for extent in extents.extents(file):
                total += extent.length
                shared += extent.length if extent.shared else 0
        finally:
            os.close(file)
    return total, shared

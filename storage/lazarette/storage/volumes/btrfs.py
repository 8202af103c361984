"""Volumes as btrfs subvolumes: atomic snapshots, clones in constant time, extent changes.

Layout as :mod:`lazarette.storage.volumes.shelf` says, ``data`` and snapshots being
subvolumes; they are reachable without mounts of their own.

A size limit is a simple quota where the kernel has them (no cost measured; full quota
groups cost 4-9 % and make checkpoints 2.9 times as long).  Simple quotas charge an extent
to the volume that wrote it for as long as a snapshot holds it, so a limit taken literally
would refuse a database its own pages after a snapshot.  The limit in force is therefore
the size asked for plus what was charged at the last snapshot: overwriting never meets the
limit early; a volume may exceed it by at most what its snapshots still share with it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lazarette.storage import beneath, btrfs, space, steps
from lazarette.storage.btrfs_changes import subvolume_changes
from lazarette.storage.changes import Change
from lazarette.storage.clock import Clock
from lazarette.storage.errors import NoSpace
from lazarette.storage.pool import Pool, PoolFormat
from lazarette.storage.syscalls import syncfs
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
from lazarette.storage.volumes.shelf import VolumeShelf, exchange
from lazarette.storage.volumes.shelved import ShelvedVolumeDriver

_OPTIONS = ("compression", "nodatacow", "size")
_COMPRESSIONS = ("none", "zlib", "lzo", "zstd")

_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000


class BtrfsVolumeDriver(ShelvedVolumeDriver):
    """Volumes on a native btrfs, or in a btrfs pool file where the host has another one.

    Args:
        root: the driver's folder.
        clock: for the instants of snapshots and measured pauses.
        pool_size: fixed size of a pool file, bytes; by default it grows by itself.
    """

    def __init__(self, root: Path, clock: Clock, *, pool_size: int | None = None) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)
        self.pool: Pool | None = None
        base = root
        with beneath.opened(root) as folder:
            native = btrfs.is_btrfs(folder)
        if not native:
            base = root / "pool"
            self.pool = Pool(root / "pool.btrfs", base, PoolFormat.BTRFS, pool_size)
            self.pool.open()
        super().__init__(VolumeShelf(base, btrfs.destroy_tree), clock)

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
            inodes_kept=True,
            options=_OPTIONS,
            needs=("btrfs", "loop devices (on a host with another filesystem)"),
        )

    def close(self) -> None:
        """See :meth:`VolumeDriver.close`; unmounts the pool."""
        if self.pool is not None:
            self.pool.close()

    # ---- volumes

    def create(self, name: str, options: Mapping[str, str]) -> None:
        """See :meth:`VolumeDriver.create`."""
        check_options("btrfs", options, _OPTIONS)
        limit = parse_size(options["size"]) if "size" in options else None
        self._check_limit(name, limit)
        nodatacow = parse_flag("nodatacow", options.get("nodatacow", "false"))
        compression = parse_choice("compression", options.get("compression", "none"), _COMPRESSIONS)

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

    def _check_limit(self, name: str, limit: int | None) -> None:
        """Refuse a limit that the host could never fill (V12)."""
        if self.pool is not None:
            capacity = self.pool.capacity()
        else:
            host = os.statvfs(self._root)
            capacity = host.f_blocks * host.f_frsize
        if limit is not None and limit > capacity:
            raise NoSpace(
                f"the volume {name}: {limit} bytes are more than the {capacity} the host can give",
                hint="ask for less, or free space on the host",
            )

    def _make(self, name: str, made: VolumeRecord, fill: Callable[[int], None]) -> None:
        if self._shelf.exists(name):
            return

        def build(staged: Path) -> None:
            with beneath.opened(staged) as folder:
                fill(folder)
            if made.limit is not None:
                _set_limit(staged / "data", made)

        self._shelf.make(name, made, build)

    # ---- snapshots

    def snapshot(self, name: str, snapshot: str, gate: WriteGate) -> SnapshotInfo:
        """See :meth:`VolumeDriver.snapshot`; atomic, so the gate stays open."""
        return self.snapshot_group([name], snapshot, OpenGate())[name]

    def _snapshot_missing(self, names: Sequence[str], snapshot: str, gate: WriteGate) -> None:
        folders = [self._shelf.folder(name) for name in names]
        with beneath.opened(folders[0] / "data") as data:
            # what is written back before need not be written back while writers wait
            syncfs(data)
        gate.close()
        try:
            # the ioctl itself holds writers for its commit, so it counts as the pause
            started = self._clock.monotonic_ns()
            created = self._clock.now_ns()
            for folder in folders:
                _snap(folder, snapshot)
            pause = self._clock.monotonic_ns() - started
        finally:
            gate.open()
        steps.reached("btrfs.snapshot.made")
        for name in names:
            self._shelf.keep_snapshot(
                name, snapshot, SnapshotRecord(created, pause, SnapshotKind.ATOMIC)
            )
            self._widen(name)

    def _widen(self, name: str) -> None:
        """Adapt the limit in force to what snapshots hold (see the module's text)."""
        now = self._shelf.record(name)
        if now.limit is None:
            return
        data = self._shelf.location(name)
        held = 0
        if self._shelf.snapshots(name):
            with beneath.opened(data) as folder:
                held = btrfs.charged(folder, btrfs.subvolume_id(folder)) or 0
        widened = VolumeRecord(now.options, now.limit, held)
        _set_limit(data, widened)
        self._shelf.update(name, widened)

    def view(self, name: str, snapshot: str) -> Path:
        """See :meth:`VolumeDriver.view`; a read-only subvolume needs no mount."""
        return self._shelf.snapshot(name, snapshot)

    def release_view(self, name: str, snapshot: str) -> None:
        """See :meth:`VolumeDriver.release_view`."""

    def delete_snapshot(self, name: str, snapshot: str) -> None:
        """See :meth:`VolumeDriver.delete_snapshot`."""
        if self._shelf.delete_snapshot(name, snapshot):
            self._widen(name)

    def clone(self, source: str, snapshot: str | None, name: str) -> None:
        """See :meth:`VolumeDriver.clone`; constant time."""
        if snapshot is None:
            origin = self._shelf.folder(source) / "data"
        else:
            origin = self._shelf.snapshot(source, snapshot)

        def fill(into: int) -> None:
            with beneath.opened(origin) as data:
                btrfs.snapshot_subvolume(data, into, b"data", read_only=False)

        kept = self._shelf.record(source)
        self._make(name, VolumeRecord(kept.options, kept.limit), fill)

    def rollback(self, name: str, snapshot: str) -> None:
        """See :meth:`VolumeDriver.rollback`: a writable snapshot changes places with the data."""
        origin = self._shelf.snapshot(name, snapshot)
        self._shelf.refuse_if_mounted(name, "rolling back")
        staged = self._shelf.staging / secrets.token_hex(8)
        with beneath.opened(origin) as data, beneath.opened(staged.parent) as into:
            btrfs.snapshot_subvolume(data, into, os.fsencode(staged.name), read_only=False)
        now = self._shelf.record(name)
        rolled = VolumeRecord(now.options, now.limit)
        if now.limit is not None:
            _set_limit(staged, rolled)
        steps.reached("btrfs.rollback.staged")
        exchange(staged, self._shelf.location(name))
        steps.reached("btrfs.rollback.exchanged")
        self._shelf.update(name, rolled)
        self._shelf.discard(staged)

    def changes(self, name: str, base: str, target: str) -> Iterator[Change]:
        """See :meth:`VolumeDriver.changes`; found by the generations in the trees."""
        older = self._shelf.snapshot(name, base)
        newer = self._shelf.snapshot(name, target)
        return subvolume_changes(older, newer)

    # ---- space

    def usage(self, name: str) -> VolumeUsage:
        """See :meth:`VolumeDriver.usage`; walks the extent maps."""
        limit = self._shelf.record(name).limit
        with beneath.opened(self._shelf.location(name)) as data:
            syncfs(data)
            referenced, shared = space.tree_space(data, space.flagged)
        return VolumeUsage(referenced, referenced - shared, limit)

    def resize(self, name: str, size: int) -> None:
        """See :meth:`VolumeDriver.resize`."""
        now = self._shelf.record(name)
        self._check_limit(name, size)
        resized = VolumeRecord(now.options, size, now.held)
        self._shelf.update(name, resized)
        _set_limit(self._shelf.location(name), resized)


def _snap(volume: Path, snapshot: str) -> None:
    with beneath.opened(volume / "data") as data, beneath.opened(volume / "snapshots") as into:
        try:
            btrfs.snapshot_subvolume(data, into, os.fsencode(snapshot), read_only=True)
        except FileExistsError:
            # a leftover: its record was never written
            btrfs.destroy_tree(into, os.fsencode(snapshot))
            btrfs.snapshot_subvolume(data, into, os.fsencode(snapshot), read_only=True)


def _set_limit(data: Path, made: VolumeRecord) -> None:
    with beneath.opened(data) as folder:
        if not btrfs.quotas_enabled(folder):
            btrfs.enable_quotas(folder)
        size = None if made.limit is None else made.limit + made.held
        btrfs.set_limit(folder, btrfs.subvolume_id(folder), size)


def _set_nodatacow(folder: int) -> None:
    flags = bytearray(8)
    fcntl.ioctl(folder, _FS_IOC_GETFLAGS, flags)
    wanted = struct.unpack("=Q", flags)[0] | _FS_NOCOW_FL
    fcntl.ioctl(folder, _FS_IOC_SETFLAGS, struct.pack("=Q", wanted))

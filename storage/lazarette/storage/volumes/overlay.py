"""Volumes on a filesystem with reflinks: xfs, or an xfs pool file.

The best throughput of all drivers: a database writes at nearly the speed of the host's own
filesystem.  A volume is a folder, and a snapshot of it is made file by file while writers
are held.  A volume with a size limit lies in a filesystem of that size instead, kept in a
file beside (:mod:`lazarette.storage.disk`): nothing smaller than a filesystem has a limit
in every kernel.  Its snapshot is that file, cloned while the filesystem is frozen.

Layout: as :mod:`lazarette.storage.volumes.shelf` says; with a limit ``disk.img`` is the
volume's filesystem, ``disk`` where it is mounted, the volume's root ``disk/data``, and a
snapshot a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lazarette.storage import beneath, compare, disk, extents, mounts, space, steps
from lazarette.storage.changes import Change
from lazarette.storage.clock import Clock
from lazarette.storage.errors import InvalidArgument, NoSpace, Unsupported
from lazarette.storage.pool import Pool, PoolFormat
from lazarette.storage.volumes.contract import (
    ChangeSource,
    OpenGate,
    SnapshotInfo,
    SnapshotKind,
    VolumeCapabilities,
    VolumeUsage,
    WriteGate,
)
from lazarette.storage.volumes.making import SnapshotMaking
from lazarette.storage.volumes.options import check_options, parse_size
from lazarette.storage.volumes.record import VolumeRecord
from lazarette.storage.volumes.shelf import exchange
from lazarette.storage.volumes.tree import TreeVolumeDriver

_OPTIONS = ("size",)


class DiskMaking(SnapshotMaking):
    """A snapshot of a volume with a filesystem of its own.

    Args:
        image: the volume's file.
        target: where it is mounted.
        staged: an empty folder.
    """

    holds_writers = True

    def __init__(self, image: Path, target: Path, staged: Path) -> None:
        super().__init__(staged / "image")
        self._image = image
        self._target = target
        self._freeze = disk.Freeze([target])

    def prepare(self) -> None:
        """Write back what is dirty, twice: the second time takes what came during the first."""
        disk.write_back(self._target)
        self._freeze.arm()
        disk.write_back(self._target)

    def hold(self) -> None:
        """Freeze the filesystem."""
        self._freeze.freeze()
        steps.reached("disk.snapshot.frozen")

    def take(self) -> None:
        """Clone the file."""
        disk.clone(self._image, self.staged, sync=False)

    def release(self) -> None:
        """Thaw it."""
        self._freeze.thaw()

    def settle(self) -> None:
        """Write the clone out."""
        disk.sync(self.staged)

    def close(self) -> None:
        """End the process that would have thawed in our place."""
        self._freeze.disarm()


class OverlayVolumeDriver(TreeVolumeDriver):
    """Volumes with reflinked snapshots, native or in an xfs pool file.

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
        self._base = base
        super().__init__(root, base, clock, reflinks=True)

    @property
    def capabilities(self) -> VolumeCapabilities:
        """See :class:`VolumeCapabilities`."""
        return VolumeCapabilities(
            name="overlay",
            snapshot=SnapshotKind.GATED,
            clone_constant_time=False,
            resize_grow=True,
            resize_shrink=False,
            rollback=True,
            changes=ChangeSource.FILES,
            options=_OPTIONS,
            needs=("xfs with reflinks", "loop devices (on a host without reflinks)"),
        )

    def recover(self) -> None:
        """See :meth:`VolumeDriver.recover`; lets go on what a killed snapshot left frozen."""
        for name in self.names():
            if self._sized(name) and mounts.is_mount_point(self._disk(name)):
                disk.thaw(self._disk(name))
        super().recover()

    def close(self) -> None:
        """See :meth:`VolumeDriver.close`; unmounts the pool."""
        with ExitStack() as ending:
            if self.pool is not None:
                ending.callback(self.pool.close)
            for name in self.names():
                ending.callback(self._let_go, name)
            ending.callback(super().close)

    # ---- volumes with a filesystem of their own

    def _disk(self, name: str) -> Path:
        return self._shelf.location(name).parent / "disk"

    def _image(self, name: str) -> Path:
        return self._shelf.location(name).parent / "disk.img"

    def _sized(self, name: str) -> bool:
        return self._image(name).exists()

    def _content(self, name: str) -> Path:
        return self._disk(name) / "data" if self._sized(name) else super()._content(name)

    def location(self, name: str) -> Path:
        """See :meth:`VolumeDriver.location`."""
        return self._content(name)

    def _attach(self, name: str) -> None:
        """Make a volume's files reachable, and its filesystem as large as it should be."""
        if not self._sized(name):
            return
        disk.mount(self._image(name), self._disk(name))
        limit = self._shelf.record(name).limit
        if limit is not None:
            disk.grow(self._image(name), self._disk(name), limit)

    def _let_go(self, name: str) -> None:
        if self._sized(name):
            disk.unmount(self._disk(name))

    @contextmanager
    def _attached(self, name: str) -> Iterator[None]:
        """For the length of the block, whether the volume is in use or not."""
        was = not self._sized(name) or mounts.is_mount_point(self._disk(name))
        self._attach(name)
        try:
            yield
        finally:
            if not was:
                self._let_go(name)

    def _capacity(self) -> int:
        if self.pool is not None:
            return self.pool.capacity()
        host = os.statvfs(self._base)
        return host.f_blocks * host.f_frsize

    def _check_limit(self, name: str, limit: int) -> None:
        """Refuse a limit that cannot be kept together with those given already (V12)."""
        if limit < disk.SMALLEST:
            raise InvalidArgument(
                f"the volume {name}: a size of {limit} bytes is too small",
                hint=f"at least {disk.SMALLEST // disk.MIB}m",
            )
        promised = sum(
            self._shelf.record(other).limit or 0 for other in self.names() if other != name
        )
        capacity = self._capacity()
        if promised + limit > capacity:
            raise NoSpace(
                f"the volume {name}: {limit} bytes besides {promised} of other volumes are more "
                f"than the {capacity} the host can give",
                hint="ask for less, or free space on the host",
            )

    def _check_room(self, name: str) -> None:
        """Refuse a snapshot after which overwriting the volume could fill the disk (V12)."""
        inside = os.statvfs(self._base)
        taken = (inside.f_blocks - inside.f_bfree) * inside.f_frsize
        if self.pool is not None:
            taken -= self.pool.ballast()
        needed = self._image(name).stat().st_blocks * 512
        if taken + needed > self._capacity():
            raise NoSpace(
                f"a snapshot of {name} could take {needed} bytes, and the host has not so many",
                hint="delete snapshots, or free space on the host",
            )

    # ---- life

    def create(self, name: str, options: Mapping[str, str]) -> None:
        """See :meth:`VolumeDriver.create`."""
        check_options(self.capabilities.name, options, _OPTIONS)
        limit = parse_size(options["size"]) if "size" in options else None
        if self._shelf.exists(name):
            return
        if limit is not None:
            self._check_limit(name, limit)

        def fill(staged: Path) -> None:
            self._prepare(staged, options)
            if limit is not None:
                self._make_disk(staged, limit)

        self._shelf.make(name, VolumeRecord(dict(options), limit), fill)

    def _make_disk(self, staged: Path, limit: int) -> None:
        (staged / "data").rmdir()
        (staged / "disk").mkdir(mode=0o711)
        disk.make(staged / "disk.img", limit)
        disk.mount(staged / "disk.img", staged / "disk")
        try:
            self._make_data(staged / "disk" / "data", {})
            (staged / "disk" / "work").mkdir(mode=0o700)
        finally:
            disk.unmount(staged / "disk")

    def mount(self, name: str) -> Path:
        """See :meth:`VolumeDriver.mount`."""
        self._shelf.folder(name)
        self._attach(name)
        return super().mount(name)

    def unmount(self, name: str) -> None:
        """See :meth:`VolumeDriver.unmount`."""
        if self.exists(name):
            self._let_go(name)
        super().unmount(name)

    # ---- snapshots

    def snapshot(self, name: str, snapshot: str, gate: WriteGate) -> SnapshotInfo:
        """See :meth:`VolumeDriver.snapshot`; a frozen filesystem needs no gate."""
        return super().snapshot(name, snapshot, OpenGate() if self._sized(name) else gate)

    def _snapshot_missing(self, names: Sequence[str], snapshot: str, gate: WriteGate) -> None:
        with ExitStack() as attached:
            for name in names:
                attached.enter_context(self._attached(name))
            super()._snapshot_missing(names, snapshot, gate)

    def _making(self, name: str, staged: Path) -> SnapshotMaking:
        if not self._sized(name):
            return super()._making(name, staged)
        self._check_room(name)
        return DiskMaking(self._image(name), self._disk(name), staged)

    def _show(self, name: str, snapshot: str, target: Path) -> None:
        if self._sized(name):
            disk.mount(self._shelf.snapshot(name, snapshot), target, read_only=True)
        else:
            super()._show(name, snapshot, target)

    def _shown(self, name: str, target: Path) -> Path:
        return target / "data" if self._sized(name) else target

    def clone(self, source: str, snapshot: str | None, name: str) -> None:
        """See :meth:`VolumeDriver.clone`: by reflink."""
        kept = self._shelf.record(source)
        if not self._sized(source):
            super().clone(source, snapshot, name)
            return
        if self.exists(name):
            return
        origin = self._shelf.snapshot(source, snapshot) if snapshot is not None else None
        self._check_limit(name, kept.limit or 0)

        def fill(staged: Path) -> None:
            self._prepare(staged, kept.options)
            (staged / "data").rmdir()
            (staged / "disk").mkdir(mode=0o711)
            if origin is not None:
                disk.clone(origin, staged / "disk.img", sync=True)
                return
            with self._attached(source):
                making = DiskMaking(self._image(source), self._disk(source), staged)
                try:
                    making.prepare()
                    making.hold()
                    making.take()
                    making.release()
                    making.settle()
                finally:
                    making.close()
                os.rename(making.staged, staged / "disk.img")

        self._shelf.make(name, VolumeRecord(kept.options, kept.limit), fill)

    def rollback(self, name: str, snapshot: str) -> None:
        """See :meth:`VolumeDriver.rollback`: a clone changes places with the data."""
        if not self._sized(name):
            super().rollback(name, snapshot)
            return
        origin = self._shelf.snapshot(name, snapshot)
        self._shelf.refuse_if_mounted(name, "rolling back")
        self._let_go(name)
        staged = self._shelf.stage() / "disk.img"
        disk.clone(origin, staged, sync=True)
        steps.reached("disk.rollback.staged")
        exchange(staged, self._image(name))
        steps.reached("disk.rollback.exchanged")
        self._shelf.discard(staged.parent)

    def _compare(self, name: str, base: str, target: str) -> Iterator[Change]:
        if not self._sized(name):
            yield from super()._compare(name, base, target)
            return
        images = [self._shelf.snapshot(name, one) for one in (base, target)]
        views = [self.view(name, one) for one in (base, target)]
        try:
            with (
                open(images[0], "rb") as older,
                open(images[1], "rb") as newer,
                beneath.opened(views[0]) as was,
                beneath.opened(views[1]) as now,
            ):
                suspects = compare.by_disk(older.fileno(), newer.fileno())
                yield from compare.tree_changes(was, now, suspects)
        finally:
            for one in (base, target):
                self.release_view(name, one)

    # ---- space

    def usage(self, name: str) -> VolumeUsage:
        """See :meth:`VolumeDriver.usage`: walks the volume."""
        if not self._sized(name):
            return super().usage(name)
        with self._attached(name), open(self._image(name), "rb") as image:
            disk.write_back(self._disk(name))
            with beneath.opened(self._content(name)) as data:
                total, shared = space.tree_space(data, space.shared_below(image.fileno()))
        return VolumeUsage(total, total - shared, self._shelf.record(name).limit)

    def resize(self, name: str, size: int) -> None:
        """See :meth:`VolumeDriver.resize`: larger, mounted or not.

        Raises:
            Unsupported: the volume has no limit, or would shrink.
            NoSpace: the host cannot give so much.
        """
        now = self._shelf.record(name)
        if now.limit is None:
            raise Unsupported(
                f"resizing {name}: it was made without a size",
                hint="make a volume with a size and import this one's export",
            )
        if size < now.limit:
            raise Unsupported(
                f"resizing {name} to {size} bytes: it has {now.limit}, and its filesystem cannot "
                "shrink",
                hint="make a smaller volume and import this one's export",
            )
        self._check_limit(name, size)
        self._shelf.update(name, VolumeRecord(now.options, size, now.held))
        steps.reached("disk.resize.recorded")
        with self._attached(name):
            self._attach(name)  # what is attached is made as large as its record says

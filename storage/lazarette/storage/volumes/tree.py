"""What drivers have in common whose volumes are plain folders.

A snapshot is a copy of the folder made while the gate holds the writers.  Where the disk has
reflinks, nearly all of it is made before, and only what changed since is made then.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from lazarette.storage import beneath, copying, mounts, space, steps
from lazarette.storage.changes import Change
from lazarette.storage.clock import Clock
from lazarette.storage.compare import by_extents, everything, tree_changes
from lazarette.storage.errors import NoSpace, Unsupported
from lazarette.storage.refresh import copy_tree
from lazarette.storage.syscalls import syncfs
from lazarette.storage.volumes.contract import (
    SnapshotKind,
    VolumeUsage,
    WriteGate,
)
from lazarette.storage.volumes.making import CopyMaking, ReflinkMaking, SnapshotMaking
from lazarette.storage.volumes.record import SnapshotRecord, VolumeRecord
from lazarette.storage.volumes.shelf import VolumeShelf, exchange
from lazarette.storage.volumes.shelved import ShelvedVolumeDriver


class TreeVolumeDriver(ShelvedVolumeDriver):
    """A driver whose volumes are folders; subclasses say where they come from.

    Args:
        root: the driver's folder on the host.
        base: its folder on the filesystem that holds the volumes.
        clock: for the instants of snapshots and measured pauses.
        reflinks: that filesystem shares extents between files.
    """

    def __init__(self, root: Path, base: Path, clock: Clock, *, reflinks: bool) -> None:
        super().__init__(VolumeShelf(base), clock)
        self._reflinks = reflinks
        self._views = root / "views"
        self._views.mkdir(exist_ok=True, mode=0o711)
        self._viewers: Counter[tuple[str, str]] = Counter()

    @abstractmethod
    def create(self, name: str, options: Mapping[str, str]) -> None:
        """See :meth:`VolumeDriver.create`."""

    def recover(self) -> None:
        """See :meth:`VolumeDriver.recover`."""
        super().recover()
        self._drop_views()

    def _drop_views(self) -> None:
        for name in os.listdir(self._views):
            beneath.remove_path(self._views / name)
        self._viewers.clear()

    def close(self) -> None:
        """See :meth:`VolumeDriver.close`."""
        self._drop_views()

    def _content(self, name: str) -> Path:
        """Where a volume's files are kept, mounted or not."""
        return self._shelf.location(name)

    # ---- snapshots

    def _snapshot_missing(self, names: Sequence[str], snapshot: str, gate: WriteGate) -> None:
        for name in names:
            self._check_source(name)
        staged = {name: self._stage_snapshot(name, snapshot) for name in names}
        try:
            with ExitStack() as opened:
                making = {name: self._making(name, path) for name, path in staged.items()}
                for one in making.values():
                    opened.callback(one.close)
                created, pause = self._take(making, gate)
                steps.reached("tree.snapshot.copied")
                for name, one in making.items():
                    one.settle()
                    kind = SnapshotKind.ATOMIC if one.holds_writers else self.capabilities.snapshot
                    self._place_snapshot(one.staged, self._shelf.snapshots_folder(name) / snapshot)
                    if one.staged != staged[name]:
                        self._shelf.destroy(staged[name])
                    self._shelf.keep_snapshot(name, snapshot, SnapshotRecord(created, pause, kind))
        except BaseException as failed:
            for path in staged.values():
                self._shelf.destroy(path)
            if isinstance(failed, OSError) and failed.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"the snapshot {snapshot}: the disk is full") from failed
            raise

    def _take(self, making: Mapping[str, SnapshotMaking], gate: WriteGate) -> tuple[int, int]:
        """Take volumes as they are at one instant: that instant, and for how long it took."""
        for one in making.values():
            one.prepare()
        started = self._clock.monotonic_ns()
        gate.close()
        try:
            with ExitStack() as held:
                for one in making.values():
                    held.callback(one.release)
                    one.hold()
                created = self._clock.now_ns()
                for name, one in making.items():
                    self._shelf.folder(name)
                    one.take()
        finally:
            gate.open()
        return created, self._clock.monotonic_ns() - started

    def _making(self, name: str, staged: Path) -> SnapshotMaking:
        """How a volume's snapshot is made."""
        if self._reflinks:
            return ReflinkMaking(self._content(name), staged, self._clock)
        return CopyMaking(self._content(name), staged)

    def _check_source(self, name: str) -> None:
        """Raise :class:`SourceMissing` where the content is not there (case A36)."""
        self._shelf.folder(name)

    def _stage_snapshot(self, name: str, snapshot: str) -> Path:
        """An empty folder for a snapshot's content."""
        staged = self._shelf.staging / secrets.token_hex(8)
        staged.mkdir(mode=0o700)
        return staged

    def _place_snapshot(self, staged: Path, target: Path) -> None:
        """Move a finished snapshot to its place."""
        if target.exists():
            self._shelf.discard(target)  # a leftover: its record was never written
        os.rename(staged, target)

    def _copy(self, source: Path, target: Path) -> None:
        try:
            with beneath.opened(source) as reading, beneath.opened(target) as writing:
                copy_tree(reading, writing)
        except OSError as failed:
            if shutil.disk_usage(target).free < copying.BLOCK:
                raise NoSpace(f"copying {source}: the disk is full") from failed
            raise

    def view(self, name: str, snapshot: str) -> Path:
        """See :meth:`VolumeDriver.view`: a read-only bind, counted."""
        self._shelf.snapshot(name, snapshot)
        target = self._views / f"{name}@{snapshot}"
        if not self._viewers[name, snapshot]:
            target.mkdir(exist_ok=True)
            self._show(name, snapshot, target)
        self._viewers[name, snapshot] += 1
        return self._shown(name, target)

    def _show(self, name: str, snapshot: str, target: Path) -> None:
        """Mount a snapshot read-only."""
        content = self._shelf.snapshot(name, snapshot)
        mounts.bind(content, target, recursive=False, read_only=True)

    def _shown(self, name: str, target: Path) -> Path:
        """The root of a snapshot that :meth:`_show` mounted."""
        return target

    def release_view(self, name: str, snapshot: str) -> None:
        """See :meth:`VolumeDriver.release_view`."""
        if self._viewers[name, snapshot] > 1:
            self._viewers[name, snapshot] -= 1
            return
        del self._viewers[name, snapshot]
        beneath.remove_path(self._views / f"{name}@{snapshot}")

    def delete_snapshot(self, name: str, snapshot: str) -> None:
        """See :meth:`VolumeDriver.delete_snapshot`."""
        self._viewers[name, snapshot] = 0
        self.release_view(name, snapshot)
        self._shelf.delete_snapshot(name, snapshot)

    def clone(self, source: str, snapshot: str | None, name: str) -> None:
        """See :meth:`VolumeDriver.clone`: a copy, by reflink where the disk can."""
        if self.exists(name):
            return
        kept = self._shelf.record(source)
        if snapshot is None:
            self._check_source(source)
            origin = self._content(source)
        else:
            origin = self._shelf.snapshot(source, snapshot)

        def fill(staged: Path) -> None:
            self._prepare(staged, kept.options)
            self._copy(origin, staged / "data")

        self._shelf.make(name, VolumeRecord(kept.options, kept.limit), fill)

    def _prepare(self, staged: Path, options: Mapping[str, str]) -> None:
        """Make what an empty volume has in its folder."""
        self._make_data(staged / "data", options)

    def _make_data(self, data: Path, options: Mapping[str, str]) -> None:
        """Make the empty folder of a volume."""
        data.mkdir(mode=0o755)
        os.chmod(data, 0o755)

    def rollback(self, name: str, snapshot: str) -> None:
        """See :meth:`VolumeDriver.rollback`: a copy changes places with the data."""
        origin = self._shelf.snapshot(name, snapshot)
        self._shelf.refuse_if_mounted(name, "rolling back")
        staged = self._shelf.staging / secrets.token_hex(8)
        staged.mkdir(mode=0o700)
        self._copy(origin, staged)
        steps.reached("tree.rollback.staged")
        data = self._content(name)
        exchange(staged, data)
        status = origin.stat()
        os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))  # xfs moves it on a change
        steps.reached("tree.rollback.exchanged")
        self._shelf.discard(staged)

    def changes(self, name: str, base: str, target: str) -> Iterator[Change]:
        """See :meth:`VolumeDriver.changes`: both trees are compared."""
        for snapshot in (base, target):
            self._shelf.snapshot(name, snapshot)
        return self._compare(name, base, target)

    def _compare(self, name: str, base: str, target: str) -> Iterator[Change]:
        older, newer = self._shelf.snapshot(name, base), self._shelf.snapshot(name, target)
        with beneath.opened(older) as was, beneath.opened(newer) as now:
            suspects = by_extents if self._reflinks else everything
            yield from tree_changes(was, now, suspects, reflinks=self._reflinks)

    # ---- space

    def usage(self, name: str) -> VolumeUsage:
        """See :meth:`VolumeDriver.usage`: walks the volume."""
        limit = self._shelf.record(name).limit
        self._check_source(name)
        with beneath.opened(self._content(name)) as data:
            syncfs(data)
            total, shared = space.tree_space(data, space.flagged if self._reflinks else None)
        return VolumeUsage(total, total - shared, limit)

    def resize(self, name: str, size: int) -> None:
        """See :meth:`VolumeDriver.resize`: refused unless a subclass can."""
        self._shelf.folder(name)
        raise Unsupported(
            f"resizing {name}: the driver {self.capabilities.name} has no size limits",
            hint="clone it into a volume of the btrfs driver",
        )

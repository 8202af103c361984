"""What drivers have in common whose volumes are plain folders.

A snapshot is a copy of the folder made while the gate holds the writers.  Where the disk has
reflinks, nearly all of it is made before, and only what changed since is made then.
"""

from __future__ import annotations

import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from lazarette.storage import beneath, copying, mounts, space, steps
from lazarette.storage.changes import Change
from lazarette.storage.clock import Clock
from lazarette.storage.compare import tree_changes
from lazarette.storage.errors import NoSpace, Unsupported
from lazarette.storage.refresh import RefreshedCopy
from lazarette.storage.syscalls import syncfs
from lazarette.storage.volumes.contract import (
    SnapshotInfo,
    VolumeCapabilities,
    VolumeUsage,
    WriteGate,
)
from lazarette.storage.volumes.record import SnapshotRecord, VolumeRecord
from lazarette.storage.volumes.shelf import VolumeShelf, check_snapshot_id, exchange

# what a pass leaves to the next one is what is written while it runs, so passes get shorter
_PASS_GOAL_NS = 20_000_000
_MOST_PASSES = 6


class TreeVolumeDriver(ABC):
    """A driver whose volumes are folders; subclasses say where they come from.

    Args:
        root: the driver's folder on the host.
        base: its folder on the filesystem that holds the volumes.
        clock: for the instants of snapshots and measured pauses.
        reflinks: that filesystem shares extents between files.
    """

    def __init__(self, root: Path, base: Path, clock: Clock, *, reflinks: bool) -> None:
        self._shelf = VolumeShelf(base)
        self._clock = clock
        self._reflinks = reflinks
        self._views = root / "views"
        self._views.mkdir(exist_ok=True, mode=0o711)
        self._viewers: Counter[tuple[str, str]] = Counter()

    @property
    @abstractmethod
    def capabilities(self) -> VolumeCapabilities:
        """See :class:`VolumeCapabilities`."""

    @abstractmethod
    def create(self, name: str, options: Mapping[str, str]) -> None:
        """See :meth:`VolumeDriver.create`."""

    def recover(self) -> None:
        """See :meth:`VolumeDriver.recover`."""
        self._shelf.recover()
        self._drop_views()

    def _drop_views(self) -> None:
        for name in os.listdir(self._views):
            beneath.remove_path(self._views / name)
        self._viewers.clear()

    def close(self) -> None:
        """See :meth:`VolumeDriver.close`."""
        self._drop_views()

    def exists(self, name: str) -> bool:
        """See :meth:`VolumeDriver.exists`."""
        return self._shelf.exists(name)

    def names(self) -> list[str]:
        """See :meth:`VolumeDriver.names`."""
        return self._shelf.names()

    def location(self, name: str) -> Path:
        """See :meth:`VolumeDriver.location`."""
        return self._shelf.location(name)

    def _content(self, name: str) -> Path:
        """Where a volume's files are kept, mounted or not."""
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
        """See :meth:`VolumeDriver.rename`."""
        self._shelf.rename(name, new_name)

    # ---- snapshots

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

    def _snapshot_missing(self, names: Sequence[str], snapshot: str, gate: WriteGate) -> None:
        for name in names:
            self._check_source(name)
        staged = {name: self._stage_snapshot(name, snapshot) for name in names}
        try:
            created, pause = self._copy_held(staged, gate)
            steps.reached("tree.snapshot.copied")
            made = SnapshotRecord(created, pause, self.capabilities.snapshot)
            for name in names:
                self._place_snapshot(staged[name], self._shelf.snapshots_folder(name) / snapshot)
                self._shelf.keep_snapshot(name, snapshot, made)
        except BaseException:
            for path in staged.values():
                self._shelf.destroy(path)
            raise

    def _copy_held(self, staged: Mapping[str, Path], gate: WriteGate) -> tuple[int, int]:
        """Copy volumes as they are at one instant: that instant, and for how long it took."""
        with ExitStack() as opened:
            finish: list[Callable[[], object]] = []
            for name, folder in staged.items():
                source = opened.enter_context(beneath.opened(self._content(name)))
                target = opened.enter_context(beneath.opened(folder))
                finish.append(self._begin_copy(source, target))
            started = self._clock.monotonic_ns()
            gate.close()
            try:
                created = self._clock.now_ns()
                for name in staged:
                    self._settle(name)
                for step in finish:
                    step()
            finally:
                gate.open()
            return created, self._clock.monotonic_ns() - started

    def _begin_copy(self, source: int, target: int) -> Callable[[], object]:
        """Do what can be done while writers run; what is left to do while they are held."""
        syncfs(source)
        if not self._reflinks:
            return lambda: copying.copy_tree(source, target)
        copy = RefreshedCopy(source, target)
        previous: int | None = None
        for _ in range(_MOST_PASSES):
            started = self._clock.monotonic_ns()
            copy.refresh()
            took = self._clock.monotonic_ns() - started
            if took <= _PASS_GOAL_NS or (previous is not None and took > previous * 3 // 4):
                break  # short enough, or as short as it gets under this load
            previous = took
        return copy.refresh

    def _settle(self, name: str) -> None:
        """Bring what is written to the content's own filesystem, writers being held.

        Raises:
            VolumeNotFound: it was removed meanwhile.
        """
        self._shelf.folder(name)

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
                copying.copy_tree(reading, writing)
        except OSError as failed:
            if shutil.disk_usage(target).free < copying.BLOCK:
                raise NoSpace(f"copying {source}: the disk is full") from failed
            raise

    def snapshots(self, name: str) -> list[SnapshotInfo]:
        """See :meth:`VolumeDriver.snapshots`."""
        return self._shelf.snapshots(name)

    def view(self, name: str, snapshot: str) -> Path:
        """See :meth:`VolumeDriver.view`: a read-only bind, counted."""
        content = self._shelf.snapshot(name, snapshot)
        target = self._views / f"{name}@{snapshot}"
        if not self._viewers[name, snapshot]:
            target.mkdir(exist_ok=True)
            mounts.bind(content, target, recursive=False, read_only=True)
        self._viewers[name, snapshot] += 1
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
        older, newer = self._shelf.snapshot(name, base), self._shelf.snapshot(name, target)

        def compared() -> Iterator[Change]:
            with beneath.opened(older) as was, beneath.opened(newer) as now:
                yield from tree_changes(was, now, shared=self._reflinks)

        return compared()

    # ---- space

    def usage(self, name: str) -> VolumeUsage:
        """See :meth:`VolumeDriver.usage`: walks the volume."""
        limit = self._shelf.record(name).limit
        self._check_source(name)
        with beneath.opened(self._content(name)) as data:
            syncfs(data)
            total, shared = space.tree_space(data, shared=self._reflinks)
        return VolumeUsage(total, total - shared, limit)

    def resize(self, name: str, size: int) -> None:
        """See :meth:`VolumeDriver.resize`: refused unless a subclass can."""
        self._shelf.folder(name)
        raise Unsupported(
            f"resizing {name}: the driver {self.capabilities.name} has no size limits",
            hint="clone it into a volume of the btrfs driver",
        )

"""A filesystem with snapshots or reflinks in a sparse file, for hosts whose own has none.

The file is attached to a loop device with direct I/O and mounted with discard, so that
what is deleted inside is freed outside.  Rules of its size:

* It starts small and grows online, long before it is short (:data:`LOW_SHARE`): an
  application must not meet ENOSPC while the host has room.
* What it may still take from the host (its size less what it occupies) is never more
  than the host has free, less a reserve; when others fill the host, the pool shrinks
  where its format can.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lazarette.storage import btrfs, loop, mounts, process, xfs
from lazarette.storage.errors import NoSpace

MIB = 1 << 20
GIB = 1 << 30

FIRST_SIZE = 16 * GIB
SMALLEST = 512 * MIB
LOW_SHARE = 4
LOW_FLOOR = 2 * GIB
RESERVE_SHARE = 50
RESERVE_FLOOR = GIB
STEP = 256 * MIB
WATCH_SECONDS = 1.0

_log = logging.getLogger(__name__)


class PoolFormat(Enum):
    """What a pool is formatted as."""

    BTRFS = "btrfs"
    XFS = "xfs"


# 4 KiB metadata nodes: each fsync writes a log of whole nodes, and a database does little
# else; 0.61 of native against 0.48 with the default 16 KiB.  One copy of metadata: the
# second would be in the same file.
_MKFS = {
    PoolFormat.BTRFS: ("mkfs.btrfs", "-q", "-f", "-K", "-m", "single", "-n", "4096"),
    PoolFormat.XFS: ("mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1", "-s", "size=4096"),
}
_OPTIONS: dict[PoolFormat, tuple[tuple[str, str | None], ...]] = {
    PoolFormat.BTRFS: (("discard", "async"), ("ssd", None)),
    PoolFormat.XFS: (("discard", None),),
}


@dataclass(frozen=True, slots=True)
class PoolSpace:
    """Sizes in bytes: of the pool, free in it, taken by its file, free on the host."""

    size: int
    free: int
    allocated: int
    host_free: int
    host_size: int

    @property
    def ceiling(self) -> int:
        """The largest size the host can stand behind."""
        reserve = max(RESERVE_FLOOR, self.host_size // RESERVE_SHARE)
        return self.allocated + max(0, self.host_free - reserve)

    @property
    def wanted(self) -> int:
        """The size the pool should have now."""
        size = self.size
        if size > self.ceiling:
            return max(SMALLEST, self.ceiling - STEP) // MIB * MIB
        if self.free < max(LOW_FLOOR, size // LOW_SHARE):
            larger = min(size + max(FIRST_SIZE // 2, size // 2), self.ceiling) // MIB * MIB
            return larger if larger >= size + STEP else size
        return size


class Pool:
    """One pool file and its mount.

    Args:
        file: the pool file; made by :meth:`open` if absent.
        target: where it is mounted.
        format: what it is formatted as.
        first_size: its first size, bytes; by default small, see the module's text.
    """

    def __init__(
        self, file: Path, target: Path, format: PoolFormat, first_size: int | None = None
    ) -> None:
        self.file = file
        self.target = target
        self.format = format
        self._first_size = first_size
        self._fixed = first_size is not None
        self._resizing = threading.Lock()
        self._stop = threading.Event()
        self._watch: threading.Thread | None = None

    def open(self, *, watch: bool = True) -> None:
        """Make what is missing and mount it; repeatable, also by the next process.

        Raises:
            NoSpace: the host has no room for even the smallest pool.
            MissingFeature: no loop devices or no such filesystem.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.target.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            self._format()
        if not mounts.is_mount_point(self.target):
            self._mount()
        if watch and self._watch is None and not self._fixed:
            self._watch = threading.Thread(
                target=self._keep, name=f"pool {self.file.name}", daemon=True
            )
            self._watch.start()

    def _format(self) -> None:
        host = os.statvfs(self.file.parent)
        free = host.f_bavail * host.f_frsize
        size = self._first_size or min(FIRST_SIZE, free // 2)
        if size < SMALLEST and not self._fixed:
            raise NoSpace(
                f"making the pool {self.file}: only {free // MIB} MiB free",
                hint=f"free at least {2 * SMALLEST // MIB} MiB",
            )
        temporary = self.file.with_suffix(".new")
        with open(temporary, "wb") as made:
            made.truncate(size)
        os.chmod(temporary, 0o600)
        process.run([*_MKFS[self.format], str(temporary)])
        os.rename(temporary, self.file)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file open and locked, so that two processes cannot attach it twice."""
        # a descriptor of its own: the loop device would keep the other's lock for its life
        lock = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            backing = os.open(self.file, os.O_RDWR | os.O_CLOEXEC)
            try:
                yield backing
            finally:
                os.close(backing)
        finally:
            os.close(lock)

    def _mount(self) -> None:
        with self._locked() as backing:
            device: int | None = None
            path = loop.find(backing)
            if path is None:
                device, path = loop.attach(backing, os.fsencode(self.file))
            try:
                mounts.mount(
                    self.format.value,
                    self.target,
                    [("source", str(path)), *_OPTIONS[self.format]],
                )
            finally:
                if device is not None:
                    os.close(device)

    def close(self) -> None:
        """Stop watching, unmount and detach; the file stays.

        Raises:
            MountFailed: something in it is in use.
        """
        if self._watch is not None:
            self._stop.set()
            self._watch.join()
            self._watch = None
            self._stop.clear()
        mounts.detach_beneath(self.target)
        mounts.unmount(self.target)

    def space(self) -> PoolSpace:
        """How large the pool is and how much room there is, in it and on the host."""
        inside = os.statvfs(self.target)
        outside = os.statvfs(self.file)
        file = os.stat(self.file)
        return PoolSpace(
            size=file.st_size,
            free=inside.f_bavail * inside.f_frsize,
            allocated=file.st_blocks * 512,
            host_free=outside.f_bavail * outside.f_frsize,
            host_size=outside.f_blocks * outside.f_frsize,
        )

    def capacity(self) -> int:
        """Bytes the pool can ever hold as the host is now."""
        space = self.space()
        return space.size if self._fixed else max(space.size, space.ceiling)

    def maintain(self) -> PoolSpace:
        """Grow or shrink the pool as its rules ask; the space afterwards."""
        space = self.space()
        if self._fixed or space.wanted == space.size:
            return space
        self.resize(space.wanted)
        return self.space()

    def resize(self, size: int) -> None:
        """Set the pool's size online, bytes; a shrink is left out where the format cannot."""
        with self._resizing, self._locked() as backing:
            now = os.fstat(backing).st_size
            device = loop.find(backing)
            if device is None or size == now:
                return
            if size > now:
                os.ftruncate(backing, size)
                loop.update_capacity(device)
                self._resize_inside(None)
            elif self.format is PoolFormat.BTRFS:
                self._resize_inside(size)
                os.ftruncate(backing, size)
                loop.update_capacity(device)

    def _resize_inside(self, size: int | None) -> None:
        folder = os.open(self.target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if self.format is PoolFormat.BTRFS:
                btrfs.resize(folder, size)
                return
            xfs.grow(folder, os.stat(self.file).st_size)
        finally:
            os.close(folder)

    def _keep(self) -> None:
        while not self._stop.wait(WATCH_SECONDS):
            try:
                self.maintain()
            except OSError as refused:
                _log.warning("resizing the pool %s: %s", self.file, refused)

"""A filesystem with snapshots or reflinks in a sparse file, for hosts whose own has none.

The file is attached to a loop device with direct I/O and mounted with discard, so that
what is deleted inside is freed outside.  Rules of its size:

* It starts small and grows online, long before it is short (:data:`LOW_SHARE`): an
  application must not meet ENOSPC while the host has room.
* What it may still take from the host (its size less what it occupies) is never more
  than the host has free, less a reserve.  When others fill the host, a btrfs pool shrinks;
  an xfs pool, whose format cannot, keeps a file of its own in it (*ballast*) that takes the
  room away from everybody else.  What a btrfs pool cannot give up, because it is in use or
  because the pool would be too small to be a filesystem, it takes from the host at once,
  before somebody else does.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lazarette.storage import btrfs, loop, mounts, process, steps, xfs
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
LET_GO_SECONDS = 30.0
"""What servers over a pool, and jobs that read in it, are given to end when it is closed."""

_BALLAST = ".ballast"

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


def _reserve(host_size: int) -> int:
    """What is left to the host, bytes."""
    return max(RESERVE_FLOOR, host_size // RESERVE_SHARE)


@dataclass(frozen=True, slots=True)
class PoolSpace:
    """Sizes in bytes: of the pool, free in it, taken by its file, free on the host.

    Attributes:
        smallest: it cannot be made smaller than that.
    """

    size: int
    free: int
    allocated: int
    host_free: int
    host_size: int
    smallest: int = SMALLEST

    @property
    def ceiling(self) -> int:
        """The largest size the host can stand behind."""
        return self.allocated + max(0, self.host_free - _reserve(self.host_size))

    @property
    def wanted(self) -> int:
        """The size the pool should have now."""
        size = self.size
        if size > self.ceiling:
            return max(self.smallest, self.ceiling - STEP) // MIB * MIB
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
        fresh = not self.file.exists()
        if fresh:
            self._format()
        if not mounts.is_mount_point(self.target):
            self._mount()
        try:
            self.resize(self.space().size)
            self.maintain()
        except (OSError, NoSpace) as refused:
            if fresh:
                self.close()
                self.file.unlink()
                raise
            _log.warning("resizing the pool %s: %s", self.file, refused)
        if watch and self._watch is None and not self._fixed:
            self._watch = threading.Thread(
                target=self._keep, name=f"pool {self.file.name}", daemon=True
            )
            self._watch.start()

    def _format(self) -> None:
        host = os.statvfs(self.file.parent)
        free = host.f_bavail * host.f_frsize
        ceiling = free - _reserve(host.f_blocks * host.f_frsize)
        size = self._first_size or min(FIRST_SIZE, free // 2, max(SMALLEST, ceiling))
        if size < SMALLEST and not self._fixed:
            raise NoSpace(
                f"making the pool {self.file}: only {free // MIB} MiB free",
                hint=f"free at least {2 * SMALLEST // MIB} MiB",
            )
        temporary = self.file.with_suffix(".new")
        with open(temporary, "wb") as made:
            os.fchmod(made.fileno(), 0o600)
            made.truncate(size)
        process.run([*_MKFS[self.format], str(temporary)])
        if size > ceiling and not self._fixed:
            self._allocate(temporary)
        os.rename(temporary, self.file)

    def _allocate(self, file: Path) -> None:
        """Take the whole size from the host."""
        with open(file, "r+b") as made:
            try:
                os.posix_fallocate(made.fileno(), 0, os.fstat(made.fileno()).st_size)
            except OSError as refused:
                file.unlink()
                raise NoSpace(f"making the pool {self.file}: {refused.strerror}") from refused

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

        Whoever is just ending is waited for: a process that was killed, or told to end, keeps
        its files open until it is gone.

        Raises:
            MountFailed: something in it is in use, and by whom.
        """
        if self._watch is not None:
            self._stop.set()
            self._watch.join()
            self._watch = None
            self._stop.clear()
        mounts.detach_beneath(self.target)
        try:
            mounts.unmount(self.target, patience=LET_GO_SECONDS)
        except mounts.MountFailed as busy:
            by = "; ".join(mounts.users(self.target)) or "the kernel"
            raise mounts.MountFailed(f"{busy.message}; it is used by {by}") from busy

    def space(self) -> PoolSpace:
        """How large the pool is and how much room there is, in it and on the host."""
        inside = os.statvfs(self.target)
        outside = os.statvfs(self.file)
        file = os.stat(self.file)
        return PoolSpace(
            size=file.st_size - self.ballast(),
            free=inside.f_bavail * inside.f_frsize,
            allocated=file.st_blocks * 512,
            host_free=outside.f_bavail * outside.f_frsize,
            host_size=outside.f_blocks * outside.f_frsize,
            smallest=SMALLEST if self.format is PoolFormat.BTRFS else 0,
        )

    def ballast(self) -> int:
        """Bytes in the pool that nobody may have, because the host has them not."""
        try:
            return os.stat(self.target / _BALLAST).st_size
        except FileNotFoundError:
            return 0

    def capacity(self) -> int:
        """Bytes the pool can ever hold as the host is now."""
        space = self.space()
        return space.size if self._fixed else max(space.size, space.ceiling)

    def maintain(self) -> PoolSpace:
        """Grow or shrink the pool as its rules ask; the space afterwards.

        Raises:
            OSError: the filesystem in it could not be resized.
            NoSpace: it promises what the host has no more, and cannot shrink.
        """
        space = self.space()
        if self._fixed:
            return space
        try:
            if space.wanted != space.size:
                self.resize(space.wanted)
        finally:
            space = self.space()
            if space.size > space.ceiling and self.format is PoolFormat.BTRFS:
                self._take(space)
        return space

    def _take(self, space: PoolSpace) -> None:
        """Take from the host what the pool has promised."""
        missing = space.size - space.allocated
        if missing > space.host_free:
            raise NoSpace(
                f"the pool {self.file} may need {missing // MIB} MiB, and the host has "
                f"{space.host_free // MIB} MiB left",
                hint="free space on the host, or delete volumes and snapshots",
            )
        if missing > 0:
            with self._resizing, self._locked() as backing:
                os.posix_fallocate(backing, 0, os.fstat(backing).st_size)

    def resize(self, size: int) -> None:
        """Set the pool's size online, bytes.

        Raises:
            OSError: ``ENOSPC`` when what is in it leaves not so much free.
        """
        with self._resizing, self._locked() as backing:
            now = os.fstat(backing).st_size
            device = loop.find(backing)
            if device is None:
                return
            if size < now and self.format is PoolFormat.BTRFS:
                self._resize_inside(size)
                steps.reached("pool.resize.shrunk")
                os.ftruncate(backing, size)
                loop.update_capacity(device)
                return
            if size > now:
                os.ftruncate(backing, size)
            steps.reached("pool.resize.extended")
            # also what a killed process left half done
            loop.update_capacity(device)
            self._resize_inside(None)
            if self.format is PoolFormat.XFS:
                self._set_ballast(max(0, now - size))

    def _set_ballast(self, size: int) -> None:
        """Keep so many bytes of the pool from everybody, or as many as are free."""
        path = self.target / _BALLAST
        if size == 0 and not path.exists():
            return
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            now = os.fstat(file).st_size
            steps.reached("pool.resize.ballast")
            inside = os.fstatvfs(file)
            size = min(size, now + inside.f_bavail * inside.f_frsize // MIB * MIB)
            if size <= now:
                os.ftruncate(file, size)
                return
            try:
                os.posix_fallocate(file, now, size - now)
            except OSError as refused:
                if refused.errno != errno.ENOSPC:
                    raise
                os.ftruncate(file, now)  # what was found before it failed
        finally:
            os.close(file)

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
        complained = False
        while not self._stop.wait(WATCH_SECONDS):
            try:
                self.maintain()
            except (OSError, NoSpace) as refused:
                if not complained:
                    _log.warning("resizing the pool %s: %s", self.file, refused)
                complained = True
            else:
                complained = False

"""SQLite files held still from the host, by the locks SQLite itself would take.

No content is parsed and SQLite's own code never runs over a container's files as root: only
byte-range locks are taken, at the places of https://www.sqlite.org/fileformat2.html#walindexformat
and of ``os.h``:

* in rollback mode, whoever wants to write must lock the *reserved* byte of the database;
* in WAL mode, byte 120 of the ``-shm`` file.

While these locks are held no write transaction is going on anywhere, readers go on, and a
snapshot shows a database between two transactions.  The locks end with the descriptors,
whatever happens to this process.  (A process that itself has one of these files open through
SQLite must not use this: closing a descriptor would end its SQLite's locks.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from types import TracebackType

from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import Unavailable

_MAGIC = b"SQLite format 3\0"
_RESERVED_BYTE = 0x40000000 + 1
_WAL_WRITE_LOCK = 120
_MOST_FILES = 200_000
_PAUSE = 0.005


class SqliteBusy(Unavailable):
    """A write transaction did not end in time."""

    number = 263


class SqliteLocks:
    """Write locks on every SQLite database beneath a folder; a context manager.

    Args:
        root: the volume's root.
        clock: for waiting.
        timeout: seconds to wait for transactions going on, all together.
    """

    def __init__(self, root: bytes, clock: Clock, timeout: float = 5.0) -> None:
        self._root = root
        self._clock = clock
        self._timeout = timeout
        self._held: list[int] = []
        self.databases = 0

    def __enter__(self) -> SqliteLocks:
        try:
            self._take()
        except BaseException:
            self.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let go; may be called again."""
        while self._held:
            os.close(self._held.pop())

    def _take(self) -> None:
        end = self._clock.monotonic_ns() + round(self._timeout * NANOSECONDS)
        for folder, name in _databases(self._root):
            self.databases += 1
            file = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            self._held.append(file)
            self._lock(file, _RESERVED_BYTE, name, end)
            try:
                flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
                shared = os.open(name + b"-shm", flags, dir_fd=folder)
            except FileNotFoundError:
                continue
            self._held.append(shared)
            self._lock(shared, _WAL_WRITE_LOCK, name, end)

    def _lock(self, file: int, offset: int, name: bytes, end: int) -> None:
        """An open file description's lock: closing another descriptor does not end it."""
        wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
        while True:
            try:
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, wanted)
            except OSError as busy:
                if busy.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            else:
                return
            if self._clock.monotonic_ns() >= end:
                raise SqliteBusy(f"a transaction on {os.fsdecode(name)!r} does not end")
            self._clock.sleep(_PAUSE)


def _databases(root: bytes) -> Iterator[tuple[int, bytes]]:
    """Folder descriptor and name of each SQLite file; no symbolic link is followed."""
    looked_at = 0
    for _, _, files, folder in os.fwalk(root, follow_symlinks=False):
        for name in files:
            looked_at += 1
            if looked_at > _MOST_FILES:
                raise Unavailable(
                    f"more than {_MOST_FILES} files to search for SQLite databases",
                    hint="use a hook or mode pause for this volume",
                )
            if _is_database(folder, name):
                yield folder, name


def _is_database(folder: int, name: bytes) -> bool:
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or status.st_size < 512:
            return False
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return False
    try:
        return os.pread(file, len(_MAGIC), 0) == _MAGIC
    finally:
        os.close(file)

"""A local cache of blocks of chunks, shared by everything that reads one repository.

What is kept are the stored bytes, still encrypted, each with a checksum, written whole or not
at all: a copy torn by a power cut is noticed and fetched again.  Losing the folder costs time,
nothing else.  Several processes may use one folder; the blocks used longest ago go first.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from lazarette.backup.repository.treecache import ObjectCache
from lazarette.backup.stores.contract import Buffer
from lazarette.storage.clock import NANOSECONDS, Clock

_SLACK = 16
_SPARE = 20
_STALE_NS = 3600 * NANOSECONDS


class BlockCache:
    """Stored blocks by pack and offset.

    Args:
        folder: where they are kept.
        limit: bytes on disk; passed by at most a sixteenth.
        clock: to tell what is stale.
    """

    def __init__(self, folder: Path, limit: int, clock: Clock) -> None:
        self._folder = folder
        self._limit = limit
        self._clock = clock
        self._files = ObjectCache(folder)
        self._lock = threading.Lock()
        self._written = limit  # so that the first write looks at what is there

    def read(self, pack: bytes, offset: int) -> bytes | None:
        """A block as it is stored in its pack; None when it is not here or not whole."""
        name = _name(pack, offset)
        data = self._files.read(name)
        if data is not None:
            with contextlib.suppress(OSError):
                os.utime(self._folder / name)
        return data

    def write(self, pack: bytes, offset: int, data: Buffer) -> None:
        """Keep a block; a full disk or a lost folder is no error.

        Nothing is kept while less than a twentieth of the filesystem is free.
        """
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return
        if disk.f_bavail * _SPARE < disk.f_blocks:
            return
        with self._lock:
            self._written += len(data)
            if self._written > self._limit // _SLACK:
                self._written = 0
                self._shrink()
        self._files.write(_name(pack, offset), data)

    def drop(self, pack: bytes, offset: int) -> None:
        """Forget a block."""
        self._files.drop(_name(pack, offset))

    def _shrink(self) -> None:
        """Delete what was used longest ago until the limit is kept, and torn writes."""
        found: list[tuple[int, int, str]] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if not entry.name.startswith("."):
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
                    elif self._clock.now_ns() - status.st_mtime_ns > _STALE_NS:
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._limit:
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size


def _name(pack: bytes, offset: int) -> str:
    return f"{pack.hex()}-{offset}"

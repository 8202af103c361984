"""A copy on the local disk of objects that never change.

Indexes, snapshots and keys are written once under names that are theirs alone; a host
that has read one need not fetch it again.  Only names beneath the given prefixes are
cached, and only whole.  The folder may be deleted at any time.

Deviation from the contract, on purpose: an object that another host deleted may still be
read from here.  What exists is decided by lists, which always ask the store.  A name that
``replace`` is used on is no longer cached by this process.

A file of the cache is 16 bytes of XXH3-128 of the object, then the object.  A file that
does not match is dropped and fetched again.  When the cache is over its size, the files
used longest ago go first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from lazarette.backup.stores.contract import BlobStore, Buffer, ShortBlob
from lazarette.backup.stores.wrapper import StoreWrapper

_HEAD = 16


@dataclass(slots=True)
class CacheCounts:
    """How the cache did: reads answered from it, reads it had to pass on, files dropped."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0


class CachedStore(StoreWrapper):
    """Keeps local copies of unchanging objects.

    Args:
        inner: the store.
        folder: this repository's own; made if missing.
        prefixes: what may be cached, e.g. ``("index/", "snapshots/")``.
        max_bytes: size of all copies together, about.
    """

    def __init__(
        self, inner: BlobStore, folder: str, prefixes: Sequence[str], max_bytes: int = 1 << 30
    ) -> None:
        super().__init__(inner)
        self._folder = folder
        self._prefixes = tuple(prefixes)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._changing: set[str] = set()
        self.counts = CacheCounts()
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self._size = sum(size for _, size, _ in self._files())

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        """See :meth:`BlobStore.put`; what was written is cached at once."""
        tag = self.inner.put(name, data, if_absent=if_absent)
        self._keep(name, bytes(data))
        return tag

    def replace(self, name: str, data: Buffer, tag: str) -> str:
        """See :meth:`BlobStore.replace`."""
        with self._lock:
            self._changing.add(name)
        self._drop(name)
        return self.inner.replace(name, data, tag)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`BlobStore.get`."""
        if not name.startswith(self._prefixes):
            return self.inner.get(name, offset, length)
        data = self._cached(name)
        if data is None:
            self.counts.misses += 1
            if offset or length is not None:
                return self.inner.get(name, offset, length)
            data = self.inner.get(name)
            self._keep(name, data)
        else:
            self.counts.hits += 1
        end = len(data) if length is None else offset + length
        if offset > len(data) or end > len(data):
            raise ShortBlob(f"object {name} in {self.url} ends before byte {max(end, offset)}")
        return data[offset:end]

    def delete(self, name: str) -> None:
        """See :meth:`BlobStore.delete`."""
        self.inner.delete(name)
        self._drop(name)

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, xxhash.xxh3_128_hexdigest(name.encode()))

    def _cached(self, name: str) -> bytes | None:
        if name in self._changing:
            return None
        path = self._path(name)
        try:
            with open(path, "rb") as file:
                stored = file.read()
            os.utime(path)
        except OSError:
            return None
        data = stored[_HEAD:]
        if stored[:_HEAD] != xxhash.xxh3_128_digest(data):
            self.counts.damaged += 1
            self._drop(name)
            return None
        return data

    def _keep(self, name: str, data: bytes) -> None:
        """Best effort: a full or read-only disk only costs speed."""
        if not name.startswith(self._prefixes) or len(data) > self._max_bytes // 4:
            return
        temporary = os.path.join(self._folder, "." + os.urandom(8).hex())
        try:
            with open(temporary, "wb") as file:
                file.write(xxhash.xxh3_128_digest(data) + data)
            with self._lock:
                if name not in self._changing:
                    os.replace(temporary, self._path(name))
                    self._size += len(data) + _HEAD
                    if self._size > self._max_bytes:
                        self._shrink()
        except OSError:
            pass
        _remove(temporary)

    def _drop(self, name: str) -> None:
        _remove(self._path(name))

    def _files(self) -> list[tuple[int, int, str]]:
        """Last use, size and path of every file, used longest ago first."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                found.append((status.st_mtime_ns, status.st_size, entry.path))
        return sorted(found)

    def _shrink(self) -> None:
        """Down to nine tenths, so that it is not done again at once."""
        files = self._files()
        self._size = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._size <= self._max_bytes * 9 // 10:
                return
            _remove(path)
            self._size -= size


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass

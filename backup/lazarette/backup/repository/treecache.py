"""Local copies of what is read again and again: packs of directories, index objects.

The copies are the stored bytes, still encrypted; each is checked by the checksums it
carries when it is read, and fetched again when it does not hold.  Losing the folder costs
time, nothing else.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from lazarette.backup.repository.format import RepositoryDamaged, checksum, pack_name
from lazarette.backup.repository.packs import verify_pack
from lazarette.backup.stores.contract import BlobStore, Buffer


class ObjectCache:
    """Files in a folder, one an object, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def read(self, name: str) -> bytes | None:
        """The copy of an object, or None when there is none."""
        try:
            data = self._path(name).read_bytes()
        except OSError:
            return None
        if len(data) < 8 or checksum(memoryview(data)[:-8]).to_bytes(8, "little") != data[-8:]:
            self.drop(name)
            return None
        return data[:-8]

    def write(self, name: str, data: Buffer) -> None:
        """Keep a copy; a full disk or a lost folder is no error."""
        path = self._path(name)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.write(checksum(data).to_bytes(8, "little"))
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """Forget a copy."""
        self._path(name).unlink(missing_ok=True)

    def names(self) -> set[str]:
        """What is kept."""
        return {
            entry.replace("=", "/")
            for entry in os.listdir(self._folder)
            if not entry.startswith(".")
        }

    def _path(self, name: str) -> Path:
        return self._folder / name.replace("/", "=")


class TreeCache:
    """Ranges of packs of directories, from a local copy of the whole pack.

    Args:
        store: where packs are.
        objects: where copies are kept; None keeps the last few in memory only.
    """

    _IN_MEMORY = 8

    def __init__(self, store: BlobStore, objects: ObjectCache | None) -> None:
        self._store = store
        self._objects = objects
        self._lock = threading.Lock()
        self._recent: dict[bytes, bytes] = {}

    def range(self, pack: bytes, offset: int, length: int) -> Buffer:
        """Stored bytes of a pack; falls back to the store when the pack is damaged."""
        with self._lock:
            data = self._recent.get(pack)
        if data is None:
            data = self._load(pack)
        if data is None:
            return self._store.get(pack_name(pack), offset, length)
        return memoryview(data)[offset : offset + length]

    def add(self, pack: bytes, data: Buffer) -> None:
        """Keep a pack that was just written."""
        if self._objects is not None:
            self._objects.write(pack_name(pack), data)

    def _load(self, pack: bytes) -> bytes | None:
        name = pack_name(pack)
        data = None if self._objects is None else self._objects.read(name)
        if data is None:
            data = self._store.get(name)
            try:
                verify_pack(name, data)
            except RepositoryDamaged:
                return None
            self.add(pack, data)
        with self._lock:
            self._recent[pack] = data
            while len(self._recent) > self._IN_MEMORY:
                del self._recent[next(iter(self._recent))]
        return data

"""Blobs from a registry: resumed where they broke, verified before they are anything.

A download grows in ``partial/HEX`` and stays there when it breaks, also when the daemon
dies; the next try asks for the rest by a range.  Only a file whose digest is right
becomes a blob.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from weakref import WeakValueDictionary

from lazarette.runtime.images.blobs import Blob, BlobStore
from lazarette.runtime.images.errors import DigestMismatch, RegistryFault
from lazarette.runtime.images.model import Descriptor
from lazarette.runtime.images.registry import Repository
from lazarette.storage.errors import NoSpace

_READ = 1 << 20
_FIRST_PAUSE = 0.2
_SPARE = 64 << 20


class Downloads:
    """Fetches blobs, each once at a time however many pulls want it.

    Args:
        blobs: where they go.
        attempts: tries in a row without a single new byte before giving up.
    """

    def __init__(self, blobs: BlobStore, attempts: int = 5) -> None:
        self._blobs = blobs
        self._attempts = attempts
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def fetch(
        self, source: Repository, wanted: Descriptor, progress: Callable[[int], None]
    ) -> Blob:
        """A blob, from the store if it is there.

        Args:
            source: the repository that has it.
            wanted: its digest and size.
            progress: told of the bytes that are there.

        Raises:
            DigestMismatch: what came is something else.
            RegistryFault: the connection broke too often, or the blob is not there.
            NoSpace: the disk would be full.
        """
        blob = Blob(wanted.digest, wanted.size)
        async with self._locks.setdefault(wanted.digest, asyncio.Lock()):
            if not self._blobs.has(wanted.digest):
                await self._fetch(source, blob, progress)
        return blob

    async def _fetch(self, source: Repository, blob: Blob, progress: Callable[[int], None]) -> None:
        partial = _Partial(self._blobs.partial / blob.digest.removeprefix("sha256:"), blob)
        self._check_space(blob.size)
        try:
            resumed = await asyncio.to_thread(partial.open)
            try:
                await self._receive(source, partial, progress)
                partial.verify()
            except DigestMismatch:
                if not resumed:
                    raise
                # What a crash left may be damaged: once more, from the beginning.
                await self._receive(source, partial, progress)
                partial.verify()
        except DigestMismatch:
            partial.path.unlink(missing_ok=True)
            raise
        finally:
            partial.close()
        await asyncio.to_thread(self._blobs.adopt, partial.path, blob)

    async def _receive(
        self, source: Repository, partial: _Partial, progress: Callable[[int], None]
    ) -> None:
        failures = 0
        while partial.size < partial.blob.size:
            before = partial.size
            try:
                async with source.blob(partial.blob.digest, partial.size) as (start, pieces):
                    if start != partial.size:
                        partial.restart()
                    async for piece in pieces:
                        await asyncio.to_thread(partial.write, piece)
                        progress(partial.size)
                if partial.size < partial.blob.size:
                    raise RegistryFault(f"download of {partial.blob.digest} ended too early")
            except RegistryFault:
                failures = 1 if partial.size > before else failures + 1
                if failures >= self._attempts:
                    raise
                await asyncio.sleep(_FIRST_PAUSE * 2**failures)

    def _check_space(self, size: int) -> None:
        disk = os.statvfs(self._blobs.partial)
        if size + _SPARE > disk.f_bavail * disk.f_frsize:
            raise NoSpace(
                f"no room for a layer of {size} bytes", hint="docker image prune frees space"
            )


class _Partial:
    """A download that is not finished."""

    def __init__(self, path: Path, blob: Blob) -> None:
        self.path = path
        self.blob = blob
        self.size = 0
        self._hash = hashlib.sha256()
        self._file = -1

    def open(self) -> bool:
        """Take up what an earlier try left; whether there was anything."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        while data := os.read(self._file, _READ):
            self._hash.update(data)
            self.size += len(data)
        if self.size > self.blob.size:
            self.restart()
        return self.size > 0

    def restart(self) -> None:
        """Forget what is there."""
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> None:
        """Append.

        Raises:
            DigestMismatch: more comes than was announced.
        """
        if self.size + len(piece) > self.blob.size:
            self.restart()
            raise DigestMismatch(f"{self.blob.digest} is longer than {self.blob.size} bytes")
        view = memoryview(piece)
        while view:
            view = view[os.write(self._file, view) :]
        self._hash.update(piece)
        self.size += len(piece)

    def verify(self) -> None:
        """See that it is what was asked for; if not, it is emptied.

        Raises:
            DigestMismatch: it is not.
        """
        found = "sha256:" + self._hash.hexdigest()
        if found != self.blob.digest:
            self.restart()
            raise DigestMismatch(
                f"filesystem layer verification failed for digest {self.blob.digest}",
                hint="pull again; if it stays, the registry's copy is damaged",
            )

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

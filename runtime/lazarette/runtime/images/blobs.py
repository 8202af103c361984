"""Content-addressed files: configurations, manifests and compressed layers.

``blobs/sha256/HEX`` exists only whole and verified: bytes go to ``ingest/``, are hashed
on the way, synced, and renamed.  What a killed process left in ``ingest/`` is removed by
:meth:`BlobStore.recover`; unfinished downloads live in ``partial/`` and are kept, so
that a pull goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from lazarette.runtime.images.compression import CHUNK, HEAD, Encoding, read_up_to, sniff
from lazarette.runtime.images.errors import BadArchive, DigestMismatch, InvalidReference
from lazarette.runtime.images.reference import is_digest
from lazarette.storage.clock import NANOSECONDS

_ZSTD_LEVEL = 1
_ABANDONED_NS = 7 * 24 * 3600 * NANOSECONDS


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored file.

    Attributes:
        digest: ``sha256:…`` of its bytes.
        size: its bytes.
    """

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """A stored layer: the file, and of which tar it is the compressed form.

    Attributes:
        blob: the file.
        encoding: how the tar is compressed in it.
        diff_id: digest of the tar; empty if not known yet.
        tar_size: bytes of the tar; 0 if not known yet.
    """

    blob: Blob
    encoding: Encoding
    diff_id: str = ""
    tar_size: int = 0


class BlobStore:
    """Blobs under one folder.

    Args:
        root: the folder; made if absent.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._final = root / "sha256"
        self.ingest = root / "ingest"
        self.partial = root / "partial"
        for folder in (self._final, self.ingest, self.partial):
            folder.mkdir(parents=True, exist_ok=True)

    def recover(self, now_ns: int) -> None:
        """Remove what was being written when the last process died.

        Args:
            now_ns: wall clock; downloads nobody went on with for a week are given up.
        """
        for partial in self.partial.iterdir():
            if now_ns - partial.stat().st_mtime_ns > _ABANDONED_NS:
                partial.unlink()
        for left in self.ingest.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()

    def path(self, digest: str) -> Path:
        """Where a blob is or would be.

        Raises:
            InvalidReference: not a SHA-256 digest.
        """
        if not is_digest(digest) or not digest.startswith("sha256:"):
            raise InvalidReference(f'unsupported digest "{digest}"')
        return self._final / digest.removeprefix("sha256:")

    def has(self, digest: str) -> bool:
        """Whether the blob is there."""
        return self.path(digest).exists()

    def size(self, digest: str) -> int:
        """Bytes of a stored blob."""
        return self.path(digest).stat().st_size

    def stored(self, digest: str) -> Blob:
        """A stored blob by its digest."""
        return Blob(digest, self.size(digest))

    def read(self, digest: str) -> bytes:
        """A small blob, verified.

        Raises:
            DigestMismatch: the file was changed under us.
        """
        data = self.path(digest).read_bytes()
        if "sha256:" + hashlib.sha256(data).hexdigest() != digest:
            raise DigestMismatch(f"blob {digest} is damaged on disk", hint="pull the image again")
        return data

    def open(self, digest: str) -> BinaryIO:
        """A blob as a stream; the caller closes it."""
        return cast(BinaryIO, self.path(digest).open("rb", buffering=0))

    def collect(self, live: Collection[str]) -> int:
        """Remove every blob that is not live.

        Returns:
            Bytes freed.
        """
        freed = 0
        for file in list(self._final.iterdir()):
            if "sha256:" + file.name not in live:
                freed += file.stat().st_size
                file.unlink()
        return freed

    def put(self, data: bytes) -> Blob:
        """Store bytes."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if not self.has(digest):
            with self.writer() as writer:
                writer.write(data)
        return Blob(digest, len(data))

    @contextmanager
    def writer(self, expected: str = "") -> Iterator[BlobWriter]:
        """A new blob, written in pieces; stored when the block ends without an error.

        Args:
            expected: digest it must have, if known.

        Raises:
            DigestMismatch: it has another one.
        """
        handle, name = tempfile.mkstemp(dir=self.ingest)
        with os.fdopen(handle, "wb", buffering=0) as file:
            try:
                writer = BlobWriter(file)
                yield writer
                self._publish(Path(name), file.fileno(), writer.blob, expected)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(name)
                raise

    def adopt(self, file: Path, blob: Blob) -> None:
        """Move a finished, already verified file of the same filesystem in as a blob."""
        with file.open("rb") as opened:
            self._publish(file, opened.fileno(), blob, blob.digest)

    def put_layer(self, source: BinaryIO) -> LayerBlob:
        """Store a layer as it comes: compressed ones as they are, a plain tar as zstd."""
        head = read_up_to(source, HEAD)
        encoding = sniff(head)
        if encoding is Encoding.NONE:
            return self._compress(head, source)
        with self.writer() as writer:
            writer.write(head)
            while data := source.read(CHUNK):
                writer.write(data)
        return LayerBlob(writer.blob, encoding)

    def _compress(self, head: bytes, source: BinaryIO) -> LayerBlob:
        plain = hashlib.sha256(head)
        size = len(head)
        packer = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj()
        with self.writer() as writer:
            writer.write(packer.compress(head))
            while data := source.read(CHUNK):
                plain.update(data)
                size += len(data)
                writer.write(packer.compress(data))
            writer.write(packer.flush())
        if size == 0:
            raise BadArchive("a layer is empty: not even an end of archive")
        return LayerBlob(writer.blob, Encoding.ZSTD, "sha256:" + plain.hexdigest(), size)

    def _publish(self, file: Path, handle: int, blob: Blob, expected: str) -> None:
        if expected and blob.digest != expected:
            raise DigestMismatch(f"content has digest {blob.digest}, not {expected} as announced")
        os.fsync(handle)
        os.rename(file, self.path(blob.digest))
        folder = os.open(self._final, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class BlobWriter:
    """A blob being written; hashes as it goes."""

    def __init__(self, file: BinaryIO | object) -> None:
        self._file = cast(BinaryIO, file)
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append."""
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._hash.update(data)
        self._size += len(data)

    @property
    def blob(self) -> Blob:
        """What was written so far."""
        return Blob("sha256:" + self._hash.hexdigest(), self._size)

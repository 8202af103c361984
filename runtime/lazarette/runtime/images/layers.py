"""Layers of images: each unpacked once in the layer driver, each kept once as a blob.

A layer is named by its chain id.  It exists for images only when its row is in the
database, and the row is written only after the driver has unpacked the whole tar and the
tar's digest was found right.  A layer the driver has without a row is what a killed
process left; :meth:`LayerStore.recover` removes it.
"""

from __future__ import annotations

import hashlib
import io
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

from lazarette.runtime.images.blobs import Blob, BlobStore, LayerBlob
from lazarette.runtime.images.compression import CHUNK, Encoding, Unpacked, UnpackLimits
from lazarette.runtime.images.errors import DigestMismatch
from lazarette.runtime.images.model import digest_of, layer_key
from lazarette.storage.errors import InUse
from lazarette.storage.layers.contract import CommitsInPlace, LayerDriver
from lazarette.storage.state import State

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MIGRATIONS = (
    """
    CREATE TABLE image_layers (
        chain TEXT PRIMARY KEY, parent TEXT, diff_id TEXT NOT NULL,
        blob TEXT NOT NULL, encoding TEXT NOT NULL, blob_size INTEGER NOT NULL,
        tar_size INTEGER NOT NULL, size INTEGER NOT NULL) STRICT;
    CREATE INDEX image_layers_diff_id ON image_layers (diff_id);
    CREATE TABLE layer_blobs (
        diff_id TEXT NOT NULL, repository TEXT NOT NULL, digest TEXT NOT NULL,
        size INTEGER NOT NULL, PRIMARY KEY (diff_id, repository)) STRICT
    """,
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer on its parents.

    Attributes:
        chain: its chain id, the name of the whole stack up to it.
        parent: chain id of the layer below; None for the lowest.
        diff_id: digest of its tar.
        blob: the stored compressed tar.
        encoding: how that is compressed.
        tar_size: bytes of the tar.
        size: bytes of the files it adds.
    """

    chain: str
    parent: str | None
    diff_id: str
    blob: Blob
    encoding: Encoding
    tar_size: int
    size: int

    @property
    def key(self) -> str:
        """The layer driver's name for it."""
        return layer_key(self.chain)


class LayerStore:
    """The layers all images share.

    Args:
        driver: where they are unpacked.
        blobs: where their compressed tars are.
        state: the daemon's database.
        limits: what one layer may unpack to.
    """

    def __init__(
        self,
        driver: LayerDriver,
        blobs: BlobStore,
        state: State,
        limits: UnpackLimits | None = None,
    ) -> None:
        self.driver = driver
        self.blobs = blobs
        self._state = state
        self._limits = limits or UnpackLimits()
        self._lock = threading.Lock()
        self._busy: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        state.migrate("image_layers", MIGRATIONS)

    def recover(self) -> None:
        """Make database and driver agree: rows without a layer and layers without a row go."""
        known = {layer.key: layer for layer in self.all()}
        names: list[str] = self.driver.keys()
        present = {key for key in names if key.startswith("sha256-")}
        for key in known.keys() - present:
            self._forget(known[key].chain)
        self._remove_unknown(present - known.keys())

    def _remove_unknown(self, keys: Collection[str]) -> None:
        # Children go before parents; the driver refuses a parent, so go round until nothing moves.
        left = set(keys)
        while left:
            gone = {key for key in left if self._try_remove(key)}
            if not gone:
                return
            left -= gone

    def _try_remove(self, key: str) -> bool:
        try:
            self.driver.remove(key)
        except InUse:
            return False
        return True

    def all(self) -> list[Layer]:
        """Every layer."""
        return [_layer(row) for row in self._state.rows("SELECT * FROM image_layers")]

    def get(self, chain: str) -> Layer | None:
        """A layer by its chain id; None if there is none."""
        row = self._state.row("SELECT * FROM image_layers WHERE chain = ?", (chain,))
        return None if row is None else _layer(row)

    def stored_as(self, diff_id: str) -> LayerBlob | None:
        """A stored blob of that tar, whatever it lies on; None if there is none."""
        row = self._state.row("SELECT * FROM image_layers WHERE diff_id = ?", (diff_id,))
        if row is None:
            return None
        layer = _layer(row)
        return LayerBlob(layer.blob, layer.encoding, layer.diff_id, layer.tar_size)

    def with_diff_id(self, stored: LayerBlob) -> LayerBlob:
        """A stored layer with its tar's digest and size, found by unpacking if need be.

        Raises:
            BadArchive: the stream is broken or a bomb.
        """
        if stored.diff_id:
            return stored
        with self.blobs.open(stored.blob.digest) as packed, Unpacked(packed, self._limits) as tar:
            seen = _Hashing(cast(BinaryIO, tar))
            seen.finish()
            return LayerBlob(stored.blob, tar.encoding, seen.digest, tar.count)

    def add(self, parent: str | None, source: LayerBlob, diff_id: str) -> Layer:
        """Unpack a stored blob on a parent; nothing happens if that was done before.

        Args:
            parent: chain id of the layer below.
            source: a blob of the store.
            diff_id: digest the unpacked tar must have.

        Raises:
            DigestMismatch: it has another one; nothing of it stays.
            BadArchive: the stream is broken or a bomb.
            InvalidArgument: the tar is hostile.
        """
        chain = digest_of(f"{parent} {diff_id}".encode()) if parent else diff_id
        with self._one_at_a_time(chain):
            known = self.get(chain)
            if known is not None:
                return known
            return self._unpack(chain, parent, source, diff_id)

    def _unpack(self, chain: str, parent: str | None, source: LayerBlob, diff_id: str) -> Layer:
        key = layer_key(chain)
        with self.blobs.open(source.blob.digest) as packed, Unpacked(packed, self._limits) as tar:
            try:
                applied = self.driver.apply(
                    key, layer_key(parent) if parent else None, cast(BinaryIO, tar)
                )
                tar.finish()
                if applied.diff_id != diff_id:
                    raise DigestMismatch(f"layer unpacks to {applied.diff_id}, not {diff_id}")
            except BaseException:
                self.driver.remove(key)
                raise
            layer = Layer(
                chain, parent, diff_id, source.blob, tar.encoding, tar.count, applied.size
            )
        self._note(layer)
        return layer

    def adopt(self, parent: str | None, key: str, source: LayerBlob, size: int) -> Layer:
        """Make an active layer of the driver one of images; it is gone under its old key.

        Args:
            parent: chain id of the layer below.
            key: the driver's name of it; unmounted, and not used any more.
            source: its diff, stored.
            size: bytes of the files it adds.
        """
        diff_id = source.diff_id
        chain = digest_of(f"{parent} {diff_id}".encode()) if parent else diff_id
        with self._one_at_a_time(chain):
            known = self.get(chain)
            if known is None and isinstance(self.driver, CommitsInPlace):
                self.driver.commit_as(key, layer_key(chain), size=size, diff_id=diff_id)
                layer = Layer(
                    chain, parent, diff_id, source.blob, source.encoding, source.tar_size, size
                )
                self._note(layer)
                return layer
            made = known or self._unpack(chain, parent, source, diff_id)
        self.driver.remove(key)
        return made

    def _note(self, layer: Layer) -> None:
        with self._state.write() as db:
            db.execute(
                "INSERT INTO image_layers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    layer.chain,
                    layer.parent,
                    layer.diff_id,
                    layer.blob.digest,
                    layer.encoding.value,
                    layer.blob.size,
                    layer.tar_size,
                    layer.size,
                ),
            )

    def remove_unused(self, used: Collection[str]) -> list[str]:
        """Remove layers no image uses; those still under a container stay for later.

        Args:
            used: chain ids that stay.

        Returns:
            Chain ids removed, topmost first.
        """
        unused = {layer.chain: layer for layer in self.all() if layer.chain not in used}
        removed: list[str] = []
        while unused:
            parents = {layer.parent for layer in unused.values()}
            tops = [chain for chain in unused if chain not in parents]
            for chain in tops:
                layer = unused.pop(chain)
                if self._try_remove(layer.key):
                    self._forget(chain)
                    removed.append(chain)
                else:
                    _drop_ancestors(unused, layer.parent)
            if not tops:
                break
        return removed

    def live_blobs(self) -> set[str]:
        """Digests of the blobs that layers need."""
        return {row["blob"] for row in self._state.rows("SELECT blob FROM image_layers")}

    def remember_blob(self, diff_id: str, repository: str, blob: Blob) -> None:
        """Note which blob of a repository is the compressed form of a tar."""
        with self._state.write() as db:
            db.execute(
                "INSERT OR REPLACE INTO layer_blobs VALUES (?, ?, ?, ?)",
                (diff_id, repository, blob.digest, blob.size),
            )

    def remembered_blobs(self, diff_id: str) -> dict[str, Blob]:
        """Blobs of that tar in repositories, by the repository's full name."""
        rows = self._state.rows("SELECT * FROM layer_blobs WHERE diff_id = ?", (diff_id,))
        return {row["repository"]: Blob(row["digest"], row["size"]) for row in rows}

    @contextmanager
    def open_tar(self, layer: Layer) -> Iterator[BinaryIO]:
        """The layer's tar as it was first stored, byte for byte.

        Raises:
            DigestMismatch: at the end of the block, if all was read and it is not the same.
        """
        with self.blobs.open(layer.blob.digest) as packed, Unpacked(packed) as tar:
            seen = _Hashing(cast(BinaryIO, tar))
            yield seen.stream
            if tar.count >= layer.tar_size and seen.digest != layer.diff_id:
                raise DigestMismatch(f"layer {layer.diff_id} is damaged on disk")

    def _forget(self, chain: str) -> None:
        with self._state.write() as db:
            db.execute("DELETE FROM image_layers WHERE chain = ?", (chain,))

    @contextmanager
    def _one_at_a_time(self, chain: str) -> Iterator[None]:
        with self._lock:
            lock = self._busy[chain]
        with lock:
            yield


class _Hashing(io.RawIOBase):
    """A stream that hashes what is read through it."""

    def __init__(self, source: BinaryIO) -> None:
        super().__init__()
        self._source = source
        self._hash = hashlib.sha256()

    @property
    def stream(self) -> BinaryIO:
        return cast(BinaryIO, self)

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self._source.read(size)
        self._hash.update(data)
        return data

    def readinto(self, target: WriteableBuffer, /) -> int:
        data = self.read(len(memoryview(target)))
        memoryview(target)[: len(data)] = data
        return len(data)

    def finish(self) -> None:
        while self.read(CHUNK):
            pass


def _drop_ancestors(unused: dict[str, Layer], chain: str | None) -> None:
    while chain is not None and (layer := unused.pop(chain, None)) is not None:
        chain = layer.parent


def _layer(row: sqlite3.Row) -> Layer:
    return Layer(
        chain=row["chain"],
        parent=row["parent"],
        diff_id=row["diff_id"],
        blob=Blob(row["blob"], row["blob_size"]),
        encoding=Encoding(row["encoding"]),
        tar_size=row["tar_size"],
        size=row["size"],
    )

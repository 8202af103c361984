"""Reading chunks: find, fetch, decrypt, decompress, and check against their id."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lazarette.backup.repository import patches
from lazarette.backup.repository.blockcache import BlockCache
from lazarette.backup.repository.format import Crypt, RepositoryDamaged
from lazarette.backup.repository.index import Index, Location
from lazarette.backup.repository.packreads import PackReads
from lazarette.backup.repository.packs import TREE, open_block, pack_cipher
from lazarette.backup.repository.treecache import TreeCache
from lazarette.backup.stores.contract import (
    BlobNotFound,
    BlobStore,
    Buffer,
    DamagedBlob,
    ShortBlob,
)

_CIPHERS = 256


class ChunkMissing(RepositoryDamaged):
    """No pack holds a chunk that something refers to."""

    number = 222


class ChunkReader:
    """Chunks of a repository by id; safe in several threads.

    Args:
        store: where packs are.
        crypt: of the repository.
        index: where chunks are.
        cache_bytes: plain blocks kept in memory.
        trees: local copies of packs of directories, if kept.
        refresh: brings the index up to date; called when a chunk is not in it.

    Attributes:
        kept: local copies of blocks of data, if kept.
    """

    def __init__(
        self,
        store: BlobStore,
        crypt: Crypt,
        index: Index,
        cache_bytes: int = 48 << 20,
        trees: TreeCache | None = None,
        refresh: Callable[[], None] | None = None,
    ) -> None:
        self._reads = PackReads(store)
        self._distant = store.capabilities.distant
        self._crypt = crypt
        self._index = index
        self._limit = cache_bytes
        self._trees = trees
        self._refresh = refresh
        self.kept: BlockCache | None = None
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[bytes, int], bytes] = OrderedDict()
        self._held = 0
        self._ciphers: OrderedDict[bytes, AESGCM] = OrderedDict()

    def get(self, chunk: bytes) -> Buffer:
        """The bytes of a chunk, checked against its id.

        Raises:
            ChunkMissing: it is in no pack, or its pack is gone.
            RepositoryDamaged: its bytes are not those that were written.
            StoreUnavailable: the store does not answer.
        """
        location = self.locate(chunk)
        data: Buffer = self._payload(location)
        if location.patch:
            data = self.assemble(data)
        if self._crypt.id_of(data, location.paged) != chunk:
            raise _wrong(chunk, location)
        return data

    def get_all(self, chunks: Sequence[bytes]) -> list[Buffer | RepositoryDamaged]:
        """The bytes of several chunks, or what is wrong with each; see :meth:`get`.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        found: list[Buffer | RepositoryDamaged] = []
        plain: list[Buffer] = []
        places: list[tuple[int, Location]] = []
        for number, chunk in enumerate(chunks):
            try:
                location = self.locate(chunk)
                if location.patch or location.paged:
                    found.append(self.get(chunk))
                    continue
                payload = self._payload(location)
            except RepositoryDamaged as bad:
                found.append(bad)
                continue
            found.append(payload)
            plain.append(payload)
            places.append((number, location))
        for (number, location), name in zip(places, self._crypt.chunk_ids(plain), strict=True):
            if name != chunks[number]:
                found[number] = _wrong(chunks[number], location)
        return found

    def get_row(self, chunks: Sequence[bytes]) -> tuple[int, Buffer]:
        """As many of several chunks as lie in a row in one block, checked against their ids.

        One call for the pages of a whole block: beside the hashing, calls for each chunk would
        cost as much again.  A block of a near store that is read whole is not held: the next one
        is written into the same memory while that is still in the processor's cache.

        Returns:
            How many, at least one, and their bytes, joined.

        Raises:
            ChunkMissing, RepositoryDamaged, StoreUnavailable: see :meth:`get`; of the first one.
        """
        first = self.locate(chunks[0])
        end = first.start + first.length
        lengths = [first.length]
        if first.in_pages:
            for chunk in chunks[1:]:
                following = self._index.find(chunk)
                if following is None or not following.follows(first, end):
                    break
                lengths.append(following.length)
                end += following.length
        if len(lengths) == 1:
            return 1, self.get(chunks[0])
        whole = first.start == 0 and end == first.plain
        block = self.block(first, keep=self._distant or not whole)
        data = memoryview(block)[first.start : end]
        found = self._crypt.paged_ids(data, lengths)
        if found == list(chunks[: len(found)]):
            return len(found), data
        if found[0] != chunks[0]:
            raise _wrong(chunks[0], first)
        return 1, data[: lengths[0]]

    def payload(self, chunk: bytes) -> tuple[Buffer, tuple[bytes, ...]]:
        """What is stored of a chunk, and the chunks a patch needs.

        Raises:
            ChunkMissing: it is in no pack, or its pack is gone.
            RepositoryDamaged: its block is not what was written.
        """
        return self._payload(self.locate(chunk)), self._index.needs(chunk)

    def assemble(self, payload: Buffer) -> bytes:
        """The chunk a patch's payload stands for.

        Raises:
            RepositoryDamaged: it is malformed, or a chunk it needs is lost.
        """
        return patches.assemble(patches.decode(payload), self._stored_pages)

    def locate(self, chunk: bytes) -> Location:
        """Where a chunk is.

        Raises:
            ChunkMissing: it is in no pack.
        """
        location = self._index.find(chunk)
        if location is None and self._refresh is not None:
            self._refresh()
            location = self._index.find(chunk)
        if location is None:
            raise ChunkMissing(
                f"chunk {chunk.hex()} is in no pack", hint="run laz repo check, then repair"
            )
        return location

    def _payload(self, location: Location) -> memoryview:
        block = self.block(location)
        return memoryview(block)[location.start : location.start + location.length]

    def _stored_pages(self, chunk: bytes) -> Buffer:
        location = self.locate(chunk)
        payload = self._payload(location)
        return patches.decode(payload).new_pages if location.patch else payload

    def block(self, location: Location, keep: bool = True) -> bytes:
        """The plain bytes of a whole block; held for later readers if they are to be kept."""
        key = (location.pack, location.offset)
        with self._lock:
            found = self._blocks.get(key)
            if found is not None:
                self._blocks.move_to_end(key)
                return found
        plain = self._opened(location)
        if keep:
            self.keep(location, plain)
        return plain

    def _opened(self, location: Location) -> bytes:
        kept = None
        if self._index.head(location.pack).kind != TREE:
            kept = self.kept
        if kept is not None:
            copy = kept.read(location.pack, location.offset)
            if copy is not None:
                try:
                    return self._open(location, copy)
                except RepositoryDamaged:
                    kept.drop(location.pack, location.offset)
        stored = self._fetch(location)
        plain = self._open(location, stored)
        if kept is not None:
            kept.write(location.pack, location.offset, stored)
        return plain

    def _open(self, location: Location, stored: Buffer) -> bytes:
        return open_block(
            self._cipher(location.pack),
            location.pack.hex(),
            location.offset,
            stored,
            location.plain,
        )

    def keep(self, location: Location, plain: bytes) -> None:
        """Hold a plain block in memory for later readers."""
        key = (location.pack, location.offset)
        with self._lock:
            if key not in self._blocks:
                self._blocks[key] = plain
                self._held += len(plain)
                while self._held > self._limit and len(self._blocks) > 1:
                    _, dropped = self._blocks.popitem(last=False)
                    self._held -= len(dropped)

    def _fetch(self, location: Location) -> Buffer:
        try:
            if self._trees is not None and self._index.head(location.pack).kind == TREE:
                return self._trees.range(location.pack, location.offset, location.stored)
            size = self._index.head(location.pack).size
            return self._reads.get(location.pack, location.offset, location.stored, size)
        except BlobNotFound:
            raise ChunkMissing(
                f"pack {location.pack.hex()} is gone", hint="run laz repo check, then repair"
            ) from None
        except (ShortBlob, DamagedBlob) as bad:
            raise RepositoryDamaged(f"pack {location.pack.hex()} is damaged: {bad}") from bad

    def _cipher(self, pack: bytes) -> AESGCM:
        with self._lock:
            cipher = self._ciphers.get(pack)
        if cipher is None:
            cipher = pack_cipher(self._crypt, self._index.head(pack))
            with self._lock:
                self._ciphers[pack] = cipher
                while len(self._ciphers) > _CIPHERS:
                    self._ciphers.popitem(last=False)
        return cipher


def _wrong(chunk: bytes, location: Location) -> RepositoryDamaged:
    return RepositoryDamaged(
        f"chunk {chunk.hex()} in pack {location.pack.hex()} is not what its id says"
    )

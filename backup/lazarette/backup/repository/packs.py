"""Packs: many blocks in one store object, each block many chunks.

Layout, all numbers little-endian::

    head    "LAZPACK" version(1) pack id(16) n(1) key field(n)
    block*  AES-256-GCM of the block; nonce = offset of the block in the pack
    list    sealed: the pack's own index record (so an index can be made again from packs)
    table   for each block: offset u32, stored length u32, xxh3-64 of the stored bytes
    foot    table offset u32, blocks u32, list offset u32, list length u32,
            xxh3-64 of head + list + table, "LAZPACKE"

A block is a zstd frame when that is smaller than its plain bytes and plain bytes otherwise;
which one it is follows from the two lengths in the index record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import msgspec
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lazarette.backup.repository.format import (
    ENVELOPE_SIZE,
    ID_SIZE,
    OBJECT_VERSION,
    TAG_SIZE,
    Crypt,
    RepositoryDamaged,
    checksum,
    expand,
    new_id,
    pack_name,
    seal,
    subkey,
    unseal,
)
from lazarette.backup.repository.malformed import MALFORMED
from lazarette.backup.repository.packmemory import PackMemory
from lazarette.backup.stores.contract import Buffer

MAGIC = b"LAZPACK" + bytes([OBJECT_VERSION])
END_MAGIC = b"LAZPACKE"
HEAD_SIZE = len(MAGIC) + ID_SIZE + 1
TABLE_ROW = struct.Struct("<IIQ")
FOOT = struct.Struct("<IIIIQ8s")
MAX_BLOCK = 64 << 20
"""Largest plain size of a block, bytes; a reader refuses more."""

BLOCK_ROW = struct.Struct("<IIII")
"""Offset, stored length, plain length, chunks in it."""
CHUNK_ROW = struct.Struct("<16sI")
"""Id, length with two marking bits."""
PATCH_ROW = struct.Struct("<I16s")
"""Number of a patch among the chunks, id of a chunk it needs."""

DATA = 0
TREE = 1

_ROOM = 2 << 20

_PAGES = zstandard.ZstdCompressionParameters.from_level(1, min_match=5, write_content_size=True)
"""For blocks of databases: what repeats from row to row is shorter than level 1 looks for."""


class PackRecord(msgspec.Struct, array_like=True, frozen=True):
    """What an index says about one pack.

    Attributes:
        pack: its id.
        kind: ``DATA`` or ``TREE``.
        key: field that says how its key is found, see :class:`Crypt`.
        size: bytes of the store object.
        blocks: rows of ``BLOCK_ROW``.
        chunks: rows of ``CHUNK_ROW`` in the order of the blocks.  The top bit of the length
            marks a patch (see :mod:`lazarette.backup.repository.patches`), the one below it a
            chunk whose id is made of the hashes of its pages.
        patches: rows of ``PATCH_ROW``.
        created_ns: when it was begun, wall clock of the writer.
    """

    pack: bytes
    kind: int
    key: bytes
    size: int
    blocks: bytes
    chunks: bytes
    patches: bytes
    created_ns: int

    @property
    def chunk_count(self) -> int:
        """How many chunks it has."""
        return len(self.chunks) // CHUNK_ROW.size

    def block_rows(self) -> Iterator[tuple[int, int, int, int]]:
        """Offset, stored length, plain length and number of chunks of each block."""
        return BLOCK_ROW.iter_unpack(self.blocks)

    def chunk_rows(self) -> Iterator[tuple[bytes, int]]:
        """Id and length, with its marking bits, of each chunk."""
        return CHUNK_ROW.iter_unpack(self.chunks)

    def patch_rows(self) -> Iterator[tuple[int, bytes]]:
        """Number of a patch, and id of a chunk it needs."""
        return PATCH_ROW.iter_unpack(self.patches)

    def chunk_id(self, number: int) -> bytes:
        """Id of one chunk."""
        at = number * CHUNK_ROW.size
        return self.chunks[at : at + ID_SIZE]

    def chunk_ids(self) -> list[bytes]:
        """Ids of all chunks."""
        return [chunk for chunk, _ in self.chunk_rows()]

    def validate(self) -> None:
        """Refuse a record that contradicts itself.

        Raises:
            RepositoryDamaged: it does.
        """
        name = self.pack.hex()
        if (
            len(self.pack) != ID_SIZE
            or len(self.key) not in (2, ENVELOPE_SIZE)
            or len(self.blocks) % BLOCK_ROW.size
            or len(self.chunks) % CHUNK_ROW.size
            or len(self.patches) % PATCH_ROW.size
        ):
            raise RepositoryDamaged(f"index record of pack {name} is malformed")
        count = end = largest = 0
        for offset, stored, plain, chunks in self.block_rows():
            count += chunks
            end = max(end, offset + stored)
            largest = max(largest, plain)
        if (
            count != self.chunk_count
            or end > self.size
            or largest > MAX_BLOCK
            or any(number >= count for number, _ in self.patch_rows())
        ):
            raise RepositoryDamaged(f"index record of pack {name} contradicts itself")


_decode_record = msgspec.msgpack.Decoder(PackRecord)
_encode = msgspec.msgpack.Encoder().encode

PATCH_BIT = 1 << 31
PAGED_BIT = 1 << 30
LENGTH_MASK = PAGED_BIT - 1


class _OpenBlock(msgspec.Struct):
    """Chunks not yet compressed."""

    parts: list[Buffer] = []
    ids: list[bytes] = []
    lengths: list[int] = []
    size: int = 0


class PackBuilder:
    """One pack in the making, in memory; used by one thread.

    Args:
        crypt: the repository's keys.
        kind: ``DATA`` or ``TREE``.
        created_ns: wall clock.
        block_size: plain bytes after which a block is closed.
        level: zstd level.
        memory: where it is put together; empty.
    """

    def __init__(
        self,
        crypt: Crypt,
        kind: int,
        created_ns: int,
        block_size: int = 1 << 20,
        level: int = 1,
        memory: PackMemory | None = None,
    ) -> None:
        self.pack = new_id()
        self._crypt = crypt
        self._kind = kind
        self._created_ns = created_ns
        self._block_size = block_size
        key, self._key = crypt.new_key(metadata=kind == TREE)
        self._cipher = subkey(key, b"pack", self.pack)
        head = MAGIC + self.pack + bytes([len(self._key)]) + self._key
        self.memory = memory or PackMemory(_ROOM)
        self.memory.append(head)
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._page_compressor = zstandard.ZstdCompressor(compression_params=_PAGES)
        self._rows: list[tuple[int, int, int, int]] = []
        self._ids: list[bytes] = []
        self._lengths: list[int] = []
        self._patches: list[tuple[int, bytes]] = []
        self._block = _OpenBlock()

    @property
    def size(self) -> int:
        """Bytes of the blocks closed, and of the head."""
        return self.memory.size

    @property
    def pending(self) -> int:
        """Plain bytes in the open block."""
        return self._block.size

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        return not self._rows and not self._block.ids

    def add(
        self, chunk: bytes, data: Buffer, needs: tuple[bytes, ...] = (), paged: bool = False
    ) -> None:
        """Add a chunk; the caller sees to it that it is not there yet.

        Args:
            chunk: its id.
            data: its bytes, or the payload of a patch.
            needs: ids of the chunks a patch takes pages from; empty for a plain chunk.
            paged: its id is made of the hashes of its pages.
        """
        block = self._block
        number = len(self._ids) + len(block.ids)
        block.ids.append(chunk)
        block.lengths.append(len(data) | (PATCH_BIT if needs else 0) | (PAGED_BIT if paged else 0))
        block.parts.append(data)
        block.size += len(data)
        self._patches.extend((number, need) for need in needs)
        if block.size >= self._block_size:
            self.close_block()

    def close_block(self) -> None:
        """Compress and encrypt what is pending."""
        block = self._block
        if block.ids:
            self._block = _OpenBlock()
            plain = block.parts[0] if len(block.parts) == 1 else b"".join(block.parts)
            self._append(block.ids, block.lengths, plain, self._compressor)

    def add_block(
        self, ids: Sequence[bytes], lengths: Sequence[int], plain: Buffer, paged: bool = False
    ) -> None:
        """Add plain chunks that lie one after another as a block of their own.

        Nothing may be pending: :meth:`close_block` first.
        """
        if paged:
            lengths = [length | PAGED_BIT for length in lengths]
        compressor = self._page_compressor if paged else self._compressor
        self._append(ids, lengths, plain, compressor)

    def _append(
        self,
        ids: Sequence[bytes],
        lengths: Sequence[int],
        plain: Buffer,
        compressor: zstandard.ZstdCompressor,
    ) -> None:
        packed: Buffer = compressor.compress(plain)
        if len(packed) >= len(plain):
            packed = plain
        offset, length = self.size, len(packed) + TAG_SIZE
        self._cipher.encrypt_into(block_nonce(offset), packed, None, self.memory.reserve(length))
        self._rows.append((offset, length, len(plain), len(ids)))
        self._ids.extend(ids)
        self._lengths.extend(lengths)

    def finish(self) -> tuple[memoryview, PackRecord]:
        """Close the pack: its bytes, which lie in its memory, and its record with their size."""
        self.close_block()
        memory = self.memory
        table = b"".join(
            TABLE_ROW.pack(at, length, checksum(memory.part(at, at + length)))
            for at, length, _, _ in self._rows
        )
        record = PackRecord(
            self.pack,
            self._kind,
            self._key,
            0,
            b"".join([BLOCK_ROW.pack(*row) for row in self._rows]),
            b"".join(map(CHUNK_ROW.pack, self._ids, self._lengths)),
            b"".join([PATCH_ROW.pack(*row) for row in self._patches]),
            self._created_ns,
        )
        listing = seal(self._crypt, pack_name(self.pack), _encode(record), index=True)
        list_at = memory.size
        head = memory.part(0, HEAD_SIZE + len(self._key))
        foot = FOOT.pack(
            list_at + len(listing),
            len(self._rows),
            list_at,
            len(listing),
            checksum(b"".join((head, listing, table))),
            END_MAGIC,
        )
        for data in (listing, table, foot):
            memory.append(data)
        return memory.part(0, memory.size), msgspec.structs.replace(record, size=memory.size)


def block_nonce(offset: int) -> bytes:
    """Nonce of the block at an offset of its pack; never used twice under a pack's key."""
    return offset.to_bytes(12, "little")


def open_block(cipher: AESGCM, name: str, offset: int, stored: Buffer, plain: int) -> bytes:
    """Decrypt and decompress a block.

    Args:
        cipher: key of the pack, from :func:`pack_cipher`.
        name: for messages.
        offset: of the block in the pack.
        stored: its stored bytes.
        plain: its length when plain.

    Raises:
        RepositoryDamaged: the bytes are not those that were written.
    """
    if len(stored) < TAG_SIZE:
        raise RepositoryDamaged(f"pack {name} has a block of {len(stored)} bytes at {offset}")
    try:
        packed = cipher.decrypt(block_nonce(offset), stored, None)
    except InvalidTag:
        raise RepositoryDamaged(f"pack {name} is damaged in the block at {offset}") from None
    if len(packed) == plain:
        return packed
    data = expand(packed, MAX_BLOCK, name)
    if len(data) != plain:
        raise RepositoryDamaged(f"pack {name} has a block of the wrong length at {offset}")
    return data


def pack_cipher(crypt: Crypt, head: PackRecord) -> AESGCM:
    """The key of a pack.

    Raises:
        CannotRead: on a host that may write and not read.
    """
    return subkey(crypt.key(head.key, metadata=head.kind == TREE), b"pack", head.pack)


class PackFoot(msgspec.Struct, frozen=True):
    """Where the parts of a pack are."""

    table_at: int
    blocks: int
    list_at: int
    list_length: int
    sum: int


def read_foot(name: str, tail: Buffer, size: int) -> PackFoot:
    """Parse the last bytes of a pack.

    Args:
        name: for messages.
        tail: at least the last ``FOOT.size`` bytes.
        size: of the whole object.

    Raises:
        RepositoryDamaged: they are no foot of a pack of that size.
    """
    if len(tail) < FOOT.size:
        raise RepositoryDamaged(f"pack {name} is cut: {size} bytes")
    table_at, blocks, list_at, list_length, digest, magic = FOOT.unpack(tail[-FOOT.size :])
    if (
        magic != END_MAGIC
        or list_at < HEAD_SIZE
        or list_at + list_length != table_at
        or table_at + blocks * TABLE_ROW.size + FOOT.size != size
    ):
        raise RepositoryDamaged(f"pack {name} is cut or has no foot")
    return PackFoot(table_at, blocks, list_at, list_length, digest)


def verify_pack(name: str, data: Buffer) -> list[tuple[int, int]]:
    """Check the stored bytes of a whole pack without any key.

    Returns:
        Offset and length of each damaged block; empty when all is well.

    Raises:
        RepositoryDamaged: the pack is cut, or its head, list or table is damaged.
    """
    view = memoryview(data)
    foot = read_foot(name, view, len(view))
    head = HEAD_SIZE + view[HEAD_SIZE - 1]
    rest = b"".join((view[:head], view[foot.list_at : len(view) - FOOT.size]))
    if checksum(rest) != foot.sum or bytes(view[: len(MAGIC)]) != MAGIC:
        raise RepositoryDamaged(f"pack {name} fails the checksum of its head and list")
    bad = []
    end = head
    for offset, length, digest in TABLE_ROW.iter_unpack(view[foot.table_at : -FOOT.size]):
        if offset != end or offset + length > foot.list_at:
            raise RepositoryDamaged(f"pack {name} has a table that contradicts itself")
        end = offset + length
        if checksum(view[offset:end]) != digest:
            bad.append((offset, length))
    return bad


def read_list(crypt: Crypt, pack: bytes, listing: bytes, size: int) -> PackRecord:
    """The record a pack holds of itself.

    Raises:
        RepositoryDamaged: it is damaged or of another pack.
    """
    name = pack_name(pack)
    try:
        record = _decode_record.decode(unseal(crypt, name, listing))
    except MALFORMED as bad:
        raise RepositoryDamaged(f"pack {name} has a malformed list: {bad}") from bad
    if record.pack != pack:
        raise RepositoryDamaged(f"pack {name} has the list of another pack")
    record = msgspec.structs.replace(record, size=size)
    record.validate()
    return record

"""Names and bytes of every repository object; the prose is ``docs/repository-format.md``.

Vocabulary
    *chunk*: a piece of file content or of a directory, named by the keyed BLAKE3 of its
    bytes; the unit of deduplication.
    *paged chunk*: a chunk of a file changed in place, named by the hashes of its pages, so
    that its new name can be told from the pages that changed.
    *block*: about 1 MiB of chunks compressed and encrypted together; the unit of reading.
    *pack*: a store object of many blocks, written once.
    *index object*: says which packs hold which chunks.
    *sealed object*: a small object (index, snapshot, config) encrypted as a whole.

Every object ends in an xxHash of its stored bytes, or holds a table of them, so that
whoever has the bytes can tell that they are whole without any key.
"""

from __future__ import annotations

import itertools
import os
import struct
import threading
from collections.abc import Sequence

import xxhash
import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lazarette.backup import native
from lazarette.backup.repository.keys import MasterKeys
from lazarette.backup.stores.contract import Buffer
from lazarette.storage.errors import DamagedData, LazaretteError

VERSION = 2
"""Of the format.  2 knows chunks named by the hashes of their pages."""
OLDEST_VERSION = 1
PAGED_VERSION = 2
OBJECT_VERSION = 1
"""In the heads of packs and sealed objects, whose layout is that of version 1."""
PAGE = 8192
"""Bytes of a page: what a database writes at once."""
ID_SIZE = 16
ENVELOPE_SIZE = 80
TAG_SIZE = 16

CONFIG = "config"
PACKS = "packs/"
INDEXES = "index/"
SNAPSHOTS = "snapshots/"
CONDEMNED = "condemned/"
LOST = "lost/"
OWNERS = "owners/"

_SEALED_MAGIC = b"LAZSEAL"
_SEALED_HEAD = struct.Struct("<7sB16sB")
_CHECKSUM = struct.Struct("<Q")
MAX_SEALED = 1 << 30
"""Largest plain size of a sealed object, bytes: a bound against decompression bombs."""

_ZERO_NONCE = bytes(12)


class RepositoryDamaged(DamagedData):
    """A repository object is not what was written; the message names it."""

    number = 220


class WrongRepository(LazaretteError):
    """What is there is no repository, or one this program cannot read."""

    number = 221
    exit_code = 33
    http_status = 409


def pieces(data: memoryview, lengths: Sequence[int]) -> list[Buffer]:
    """What lies one after another in some data, by the length of each."""
    starts = itertools.accumulate(lengths, initial=0)
    return [data[first:last] for first, last in itertools.pairwise(starts)]


class Crypt:
    """The repository's keys, ready for use.

    A *key field* says how the key of an object is found: two bytes, the epoch of the master
    key; or the envelope of a random key that only a reader can open, on a host that may write
    and not read.

    Args:
        keys: as unlocked.
    """

    def __init__(self, keys: MasterKeys) -> None:
        self.keys = keys
        self.chunk_id_key = keys.chunk_id_key
        self._index_key = keys.index_key
        self._page_key = blake3(b"lazarette/page", key=self.chunk_id_key).digest()
        self._paged_key = blake3(b"lazarette/paged", key=self.chunk_id_key).digest()

    def chunk_id(self, data: Buffer) -> bytes:
        """Id of a chunk: keyed BLAKE3 of its bytes, 16 bytes."""
        return blake3(data, key=self.chunk_id_key).digest(ID_SIZE)

    def chunk_ids(self, chunks: list[Buffer]) -> list[bytes]:
        """Ids of several chunks."""
        joined = native.hashes(chunks, self.chunk_id_key)
        return [joined[at : at + ID_SIZE] for at in range(0, len(joined), ID_SIZE)]

    def page_hashes(self, data: Buffer) -> bytes:
        """Hashes of the pages of some data, 16 bytes each, joined; the last page may be short."""
        view = memoryview(data)
        whole = len(view) // PAGE * PAGE
        hashes = native.page_hashes(view[:whole], self._page_key)
        if whole < len(view):
            hashes += blake3(view[whole:], key=self._page_key).digest(ID_SIZE)
        return hashes

    def read_pages(
        self, file: int, ranges: list[tuple[int, int]], into: memoryview
    ) -> bytes | None:
        """:meth:`page_hashes` of ranges of a file, read one after another into a buffer.

        Args:
            file: descriptor.
            ranges: offset and length of each, whole pages.
            into: has room for them.

        Returns:
            None when the file ends before.

        Raises:
            OSError: it cannot be read.
        """
        return native.read_pages(file, ranges, into, self._page_key)

    def paged_id(self, hashes: bytes) -> bytes:
        """Id of a paged chunk, made of the hashes of its pages."""
        return blake3(hashes, key=self._paged_key).digest(ID_SIZE)

    def paged_ids(self, data: Buffer, lengths: Sequence[int]) -> list[bytes]:
        """Ids of paged chunks that lie one after another, all of whole pages."""
        hashes = self.page_hashes(data)
        found = []
        at = 0
        for length in lengths:
            end = at + length // PAGE * ID_SIZE
            found.append(self.paged_id(hashes[at:end]))
            at = end
        return found

    def id_of(self, data: Buffer, paged: bool) -> bytes:
        """Id of a chunk of either kind."""
        return self.paged_id(self.page_hashes(data)) if paged else self.chunk_id(data)

    def new_key(self, metadata: bool) -> tuple[bytes, bytes]:
        """A key to write with, and its field."""
        if not self.keys.can_read:
            return self.keys.seal_pack_key()
        epoch = self.keys.epoch
        key = self.keys.metadata_key(epoch) if metadata else self.keys.data_key(epoch)
        return key, epoch.to_bytes(2, "little")

    def key(self, field: bytes, metadata: bool) -> bytes:
        """The key a field stands for.

        Raises:
            CannotRead: on a host that may write and not read.
            DamagedKey: there is no such key.
        """
        if len(field) == ENVELOPE_SIZE:
            return self.keys.open_pack_key(field)
        epoch = int.from_bytes(field, "little")
        return self.keys.metadata_key(epoch) if metadata else self.keys.data_key(epoch)

    def index_key(self) -> bytes:
        """Key of index objects, of lists in packs and of the config."""
        return self._index_key


def new_id() -> bytes:
    """A random name for a pack, index object or snapshot."""
    return os.urandom(ID_SIZE)


def pack_name(pack: bytes) -> str:
    """Store name of a pack."""
    text = pack.hex()
    return f"{PACKS}{text[:2]}/{text}"


def id_of(name: str) -> bytes:
    """Id in the last part of a store name.

    Raises:
        RepositoryDamaged: the name is not one of ours.
    """
    try:
        found = bytes.fromhex(name.rpartition("/")[2])
    except ValueError:
        found = b""
    if len(found) != ID_SIZE:
        raise RepositoryDamaged(f"object {name} has a name that is none of the format's")
    return found


def subkey(key: bytes, purpose: bytes, salt: bytes) -> AESGCM:
    """The AES-256-GCM key of one object: keyed BLAKE3 over purpose and salt."""
    return AESGCM(blake3(b"lazarette/" + purpose + b"\0" + salt, key=key).digest())


def checksum(data: Buffer) -> int:
    """XXH3-64 of stored bytes."""
    return xxhash.xxh3_64_intdigest(data)


def seal(crypt: Crypt, name: str, plain: bytes, *, index: bool = False) -> bytes:
    """Compress and encrypt a small object; its name is bound into it.

    Layout: ``LAZSEAL`` version(1) salt(16) n(1) key field(n) ciphertext tag(16) xxh3-64(8).
    The key is fresh for every object (salted), so that the nonce may be zero.

    Args:
        crypt: of the repository.
        name: of the object.
        plain: its content.
        index: use the index key (and no key field), which every writer has.
    """
    salt = os.urandom(16)
    key, field = (crypt.index_key(), b"") if index else crypt.new_key(metadata=True)
    head = _SEALED_HEAD.pack(_SEALED_MAGIC, OBJECT_VERSION, salt, len(field)) + field
    packed = zstandard.ZstdCompressor(level=3).compress(plain)
    cipher = subkey(key, b"sealed", salt)
    body = head + cipher.encrypt(_ZERO_NONCE, packed, head + name.encode())
    return body + _CHECKSUM.pack(checksum(body))


def verify_sealed(name: str, stored: bytes) -> None:
    """Check a sealed object without any key.

    Raises:
        RepositoryDamaged: it is cut, flipped or no sealed object.
        WrongRepository: a newer program wrote it.
    """
    if len(stored) < _SEALED_HEAD.size + TAG_SIZE + _CHECKSUM.size:
        raise RepositoryDamaged(f"object {name} is cut: {len(stored)} bytes")
    magic, version, _, _ = _SEALED_HEAD.unpack_from(stored)
    (wanted,) = _CHECKSUM.unpack_from(stored, len(stored) - _CHECKSUM.size)
    if checksum(memoryview(stored)[: -_CHECKSUM.size]) != wanted or magic != _SEALED_MAGIC:
        raise RepositoryDamaged(f"object {name} fails its checksum")
    if version != OBJECT_VERSION:
        raise WrongRepository(
            f"object {name} has format version {version}, this program reads {OBJECT_VERSION}",
            hint="upgrade lazarette",
        )


def unseal(crypt: Crypt, name: str, stored: bytes) -> bytes:
    """Undo :func:`seal`.

    Raises:
        RepositoryDamaged: the bytes or their name are not those that were sealed.
        WrongRepository: a newer program wrote it.
    """
    verify_sealed(name, stored)
    _, _, salt, length = _SEALED_HEAD.unpack_from(stored)
    head = stored[: _SEALED_HEAD.size + length]
    field = head[_SEALED_HEAD.size :]
    if length not in (0, 2, ENVELOPE_SIZE):
        raise RepositoryDamaged(f"object {name} has a malformed key field")
    key = crypt.index_key() if length == 0 else crypt.key(field, metadata=True)
    cipher = subkey(key, b"sealed", salt)
    body = memoryview(stored)[len(head) : -_CHECKSUM.size]
    try:
        packed = cipher.decrypt(_ZERO_NONCE, body, head + name.encode())
    except InvalidTag:
        raise RepositoryDamaged(
            f"object {name} does not decrypt: another key or name sealed it"
        ) from None
    return expand(packed, MAX_SEALED, name)


class _PerThread(threading.local):
    """What one thread at a time may use, and costs an eighth of a block's work to make anew."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()


_per_thread = _PerThread()


def expand(packed: bytes, limit: int, name: str) -> bytes:
    """Decompress a zstd frame of at most ``limit`` bytes.

    Raises:
        RepositoryDamaged: it is no such frame.
    """
    try:
        size = zstandard.frame_content_size(packed)
        if not 0 <= size <= limit:
            raise RepositoryDamaged(f"object {name} claims to expand to {size} bytes")
        return _per_thread.decompressor.decompress(packed)
    except zstandard.ZstdError as bad:
        raise RepositoryDamaged(f"object {name} does not decompress: {bad}") from bad

"""Directory entries as they are stored, and how a directory is cut into pages.

A directory is a list of entries ascending by name (bytes), cut into pages; each page is a
chunk.  An entry of a directory names the pages of that directory, so the id of a page
follows from everything beneath it and an unchanged subtree is stored once.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum

import msgspec
import xxhash

from lazarette.backup.repository.format import ID_SIZE, RepositoryDamaged
from lazarette.backup.repository.malformed import MALFORMED
from lazarette.backup.stores.contract import Buffer

PART = struct.Struct("<16sI")
"""A part of a file's content: chunk id and length in bytes; the zero id is a hole."""
HOLE = bytes(ID_SIZE)
MAX_HOLE = 0xFFFF_F000
"""Longest hole one part can tell, bytes; a longer one takes several parts."""
LIST = struct.Struct("<16sQ")
"""A page of parts: chunk id and how many bytes of content the page stands for."""
PARTS_A_PAGE = 1024

_FEW = 512
_PAGE_MIN = 128
_PAGE_MAX = 2048
_PAGE_MASK = 0x1FF


class Kind(IntEnum):
    """What an inode is."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3
    FIFO = 4
    SOCKET = 5
    CHARACTER = 6
    BLOCK = 7

    @property
    def file_type(self) -> int:
        """The same as the type bits of ``st_mode``."""
        return _FILE_TYPES[self]


_FILE_TYPES = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.FIFO: stat.S_IFIFO,
    Kind.SOCKET: stat.S_IFSOCK,
    Kind.CHARACTER: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
}


class Extra(msgspec.Struct, omit_defaults=True):
    """What few entries have.

    Attributes:
        xattrs: extended attributes, ACLs and capabilities among them.
        flags: inode flags (``FS_IOC_GETFLAGS``) of those that can be set again.
        device: device number of a device node.
        links: number of names of an inode with more than one.
        filesystem: device number the inode was on, to tell inodes with the same number apart.
        mtime: seconds and nanoseconds, when they do not fit ``mtime_ns``.
        block: bytes of the fixed blocks its content is cut in; 0 when cut by content.
        unstable: it changed while it was read.
        paged: the ids of its chunks are made of the hashes of their pages.
    """

    xattrs: dict[bytes, bytes] = {}
    flags: int = 0
    device: int = 0
    links: int = 1
    filesystem: int = 0
    mtime: tuple[int, int] | None = None
    block: int = 0
    unstable: bool = False
    paged: bool = False


class Entry(msgspec.Struct, array_like=True):
    """One name in a directory.

    Attributes:
        name: as the kernel gives it.
        kind: a :class:`Kind`.
        mode: permission bits with setuid, setgid and sticky.
        uid: owner.
        gid: group.
        mtime_ns: time of last write, nanoseconds since the epoch, clamped to 64 bits signed.
        ctime_ns: time of last change of the inode, likewise.
        inode: its number.
        size: bytes of a file's content.
        content: of a file its parts (``PART``) or, at a depth, pages of them (``LIST``); of a
            directory the ids of its pages; of a symlink its target.
        depth: 0 when ``content`` holds parts, else how many levels of pages are above them.
        extra: what few entries have.
    """

    name: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    size: int = 0
    content: bytes = b""
    depth: int = 0
    extra: Extra | None = None

    @property
    def mtime(self) -> int:
        """Time of last write in nanoseconds, unclamped."""
        if self.extra is not None and self.extra.mtime is not None:
            seconds, nanoseconds = self.extra.mtime
            return seconds * 1_000_000_000 + nanoseconds
        return self.mtime_ns

    def page_ids(self) -> list[bytes]:
        """Ids of the pages of a directory."""
        return [self.content[at : at + ID_SIZE] for at in range(0, len(self.content), ID_SIZE)]


_encode_page = msgspec.msgpack.Encoder().encode
_decode_page = msgspec.msgpack.Decoder(list[Entry]).decode


def paginate(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """Cut a sorted directory into pages at names that their own hash picks.

    An added or removed name so changes one page, wherever it is.
    """
    if len(entries) <= _FEW:
        yield entries
        return
    start = 0
    for number, entry in enumerate(entries, 1):
        count = number - start
        if count >= _PAGE_MAX or (
            count >= _PAGE_MIN and xxhash.xxh3_64_intdigest(entry.name) & _PAGE_MASK == 0
        ):
            yield entries[start:number]
            start = number
    if start < len(entries):
        yield entries[start:]


def encode_page(entries: Sequence[Entry]) -> bytes:
    """Stored form of a page."""
    return _encode_page(entries)


def decode_page(data: Buffer, where: str) -> list[Entry]:
    """Parse and check a page.

    Raises:
        RepositoryDamaged: it is malformed, or a name could lead out of its directory.
    """
    try:
        entries = _decode_page(data)
    except MALFORMED as bad:
        raise RepositoryDamaged(f"directory page {where} is malformed: {bad}") from bad
    last = b""
    for entry in entries:
        name = entry.name
        if name <= last or b"/" in name or b"\0" in name or name in (b".", b".."):
            raise RepositoryDamaged(f"directory page {where} has an impossible name {name!r}")
        if not Kind.FILE <= entry.kind <= Kind.BLOCK:
            raise RepositoryDamaged(f"directory page {where} has an unknown kind {entry.kind}")
        last = name
    return entries


def holes(length: int) -> Iterator[bytes]:
    """Parts for a hole of that many bytes."""
    while length > 0:
        step = min(length, MAX_HOLE)
        yield PART.pack(HOLE, step)
        length -= step


def parts_length(parts: bytes) -> int:
    """How many bytes of content some parts stand for."""
    return sum(length for _, length in PART.iter_unpack(parts))


def parts_pages(parts: Iterable[bytes]) -> Iterator[tuple[bytes, int]]:
    """Cut parts into pages of ``PARTS_A_PAGE``: each page and its bytes of content."""
    joined = b"".join(parts)
    step = PARTS_A_PAGE * PART.size
    for at in range(0, len(joined), step):
        page = joined[at : at + step]
        yield page, parts_length(page)

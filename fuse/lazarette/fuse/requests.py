"""What the kernel asks: one struct a request, and the parser of each.

Layouts: see :mod:`lazarette.fuse.protocol`.  A request is a 40-byte header, a fixed body and up
to two NUL-ended names; all integers are in host byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from lazarette.fuse.protocol import FSYNC_DATASYNC, InitFlag

IN_HEADER = struct.Struct("=IIQQIIIHH")
_PAIR = struct.Struct("=II")
_QUAD = struct.Struct("=Q")
_INIT_IN = struct.Struct("=IIII")
_INIT_IN_EXT = struct.Struct("=IIIII")
_FORGET_ONE = struct.Struct("=QQ")
_GETATTR_IN = struct.Struct("=IIQ")
_SETATTR_IN = struct.Struct("=I4xQQQQQQIIII4xII4x")
_MKNOD_IN = struct.Struct("=III4x")
_RENAME2_IN = struct.Struct("=QI4x")
_CREATE_IN = struct.Struct("=IIII")
_RELEASE_IN = struct.Struct("=QIIQ")
_READ_IN = struct.Struct("=QQIIQI4x")
_FSYNC_IN = struct.Struct("=QI4x")
_SETXATTR_IN_EXT = struct.Struct("=III4x")
_FALLOCATE_IN = struct.Struct("=QQQI4x")
_LSEEK_IN = struct.Struct("=QQI4x")
_COPY_IN = struct.Struct("=QQQQQQQ")


class Request(msgspec.Struct, gc=False):
    """``struct fuse_in_header``: who asks what of which node.

    Attributes:
        length: bytes of the whole request.
        opcode: see :class:`Opcode`; an unknown one is answered ENOSYS.
        unique: number the reply carries back.
        node: node id the request is about.
        uid, gid, pid: of the calling process, in the mount's user namespace.
        extensions: length of trailing extensions, in units of eight bytes.
    """

    length: int
    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    extensions: int
    padding: int

    @property
    def resent(self) -> bool:
        """Whether a server before had taken it, and may have done it in part."""
        return bool(self.unique >> 63)


class InitIn(msgspec.Struct, gc=False):
    """``struct fuse_init_in``: what the kernel can do."""

    major: int
    minor: int
    max_readahead: int
    flags: InitFlag


class GetattrIn(msgspec.Struct, gc=False):
    """``struct fuse_getattr_in``."""

    flags: int
    dummy: int
    fh: int


class SetattrIn(msgspec.Struct, gc=False):
    """``struct fuse_setattr_in``: only fields named in ``valid`` count; times as seconds + ns."""

    valid: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    uid: int
    gid: int


class MknodIn(msgspec.Struct, gc=False):
    """``struct fuse_mknod_in``; ``rdev`` in the kernel's 32-bit encoding."""

    mode: int
    rdev: int
    umask: int


class MkdirIn(msgspec.Struct, gc=False):
    """``struct fuse_mkdir_in``."""

    mode: int
    umask: int


class RenameIn(msgspec.Struct, gc=False):
    """``struct fuse_rename2_in``; flags as in renameat2(2)."""

    newdir: int
    flags: int


class OpenIn(msgspec.Struct, gc=False):
    """``struct fuse_open_in``; flags as in open(2)."""

    flags: int
    open_flags: int


class CreateIn(msgspec.Struct, gc=False):
    """``struct fuse_create_in``, also for TMPFILE."""

    flags: int
    mode: int
    umask: int
    open_flags: int


class ReleaseIn(msgspec.Struct, gc=False):
    """``struct fuse_release_in``."""

    fh: int
    flags: int
    release_flags: int
    lock_owner: int


class ReadIn(msgspec.Struct, gc=False):
    """``struct fuse_read_in``, also for READDIR and READDIRPLUS."""

    fh: int
    offset: int
    size: int
    read_flags: int
    lock_owner: int
    flags: int


class WriteIn(msgspec.Struct, gc=False):
    """``struct fuse_write_in``; the data follows it."""

    fh: int
    offset: int
    size: int
    write_flags: int
    lock_owner: int
    flags: int


class FsyncIn(msgspec.Struct, gc=False):
    """``struct fuse_fsync_in``."""

    fh: int
    flags: int

    @property
    def data_only(self) -> bool:
        """Whether fdatasync(2) was asked for."""
        return bool(self.flags & FSYNC_DATASYNC)


class SetxattrIn(msgspec.Struct, gc=False):
    """``struct fuse_setxattr_in``; ``flags`` as in setxattr(2)."""

    size: int
    flags: int
    extra: int = 0


class FallocateIn(msgspec.Struct, gc=False):
    """``struct fuse_fallocate_in``; mode as in fallocate(2)."""

    fh: int
    offset: int
    length: int
    mode: int


class LseekIn(msgspec.Struct, gc=False):
    """``struct fuse_lseek_in``; only SEEK_DATA and SEEK_HOLE arrive."""

    fh: int
    offset: int
    whence: int


class CopyIn(msgspec.Struct, gc=False):
    """``struct fuse_copy_file_range_in``."""

    fh_in: int
    off_in: int
    nodeid_out: int
    fh_out: int
    off_out: int
    length: int
    flags: int


Buffer = bytes | memoryview


def parse_header(buffer: bytearray) -> Request:
    """The header at the start of a request."""
    return Request(*IN_HEADER.unpack_from(buffer))


def parse_init(body: Buffer) -> InitIn:
    """INIT; ``flags2`` counts only when the kernel says it sends it."""
    major, minor, readahead, flags = _INIT_IN.unpack_from(body)
    if flags & InitFlag.INIT_EXT and len(body) >= _INIT_IN_EXT.size:
        flags |= _INIT_IN_EXT.unpack_from(body)[4] << 32
    return InitIn(major, minor, readahead, InitFlag(flags))


def parse_name(body: Buffer) -> bytes:
    """A body that is one name."""
    return bytes(body[:-1])


def parse_two_names(body: Buffer) -> tuple[bytes, bytes]:
    """A body of two NUL-ended strings (SYMLINK: name and target; RENAME: old and new)."""
    first, second, _ = bytes(body).split(b"\0", 2)
    return first, second


def parse_getattr(body: Buffer) -> GetattrIn:
    """GETATTR."""
    return GetattrIn(*_GETATTR_IN.unpack_from(body))


def parse_setattr(body: Buffer) -> SetattrIn:
    """SETATTR."""
    return SetattrIn(*_SETATTR_IN.unpack_from(body))


def parse_mknod(body: Buffer) -> tuple[MknodIn, bytes]:
    """MKNOD and its name."""
    return MknodIn(*_MKNOD_IN.unpack_from(body)), bytes(body[_MKNOD_IN.size : -1])


def parse_mkdir(body: Buffer) -> tuple[MkdirIn, bytes]:
    """MKDIR and its name."""
    return MkdirIn(*_PAIR.unpack_from(body)), bytes(body[_PAIR.size : -1])


def parse_rename(body: Buffer) -> tuple[RenameIn, bytes, bytes]:
    """RENAME with its old and new name."""
    old, new = parse_two_names(body[_QUAD.size :])
    return RenameIn(_QUAD.unpack_from(body)[0], 0), old, new


def parse_rename2(body: Buffer) -> tuple[RenameIn, bytes, bytes]:
    """RENAME2 with its old and new name."""
    old, new = parse_two_names(body[_RENAME2_IN.size :])
    return RenameIn(*_RENAME2_IN.unpack_from(body)), old, new


def parse_link(body: Buffer) -> tuple[int, bytes]:
    """LINK: the old node id and the new name."""
    return _QUAD.unpack_from(body)[0], bytes(body[_QUAD.size : -1])


def parse_open(body: Buffer) -> OpenIn:
    """OPEN and OPENDIR."""
    return OpenIn(*_PAIR.unpack_from(body))


def parse_create(body: Buffer) -> tuple[CreateIn, bytes]:
    """CREATE or TMPFILE and its name."""
    end = bytes(body).index(b"\0", _CREATE_IN.size)
    return CreateIn(*_CREATE_IN.unpack_from(body)), bytes(body[_CREATE_IN.size : end])


def parse_release(body: Buffer) -> ReleaseIn:
    """RELEASE and RELEASEDIR."""
    return ReleaseIn(*_RELEASE_IN.unpack_from(body))


def parse_read(body: Buffer) -> ReadIn:
    """READ, READDIR, READDIRPLUS."""
    return ReadIn(*_READ_IN.unpack_from(body))


def parse_write(body: memoryview) -> tuple[WriteIn, memoryview]:
    """WRITE and a view of its data, valid until the handler returns."""
    header = WriteIn(*_READ_IN.unpack_from(body))
    return header, body[_READ_IN.size : _READ_IN.size + header.size]


def parse_fsync(body: Buffer) -> FsyncIn:
    """FSYNC and FSYNCDIR."""
    return FsyncIn(*_FSYNC_IN.unpack_from(body))


def parse_setxattr(body: Buffer, extended: bool) -> tuple[SetxattrIn, bytes, bytes]:
    """SETXATTR with name and value; ``extended`` as negotiated (``SETXATTR_EXT``)."""
    if extended:
        head, start = SetxattrIn(*_SETXATTR_IN_EXT.unpack_from(body)), _SETXATTR_IN_EXT.size
    else:
        head, start = SetxattrIn(*_PAIR.unpack_from(body)), _PAIR.size
    name, rest = bytes(body[start:]).split(b"\0", 1)
    return head, name, rest[: head.size]


def parse_getxattr(body: Buffer) -> tuple[int, bytes]:
    """GETXATTR: room for the value (0 asks for its size) and the name."""
    return _PAIR.unpack_from(body)[0], bytes(body[_PAIR.size : -1])


def parse_listxattr(body: Buffer) -> int:
    """LISTXATTR: room for the names (0 asks for the size)."""
    size: int = _PAIR.unpack_from(body)[0]
    return size


def parse_forget(body: Buffer) -> int:
    """FORGET: lookups to take back."""
    count: int = _QUAD.unpack_from(body)[0]
    return count


def parse_batch_forget(body: Buffer) -> list[tuple[int, int]]:
    """BATCH_FORGET: pairs of node id and lookups."""
    count = _PAIR.unpack_from(body)[0]
    end = _PAIR.size + count * _FORGET_ONE.size
    return [(node, times) for node, times in _FORGET_ONE.iter_unpack(body[_PAIR.size : end])]


def parse_fallocate(body: Buffer) -> FallocateIn:
    """FALLOCATE."""
    return FallocateIn(*_FALLOCATE_IN.unpack_from(body))


def parse_lseek(body: Buffer) -> LseekIn:
    """LSEEK."""
    return LseekIn(*_LSEEK_IN.unpack_from(body))


def parse_copy(body: Buffer) -> CopyIn:
    """COPY_FILE_RANGE and COPY_FILE_RANGE_64."""
    return CopyIn(*_COPY_IN.unpack_from(body))


def _rename_without_flags(newdir: int) -> RenameIn:
    return RenameIn(newdir, 0)


class Shape(NamedTuple):
    """What a parser does, for :class:`lazarette.fuse.serving.Route`, where the fields are told."""

    layout: bytes = b""
    make: Callable[..., object] | None = None
    names: int = 0


def _shape(
    layout: struct.Struct, make: Callable[..., object] | None = None, names: int = 0
) -> Shape:
    return Shape(layout.format.encode(), make, names)


_FIRST_OF_TWO = struct.Struct("=I4x")

SHAPES: dict[Callable[..., object], Shape] = {
    parse_name: Shape(names=1),
    parse_two_names: Shape(names=2),
    parse_getattr: _shape(_GETATTR_IN, GetattrIn),
    parse_setattr: _shape(_SETATTR_IN, SetattrIn),
    parse_mknod: _shape(_MKNOD_IN, MknodIn, 1),
    parse_mkdir: _shape(_PAIR, MkdirIn, 1),
    parse_rename: Shape(b"Q", _rename_without_flags, 2),
    parse_rename2: _shape(_RENAME2_IN, RenameIn, 2),
    parse_link: _shape(_QUAD, names=1),
    parse_open: _shape(_PAIR, OpenIn),
    parse_create: _shape(_CREATE_IN, CreateIn, 1),
    parse_release: _shape(_RELEASE_IN, ReleaseIn),
    parse_read: _shape(_READ_IN, ReadIn),
    parse_fsync: _shape(_FSYNC_IN, FsyncIn),
    parse_getxattr: _shape(_FIRST_OF_TWO, names=1),
    parse_listxattr: _shape(_FIRST_OF_TWO),
    parse_forget: _shape(_QUAD),
    parse_fallocate: _shape(_FALLOCATE_IN, FallocateIn),
    parse_lseek: _shape(_LSEEK_IN, LseekIn),
    parse_copy: _shape(_COPY_IN, CopyIn),
}
"""Parsers whose work :data:`lazarette.fuse.serving.serve` can do."""

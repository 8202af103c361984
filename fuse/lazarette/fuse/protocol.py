"""The kernel's FUSE messages: opcodes, flags and one layout per message.

Source of every number and layout here: ``include/uapi/linux/fuse.h`` of Linux (protocol
7.45; the lowest spoken is 7.31).  All integers are in host byte order and every message is
padded to eight bytes.  A request is a 40-byte header, a fixed body and up to two NUL-ended
names; a reply is a 16-byte header and a body.

Requests are parsed once, here, into the structs below; replies are packed by the
functions ``*_reply``.  Nothing else in the package knows an offset.
"""

from __future__ import annotations

import os
import struct
from enum import IntEnum, IntFlag

import msgspec

KERNEL_MAJOR = 7
"""Protocol major number; another one is refused."""

LOWEST_MINOR = 31
"""Oldest minor number this code speaks (Linux 5.4)."""

OUR_MINOR = 45
"""Newest minor number this code knows."""

ROOT_ID = 1
"""Node id of the root."""

MIN_READ_BUFFER = 8192
NAME_MAX = 255
FOREVER = 86400
"""Seconds the kernel may keep a name or attributes when only the server changes them."""


class Opcode(IntEnum):
    """``enum fuse_opcode``."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class InitFlag(IntFlag):
    """Abilities negotiated by INIT; bits from 32 travel in ``flags2``."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    FLOCK_LOCKS = 1 << 10
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    SECURITY_CTX = 1 << 32
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40


class OpenFlag:
    """``FOPEN_*``: what the reply to OPEN asks of the kernel (plain numbers: they are hot)."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3
    NOFLUSH = 1 << 5
    PARALLEL_DIRECT_WRITES = 1 << 6
    PASSTHROUGH = 1 << 7


class SetattrValid:
    """``FATTR_*``: which fields of SETATTR count (plain numbers: they are hot)."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCKOWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


class Notify(IntEnum):
    """``enum fuse_notify_code``: messages the server sends by itself."""

    INVAL_INODE = 2
    INVAL_ENTRY = 3
    STORE = 4
    DELETE = 6


GETATTR_FH = 1 << 0
WRITE_CACHE = 1 << 0
WRITE_KILL_SUIDGID = 1 << 2
OPEN_KILL_SUIDGID = 1 << 0
FSYNC_DATASYNC = 1 << 0
SETXATTR_ACL_KILL_SGID = 1 << 0

IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
_INIT_IN = struct.Struct("=IIII")
_INIT_IN_EXT = struct.Struct("=IIIII")
_INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY_OUT = struct.Struct("=QQQQIIQQQQQQIIIIIIIIII")
_ATTR_OUT = struct.Struct("=QIIQQQQQQIIIIIIIIII")
_OPEN_OUT = struct.Struct("=QIi")
_WRITE_OUT = struct.Struct("=II")
_SIZE_OUT = struct.Struct("=II")
_LSEEK_OUT = struct.Struct("=Q")
_STATFS_OUT = struct.Struct("=QQQQQIIII24x")
_DIRENT = struct.Struct("=QQII")
_LK_OUT = struct.Struct("=QQII")
_FORGET_ONE = struct.Struct("=QQ")
_NOTIFY_INVAL_INODE = struct.Struct("=Qqq")
_NOTIFY_INVAL_ENTRY = struct.Struct("=QII")
_QUAD = struct.Struct("=Q")
_PAIR = struct.Struct("=II")

_GETATTR_IN = struct.Struct("=IIQ")
_SETATTR_IN = struct.Struct("=I4xQQQQQQIIII4xII4x")
_MKNOD_IN = struct.Struct("=III4x")
_MKDIR_IN = struct.Struct("=II")
_RENAME2_IN = struct.Struct("=QI4x")
_OPEN_IN = struct.Struct("=II")
_CREATE_IN = struct.Struct("=IIII")
_RELEASE_IN = struct.Struct("=QIIQ")
_READ_IN = struct.Struct("=QQIIQI4x")
_WRITE_IN = struct.Struct("=QQIIQI4x")
_FSYNC_IN = struct.Struct("=QI4x")
_SETXATTR_IN = struct.Struct("=II")
_SETXATTR_IN_EXT = struct.Struct("=III4x")
_FALLOCATE_IN = struct.Struct("=QQQI4x")
_LSEEK_IN = struct.Struct("=QQI4x")
_COPY_IN = struct.Struct("=QQQQQQQ")

WRITE_IN_SIZE = _WRITE_IN.size


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
    return MkdirIn(*_MKDIR_IN.unpack_from(body)), bytes(body[_MKDIR_IN.size : -1])


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
    return OpenIn(*_OPEN_IN.unpack_from(body))


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
    header = WriteIn(*_WRITE_IN.unpack_from(body))
    return header, body[_WRITE_IN.size : _WRITE_IN.size + header.size]


def parse_fsync(body: Buffer) -> FsyncIn:
    """FSYNC and FSYNCDIR."""
    return FsyncIn(*_FSYNC_IN.unpack_from(body))


def parse_setxattr(body: Buffer, extended: bool) -> tuple[SetxattrIn, bytes, bytes]:
    """SETXATTR with name and value; ``extended`` as negotiated (``SETXATTR_EXT``)."""
    if extended:
        head, start = SetxattrIn(*_SETXATTR_IN_EXT.unpack_from(body)), _SETXATTR_IN_EXT.size
    else:
        head, start = SetxattrIn(*_SETXATTR_IN.unpack_from(body)), _SETXATTR_IN.size
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


def init_reply(
    minor: int, readahead: int, flags: InitFlag, max_write: int, stack_depth: int
) -> bytes:
    """INIT's answer; ``stack_depth`` 1 lets passthrough files lie on plain filesystems."""
    return _INIT_OUT.pack(
        KERNEL_MAJOR,
        min(minor, OUR_MINOR),
        readahead,
        flags & 0xFFFFFFFF,
        64,
        48,
        max_write,
        1,
        max_write // 4096,
        0,
        flags >> 32,
        stack_depth,
        0,
    )


def encode_device(device: int) -> int:
    """A device number as the protocol carries it (``new_encode_dev``)."""
    minor = os.minor(device)
    return (minor & 0xFF) | (os.major(device) << 8) | ((minor & ~0xFF) << 12)


def decode_device(value: int) -> int:
    """The reverse of :func:`encode_device`."""
    return os.makedev((value & 0xFFF00) >> 8, (value & 0xFF) | ((value >> 12) & 0xFFF00))


def entry_reply(
    node: int, ino: int, st: os.stat_result, nlink: int, entry_ttl: int, attr_ttl: int
) -> bytes:
    """``struct fuse_entry_out``: a node with its attributes; times to live in seconds."""
    asec, ansec = divmod(st.st_atime_ns, 1_000_000_000)
    msec, mnsec = divmod(st.st_mtime_ns, 1_000_000_000)
    csec, cnsec = divmod(st.st_ctime_ns, 1_000_000_000)
    rdev = st.st_rdev
    return _ENTRY_OUT.pack(
        node,
        0,
        entry_ttl,
        attr_ttl,
        0,
        0,
        ino,
        st.st_size,
        st.st_blocks,
        asec & 0xFFFFFFFFFFFFFFFF,
        msec & 0xFFFFFFFFFFFFFFFF,
        csec & 0xFFFFFFFFFFFFFFFF,
        ansec,
        mnsec,
        cnsec,
        st.st_mode,
        nlink,
        st.st_uid,
        st.st_gid,
        encode_device(rdev) if rdev else 0,
        st.st_blksize,
        0,
    )


NEGATIVE_REPLY = _ENTRY_OUT.pack(0, 0, FOREVER, *([0] * 19))
"""An entry that says the name does not exist, for the kernel to keep."""


def attr_reply(ino: int, st: os.stat_result, nlink: int, ttl: int) -> bytes:
    """``struct fuse_attr_out``."""
    asec, ansec = divmod(st.st_atime_ns, 1_000_000_000)
    msec, mnsec = divmod(st.st_mtime_ns, 1_000_000_000)
    csec, cnsec = divmod(st.st_ctime_ns, 1_000_000_000)
    rdev = st.st_rdev
    return _ATTR_OUT.pack(
        ttl,
        0,
        0,
        ino,
        st.st_size,
        st.st_blocks,
        asec & 0xFFFFFFFFFFFFFFFF,
        msec & 0xFFFFFFFFFFFFFFFF,
        csec & 0xFFFFFFFFFFFFFFFF,
        ansec,
        mnsec,
        cnsec,
        st.st_mode,
        nlink,
        st.st_uid,
        st.st_gid,
        encode_device(rdev) if rdev else 0,
        st.st_blksize,
        0,
    )


def open_reply(fh: int, flags: int, backing: int = 0) -> bytes:
    """``struct fuse_open_out``; ``backing`` counts with ``OpenFlag.PASSTHROUGH``."""
    return _OPEN_OUT.pack(fh, flags, backing)


def write_reply(size: int) -> bytes:
    """``struct fuse_write_out``."""
    return _WRITE_OUT.pack(size, 0)


def size_reply(size: int) -> bytes:
    """``struct fuse_getxattr_out``: the room a value or list of names needs."""
    return _SIZE_OUT.pack(size, 0)


def quad_reply(value: int) -> bytes:
    """``struct fuse_lseek_out`` and ``struct fuse_copy_file_range_out``."""
    return _LSEEK_OUT.pack(value)


def statfs_reply(st: os.statvfs_result) -> bytes:
    """``struct fuse_statfs_out``."""
    return _STATFS_OUT.pack(
        st.f_blocks,
        st.f_bfree,
        st.f_bavail,
        st.f_files,
        st.f_ffree,
        st.f_bsize,
        min(st.f_namemax, NAME_MAX),
        st.f_frsize,
        0,
    )


def dirent(ino: int, offset: int, kind: int, name: bytes) -> bytes:
    """``struct fuse_dirent``; ``offset`` is where the next entry starts."""
    size = len(name)
    return _DIRENT.pack(ino, offset, size, kind) + name + b"\0" * (-size % 8)


ENTRY_SIZE = _ENTRY_OUT.size


def no_lookup_entry() -> bytes:
    """The entry of a READDIRPLUS item whose attributes are left out."""
    return bytes(ENTRY_SIZE)


def error_reply(errno: int, unique: int) -> bytes:
    """A whole reply that carries only an error number."""
    return OUT_HEADER.pack(16, -errno, unique)


def notify_inval_inode(node: int, offset: int, length: int) -> bytes:
    """A whole message: forget attributes and, unless ``offset`` < 0, cached data."""
    body = _NOTIFY_INVAL_INODE.pack(node, offset, length)
    return OUT_HEADER.pack(16 + len(body), Notify.INVAL_INODE, 0) + body


def notify_inval_entry(parent: int, name: bytes) -> bytes:
    """A whole message: forget a name."""
    body = _NOTIFY_INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0"
    return OUT_HEADER.pack(16 + len(body), Notify.INVAL_ENTRY, 0) + body

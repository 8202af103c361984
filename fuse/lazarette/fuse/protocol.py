"""The kernel's FUSE protocol: its opcodes and flags.

Source of every number and layout here: ``include/uapi/linux/fuse.h`` of Linux (protocol
7.45; the lowest spoken is 7.31).  All integers are in host byte order and every message is
padded to eight bytes.  A request is a 40-byte header, a fixed body and up to two NUL-ended
names; a reply is a 16-byte header and a body.

The numbers are here; :mod:`lazarette.fuse.requests` parses requests, once, into structs, and
:mod:`lazarette.fuse.replies` packs replies and notifications.  Nothing else knows an offset.
"""

from __future__ import annotations

import os
from enum import IntEnum, IntFlag

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
UNIQUE_RESEND = 1 << 63
"""Bit in the number of a request that was handed to a server before."""
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
    RESEND = 7


GETATTR_FH = 1 << 0
WRITE_CACHE = 1 << 0
WRITE_KILL_SUIDGID = 1 << 2
OPEN_KILL_SUIDGID = 1 << 0
FSYNC_DATASYNC = 1 << 0
SETXATTR_ACL_KILL_SGID = 1 << 0


def encode_device(device: int) -> int:
    """A device number as the protocol carries it (``new_encode_dev``)."""
    minor = os.minor(device)
    return (minor & 0xFF) | (os.major(device) << 8) | ((minor & ~0xFF) << 12)


def decode_device(value: int) -> int:
    """The reverse of :func:`encode_device`."""
    return os.makedev((value & 0xFFF00) >> 8, (value & 0xFF) | ((value >> 12) & 0xFFF00))

"""What the server answers, and what it tells the kernel by itself: packing of each message.

Layouts: see :mod:`lazarette.fuse.protocol`.  A reply is a 16-byte header and a body; the
functions ``*_reply`` pack bodies, the others whole messages.
"""

from __future__ import annotations

import os
import struct

from lazarette.fuse import native
from lazarette.fuse.protocol import FOREVER, KERNEL_MAJOR, NAME_MAX, OUR_MINOR, InitFlag, Notify

OUT_HEADER = struct.Struct("=IiQ")
_PAIR = struct.Struct("=II")
_QUAD = struct.Struct("=Q")
_INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
_OPEN_OUT = struct.Struct("=QIi")
_STATFS_OUT = struct.Struct("=QQQQQIIII24x")
_DIRENT = struct.Struct("=QQII")
_NOTIFY_INVAL_INODE = struct.Struct("=Qqq")
_NOTIFY_INVAL_ENTRY = struct.Struct("=QII")

ENTRY_SIZE = native.ENTRY_OUT.size

entry_reply = native.entry_reply
attr_reply = native.attr_reply


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


NEGATIVE_REPLY = native.ENTRY_OUT.pack(0, 0, FOREVER, *([0] * 19))
"""An entry that says the name does not exist, for the kernel to keep."""


def open_reply(fh: int, flags: int, backing: int = 0) -> bytes:
    """``struct fuse_open_out``; ``backing`` counts with ``OpenFlag.PASSTHROUGH``."""
    return _OPEN_OUT.pack(fh, flags, backing)


def write_reply(size: int) -> bytes:
    """``struct fuse_write_out``."""
    return _PAIR.pack(size, 0)


def size_reply(size: int) -> bytes:
    """``struct fuse_getxattr_out``: the room a value or list of names needs."""
    return _PAIR.pack(size, 0)


def quad_reply(value: int) -> bytes:
    """``struct fuse_lseek_out`` and ``struct fuse_copy_file_range_out``."""
    return _QUAD.pack(value)


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


SMALLEST_DIRENT = _DIRENT.size + 8
"""Bytes of a :func:`dirent` with a short name."""

NO_ENTRY = bytes(ENTRY_SIZE)
"""The entry of a READDIRPLUS item whose attributes are left out."""


def error_reply(errno: int, unique: int) -> bytes:
    """A whole reply that carries only an error number."""
    return OUT_HEADER.pack(16, -errno, unique)


def notify_inval_inode(node: int, offset: int, length: int) -> bytes:
    """A whole message: forget attributes and, unless ``offset`` < 0, cached data."""
    body = _NOTIFY_INVAL_INODE.pack(node, offset, length)
    return OUT_HEADER.pack(16 + len(body), Notify.INVAL_INODE, 0) + body


def notify_resend() -> bytes:
    """A whole message: send all requests again that were taken and not answered."""
    return OUT_HEADER.pack(16, Notify.RESEND, 0)


def notify_inval_entry(parent: int, name: bytes) -> bytes:
    """A whole message: forget a name."""
    body = _NOTIFY_INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0"
    return OUT_HEADER.pack(16 + len(body), Notify.INVAL_ENTRY, 0) + body

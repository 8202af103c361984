"""The calls that cost most in a request, in Python: what they do, and how without a C module.

They are the C module's when it was built (it needs nothing but a C compiler), and those of
this module otherwise, or when the environment has ``LAZ_NO_NATIVE``.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import TypeAlias

from lazarette.fuse.protocol import encode_device

try:
    if os.environ.get("LAZ_NO_NATIVE"):
        raise ImportError("not wanted")
    from lazarette.fuse import _native
except ImportError:
    _native = None  # type: ignore[assignment]

ENTRY_OUT = struct.Struct("=QQQQIIQQQQQQIIIIIIIIII")
_ATTR_OUT = struct.Struct("=QIIQQQQQQIIIIIIIIII")
_HEADER = struct.Struct("=IiQ")
_BACKING_OPEN = 0x4010E501
_BACKING_CLOSE = 0x4004E502
_SECOND = 1_000_000_000
_WORD = 0xFFFFFFFFFFFFFFFF
_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100

UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2


@dataclass(frozen=True, slots=True)
class Shown:
    """Attributes that differ from those of the real file."""

    st_mode: int
    st_ino: int
    st_dev: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_rdev: int
    st_size: int
    st_blocks: int
    st_blksize: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int


Status: TypeAlias = "os.stat_result | _native.Stat | Shown"
"""Attributes of a file, under the names of ``os.stat_result``."""


def open_at_plain(folder: int | None, name: bytes, flags: int, mode: int, /) -> int:
    """Open ``name`` below the open ``folder``; the descriptor is closed on exec."""
    return os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=folder)


def remove_file_plain(folder: int | None, name: bytes, /) -> None:
    """Remove the name of a file below the open ``folder``."""
    os.unlink(name, dir_fd=folder)


def backing_open_plain(device: int, fd: int, /) -> int:
    """Register ``fd`` as a backing file of a FUSE connection; its id.

    The argument must be a mutable buffer: with an immutable one Python drops the result.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN, ELOOP when ``fd`` lies on a stacked filesystem,
            ENOTTY on kernels before 6.9.
    """
    argument = bytearray(struct.pack("=iIQ", fd, 0, 0))
    return int(fcntl.ioctl(device, _BACKING_OPEN, argument))


def backing_close_plain(device: int, backing: int, /) -> None:
    """Give a backing id back."""
    fcntl.ioctl(device, _BACKING_CLOSE, bytearray(struct.pack("=I", backing)))


def status_plain(folder: int | None, name: bytes, follow: bool, /) -> Status:
    """Attributes of ``name`` below the open ``folder``; ``follow`` a symlink at its end."""
    return os.stat(name, dir_fd=folder, follow_symlinks=follow)


def seek_plain(folder: int | None, name: bytes, /) -> Status | None:
    """Attributes of the entry ``name`` itself, None where there is none."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def opened_plain(descriptor: int, /) -> Status:
    """Attributes of an open file."""
    return os.stat(descriptor)


def entry_reply_plain(
    node: int, ino: int, st: Status, nlink: int, entry_ttl: int, attr_ttl: int, /
) -> bytes:
    """``struct fuse_entry_out``: a node with its attributes; times to live in seconds."""
    return ENTRY_OUT.pack(node, 0, entry_ttl, attr_ttl, 0, 0, ino, *_attributes(st, nlink))


def attr_reply_plain(ino: int, st: Status, nlink: int, ttl: int, /) -> bytes:
    """``struct fuse_attr_out``."""
    return _ATTR_OUT.pack(ttl, 0, 0, ino, *_attributes(st, nlink))


def attr_at_plain(
    folder: int | None, name: bytes, follow: bool, ino: int, nlink: int, ttl: int, /
) -> bytes:
    """As :func:`attr_of_plain`, of ``name`` below the open ``folder``."""
    st = os.stat(name, dir_fd=folder, follow_symlinks=follow)
    return attr_reply_plain(ino, st, st.st_nlink if nlink < 0 else nlink, ttl)


def attr_of_plain(descriptor: int, ino: int, nlink: int, ttl: int, /) -> bytes:
    """``struct fuse_attr_out`` of an open file; ``nlink`` < 0: as many links as it has."""
    st = os.stat(descriptor)
    return attr_reply_plain(ino, st, st.st_nlink if nlink < 0 else nlink, ttl)


def _attributes(st: Status, nlink: int) -> tuple[int, ...]:
    """``struct fuse_attr`` after the inode number."""
    asec, ansec = divmod(st.st_atime_ns, _SECOND)
    msec, mnsec = divmod(st.st_mtime_ns, _SECOND)
    csec, cnsec = divmod(st.st_ctime_ns, _SECOND)
    rdev = st.st_rdev
    return (
        st.st_size,
        st.st_blocks,
        asec & _WORD,
        msec & _WORD,
        csec & _WORD,
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


def answer_plain(device: int, unique: int, body: bytes, /) -> None:
    """Write the reply to a request that succeeded."""
    os.write(device, _HEADER.pack(16 + len(body), 0, unique) + body)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)


def set_times_plain(
    folder: int | None,
    name: bytes,
    follow: bool,
    atime: int,
    atime_ns: int,
    mtime: int,
    mtime_ns: int,
    /,
) -> None:
    """Set times, in seconds and nanoseconds; ``UTIME_NOW``, ``UTIME_OMIT`` as nanoseconds."""
    pair = (_Timespec * 2)(_Timespec(atime, atime_ns), _Timespec(mtime, mtime_ns))
    where = _AT_FDCWD if folder is None else folder
    flags = 0 if follow else _AT_SYMLINK_NOFOLLOW
    if _libc.utimensat(where, name, ctypes.byref(pair), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)


def set_owner_plain(folder: int | None, name: bytes, follow: bool, uid: int, gid: int, /) -> None:
    """Set owner and group; -1 leaves one as it is."""
    os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=follow)


def set_mode_plain(folder: int | None, name: bytes, mode: int, /) -> None:
    """Set the mode; a symlink at the end is followed."""
    os.chmod(name, mode, dir_fd=folder)


if _native is None:
    open_at = open_at_plain
    remove_file = remove_file_plain
    backing_open = backing_open_plain
    backing_close = backing_close_plain
    status = status_plain
    seek = seek_plain
    opened = opened_plain
    entry_reply = entry_reply_plain
    attr_reply = attr_reply_plain
    attr_of = attr_of_plain
    attr_at = attr_at_plain
    answer = answer_plain
    set_times = set_times_plain
    set_owner = set_owner_plain
    set_mode = set_mode_plain
else:
    open_at = _native.open_at
    remove_file = _native.remove_file
    backing_open = _native.backing_open
    backing_close = _native.backing_close
    status = _native.status
    seek = _native.seek
    opened = _native.opened
    entry_reply = _native.entry_reply
    attr_reply = _native.attr_reply
    attr_of = _native.attr_of
    attr_at = _native.attr_at
    answer = _native.answer
    set_times = _native.set_times
    set_owner = _native.set_owner
    set_mode = _native.set_mode

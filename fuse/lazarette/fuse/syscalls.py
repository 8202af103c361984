"""System calls that Python's ``os`` does not offer, raising ``OSError`` like it.

Numbers and structures: ``linux/fs.h`` (FICLONE, FIEMAP),
renameat2(2), fallocate(2), umount2(2), fcntl(2).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
from dataclasses import dataclass

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOATIME = 1024
MNT_DETACH = 2

_FICLONE = 0x40049409
_FIEMAP = 0xC020660B
_FIEMAP_LAST = 1

_libc = ctypes.CDLL(None, use_errno=True)


_libc.renameat2.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.syncfs.argtypes = (ctypes.c_int,)


def _raise(path: bytes | None = None) -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), path)


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """Rename with ``RENAME_*`` flags."""
    if _libc.renameat2(old_dir, old, new_dir, new, flags) != 0:
        _raise(old)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate, punch, zero, collapse or insert a range, by ``mode``."""
    if _libc.fallocate(fd, mode, offset, length) != 0:
        _raise()


def ended(process: int, seconds: float | None = None) -> bool:
    """Wait until the process of a pidfd has ended, at most so long; whether it has.

    By poll(2): a select(2) fails for the descriptors of those who have many.
    """
    waiting = select.poll()
    waiting.register(process, select.POLLIN)
    return bool(waiting.poll(None if seconds is None else 1000 * seconds))


def syncfs(fd: int) -> None:
    """Write out everything dirty of the filesystem ``fd`` lies on."""
    if _libc.syncfs(fd) != 0:
        _raise()


def mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    """mount(2)."""
    parts = [os.fsencode(text) for text in (source, target, kind)]
    if _libc.mount(parts[0], parts[1], parts[2], flags, data.encode()) != 0:
        _raise(parts[1])


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    path = os.fsencode(target)
    if _libc.umount2(path, flags) != 0:
        _raise(path)


def clone_file(destination: int, source: int) -> None:
    """Make ``destination`` share all data of ``source`` (FICLONE)."""
    fcntl.ioctl(destination, _FICLONE, source)


@dataclass(frozen=True, slots=True)
class Extent:
    """One run of a file: byte offsets in the file and on the device, length, FIEMAP flags."""

    logical: int
    physical: int
    length: int
    flags: int


_FIEMAP_HEAD = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQ16xI12x")
_FIEMAP_BATCH = 512
FIEMAP_SYNC = 1


def extents(fd: int, sync: bool = False) -> list[Extent]:
    """The extent map of a file, in order; ``sync`` writes dirty pages out before."""
    found: list[Extent] = []
    start = 0
    while True:
        buffer = bytearray(_FIEMAP_HEAD.size + _FIEMAP_BATCH * _FIEMAP_EXTENT.size)
        length = (1 << 64) - 1 - start
        flags = FIEMAP_SYNC if sync else 0
        _FIEMAP_HEAD.pack_into(buffer, 0, start, length, flags, 0, _FIEMAP_BATCH, 0)
        fcntl.ioctl(fd, _FIEMAP, buffer)
        mapped = _FIEMAP_HEAD.unpack_from(buffer)[3]
        for index in range(mapped):
            at = _FIEMAP_HEAD.size + index * _FIEMAP_EXTENT.size
            extent = Extent(*_FIEMAP_EXTENT.unpack_from(buffer, at))
            found.append(extent)
        if mapped < _FIEMAP_BATCH or found[-1].flags & _FIEMAP_LAST:
            return found
        start = found[-1].logical + found[-1].length

"""Reading a tree's metadata: names, inodes, extended attributes, inode flags, mounts.

Everything goes by directory descriptors and single names, so a path may be longer than the
kernel's limit and a symlink put in the way is never followed.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import stat
from pathlib import Path

from lazarette.backup.repository.entries import Entry, Extra, Kind
from lazarette.storage.errors import SourceMissing

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
KEPT_FLAGS = 0x00000010 | 0x00000020 | 0x00000040 | 0x00000080 | 0x00000008 | 0x00010000
"""Inode flags that are kept: immutable, append, no dump, no atime, sync, dirsync …"""
KEPT_FLAGS |= 0x00000004 | 0x00000400 | 0x00800000 | 0x20000000
"""… compress, no compression, no copy-on-write, inherit project (include/uapi/linux/fs.h)."""
LATE_FLAGS = 0x00000010 | 0x00000020
"""Of these, those that can only be set when all else is done: immutable, append."""

_NO_XATTRS = {errno.EOPNOTSUPP, errno.ENODATA, errno.ENOENT, errno.ENOSYS}
_INT64 = 1 << 63

_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET,
    stat.S_IFCHR: Kind.CHARACTER,
    stat.S_IFBLK: Kind.BLOCK,
}


def open_root(root: Path) -> int:
    """Open the folder to be saved.

    Raises:
        SourceMissing: it is absent, no folder, or its device failed.
    """
    try:
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as gone:
        raise SourceMissing(
            f"source {root} cannot be read: {gone.strerror}",
            hint="check that the volume exists and is mounted",
        ) from gone


def names(directory: int) -> list[tuple[bytes, os.stat_result]]:
    """Entries of an open directory with their inodes' metadata, ascending by name.

    An entry that vanished between listing and stat is left out.
    """
    found = []
    with os.scandir(directory) as listing:
        for item in listing:
            try:
                found.append((os.fsencode(item.name), item.stat(follow_symlinks=False)))
            except FileNotFoundError:
                continue
    found.sort(key=lambda pair: pair[0])
    return found


def kind_of(mode: int) -> Kind:
    """Kind of an inode by its ``st_mode``."""
    return _KINDS[stat.S_IFMT(mode)]


def _clamp(value: int) -> int:
    return max(-_INT64, min(_INT64 - 1, value))


def entry_of(name: bytes, status: os.stat_result) -> Entry:
    """An entry from what ``stat`` says; content and extended attributes are still to come."""
    kind = kind_of(status.st_mode)
    extra = None
    mtime = status.st_mtime_ns
    if not -_INT64 <= mtime < _INT64:
        extra = Extra(mtime=divmod(mtime, 1_000_000_000))
    if kind is not Kind.DIRECTORY and status.st_nlink > 1:
        extra = extra or Extra()
        extra.links = status.st_nlink
        extra.filesystem = status.st_dev
    if kind in (Kind.CHARACTER, Kind.BLOCK):
        extra = extra or Extra()
        extra.device = status.st_rdev
    return Entry(
        name,
        int(kind),
        stat.S_IMODE(status.st_mode),
        status.st_uid,
        status.st_gid,
        _clamp(mtime),
        _clamp(status.st_ctime_ns),
        status.st_ino,
        status.st_size if kind is Kind.FILE else 0,
        extra=extra,
    )


def xattrs(target: int | bytes) -> dict[bytes, bytes]:
    """Extended attributes of a descriptor, or of a path whose last part is not followed."""
    follow = isinstance(target, int)
    try:
        listed = os.listxattr(target, follow_symlinks=follow)
    except OSError as failed:
        if failed.errno in _NO_XATTRS:
            return {}
        raise
    found = {}
    for name in listed:
        try:
            found[os.fsencode(name)] = os.getxattr(target, name, follow_symlinks=follow)
        except OSError as failed:
            if failed.errno not in _NO_XATTRS:
                raise
    return found


def beside(directory: int, name: bytes) -> bytes:
    """A path to an entry of an open directory, for calls that take no descriptor."""
    return b"/proc/self/fd/%d/%s" % (directory, name)


def flags(descriptor: int) -> int:
    """Inode flags of those that are kept; 0 where the filesystem has none."""
    value = array.array("l", [0])
    try:
        fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, value, True)
    except OSError:
        return 0
    return int(value[0]) & 0xFFFFFFFF & KEPT_FLAGS


def set_flags(descriptor: int, wanted: int, among: int = KEPT_FLAGS) -> None:
    """Set inode flags to ``wanted``, leaving those outside ``among`` alone.

    Raises:
        OSError: the filesystem refuses.
    """
    value = array.array("l", [0])
    fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, value, True)
    new = (int(value[0]) & ~among) | (wanted & among)
    if new != value[0]:
        value[0] = new
        fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, value, True)


def put_extras(entry: Entry, attributes: dict[bytes, bytes], inode_flags: int) -> None:
    """Note extended attributes and flags in an entry."""
    if attributes or inode_flags:
        extra = entry.extra = entry.extra or Extra()
        extra.xattrs = attributes
        extra.flags = inode_flags


def mounts_beneath(root: Path) -> set[bytes]:
    """Mount points under a folder, relative to it, from ``/proc/self/mountinfo``."""
    top = os.fsencode(os.path.realpath(root)).rstrip(b"/") + b"/"
    found = set()
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            point = _unescape(line.split(b" ", 5)[4])
            if point.startswith(top) and point != top:
                found.add(point[len(top) :])
    return found


def _unescape(text: bytes) -> bytes:
    if b"\\" not in text:
        return text
    parts = text.split(b"\\")
    return parts[0] + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in parts[1:])


def data_ranges(descriptor: int, size: int) -> list[tuple[int, int]]:
    """Where a file has data: (offset, end) pairs; all of it where holes are unknown."""
    found = []
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as failed:
            if failed.errno == errno.ENXIO:
                break
            return [(0, size)]
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        found.append((start, min(end, size)))
        at = end
    return found

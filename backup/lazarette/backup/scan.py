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

from lazarette.backup.native import FS_IOC_GETFLAGS, Inode
from lazarette.backup.repository.entries import Entry, Extra, Kind
from lazarette.storage.errors import SourceMissing

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_FS_IOC_SETFLAGS = 0x40086602
KEPT_FLAGS = 0x00000010 | 0x00000020 | 0x00000040 | 0x00000080 | 0x00000008 | 0x00010000
"""Inode flags that are kept: immutable, append, no dump, no atime, sync, dirsync …"""
KEPT_FLAGS |= 0x00000004 | 0x00000400 | 0x00800000 | 0x20000000
"""… compress, no compression, no copy-on-write, inherit project (include/uapi/linux/fs.h)."""
EMPTY_FLAGS = 0x00800000 | 0x00000004 | 0x00000400
"""Of these, those that only an empty file takes on some filesystems."""
LATE_FLAGS = 0x00000010 | 0x00000020
"""Of these, those that can only be set when all else is done: immutable, append."""

PLAIN_FLAGS = KEPT_FLAGS & ~LATE_FLAGS & ~EMPTY_FLAGS
"""The others."""

_NO_XATTRS = {errno.EOPNOTSUPP, errno.ENODATA, errno.ENOENT, errno.ENOSYS}
_INT64 = 1 << 63
_SECOND = 1_000_000_000
_KIND_MASK = 0o170000

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


def kind_of(mode: int) -> Kind:
    """Kind of an inode by its ``st_mode``."""
    return _KINDS[stat.S_IFMT(mode)]


def _clamp(value: int) -> int:
    return max(-_INT64, min(_INT64 - 1, value))


def entry_of(name: bytes, inode: Inode) -> Entry:
    """An entry from an inode; content and extended attributes are still to come."""
    (_, mode, uid, gid, size, mtime, mtime_part, ctime, ctime_part, number, links, *more) = inode
    kind = _KINDS[mode & _KIND_MASK]
    extra = None
    when = mtime * _SECOND + mtime_part
    if not -_INT64 <= when < _INT64:
        extra = Extra(mtime=(mtime, mtime_part))
        when = _clamp(when)
    if links > 1 and kind is not Kind.DIRECTORY:
        extra = extra or Extra()
        extra.links = links
        extra.filesystem = more[0]
    if kind in (Kind.CHARACTER, Kind.BLOCK):
        extra = extra or Extra()
        extra.device = more[1]
    return Entry(
        name,
        kind.value,
        mode & 0o7777,
        uid,
        gid,
        when,
        _clamp(ctime * _SECOND + ctime_part),
        number,
        size if kind is Kind.FILE else 0,
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
        fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, value, True)
    except OSError:
        return 0
    return int(value[0]) & 0xFFFFFFFF & KEPT_FLAGS


def set_flags(descriptor: int, wanted: int, among: int = KEPT_FLAGS) -> None:
    """Set inode flags to ``wanted``, leaving those outside ``among`` alone.

    Raises:
        OSError: the filesystem refuses.
    """
    value = array.array("l", [0])
    fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, value, True)
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

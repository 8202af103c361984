"""The loops that the C module speeds up, in Python: what they do, and how without it.

:func:`scan`, :func:`read_files`, :func:`write_files`, :func:`hashes`, :func:`page_hashes`,
:func:`read_pages` are the C module's when it was built (it needs nothing but a C compiler), and
those of this module otherwise, or when the environment has ``LAZ_NO_NATIVE``.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import stat
from collections.abc import Callable

from blake3 import blake3

from lazarette.backup.stores.contract import Buffer

try:
    if os.environ.get("LAZ_NO_NATIVE"):
        raise ImportError("not wanted")
    from lazarette.backup import _native
except ImportError:
    _native = None  # type: ignore[assignment]

Inode = tuple[bytes | None, int, int, int, int, int, int, int, int, int, int, int, int, int]
"""name, st_mode, uid, gid, size, mtime seconds and nanoseconds, ctime seconds and
nanoseconds, inode, links, device it is on, device it stands for, 512-byte blocks."""

Small = tuple[int, Inode | None, bytes | None, int, int]
"""error number, inode (None: it changed while it was read, or an error), content, inode
flags, bytes of extended attributes' names (-1 when they cannot be had)."""

OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
FS_IOC_GETFLAGS = 0x80086601
_SECOND = 1_000_000_000
_PAGE = 8192

STAGE_OPEN, STAGE_WRITE, STAGE_METADATA = 1, 2, 3


def inode_of(name: bytes | None, status: os.stat_result) -> Inode:
    """The tuple for what ``stat`` says."""
    return (
        name,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_size,
        *divmod(status.st_mtime_ns, _SECOND),
        *divmod(status.st_ctime_ns, _SECOND),
        status.st_ino,
        status.st_nlink,
        status.st_dev,
        status.st_rdev,
        status.st_blocks,
    )


def scan_plain(directory: int) -> list[Inode]:
    """Entries of an open directory, ascending by name; one that vanishes is left out.

    Raises:
        OSError: it cannot be read.
    """
    found = []
    with os.scandir(directory) as listing:
        for item in listing:
            try:
                status = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            found.append(inode_of(os.fsencode(item.name), status))
    found.sort()
    return found


def read_files_plain(files: list[tuple[int, bytes, int]]) -> list[Small]:
    """Read small files whole.

    Args:
        files: for each its open directory, name and expected size.
    """
    return [_read_file(*file) for file in files]


def _read_file(directory: int, name: bytes, size: int) -> Small:
    try:
        descriptor = open_file(directory, name)
    except OSError as failed:
        return failed.errno or errno.EIO, None, None, 0, 0
    try:
        before = os.fstat(descriptor)
        data = os.read(descriptor, size + 1)
        flags = array.array("l", [0])
        try:
            fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, flags, True)
        except OSError:
            flags[0] = 0
        try:
            attributes = sum(len(os.fsencode(one)) + 1 for one in os.listxattr(descriptor))
        except OSError:
            attributes = -1
        after = os.fstat(descriptor)
        if not stat.S_ISREG(after.st_mode) or not same_state(before, after, len(data)):
            return 0, None, None, 0, 0
        return 0, inode_of(None, after), data, int(flags[0]), attributes
    except OSError as failed:
        return failed.errno or errno.EIO, None, None, 0, 0
    finally:
        os.close(descriptor)


def open_file(directory: int, name: bytes) -> int:
    """Open a file for reading without touching its access time.

    Raises:
        OSError: it is gone, a symlink, or not readable.
    """
    try:
        return os.open(name, OPEN_FILE | os.O_NOATIME, dir_fd=directory)
    except PermissionError:
        return os.open(name, OPEN_FILE, dir_fd=directory)


def same_state(one: os.stat_result, other: os.stat_result, size: int) -> bool:
    """Whether a file is as it was, and ``size`` bytes long."""
    return (
        one.st_mtime_ns == other.st_mtime_ns
        and one.st_ctime_ns == other.st_ctime_ns
        and one.st_size == other.st_size == size
    )


def write_files_plain(
    files: list[tuple[int, bytes, Buffer, int, int, int, int, int]],
) -> list[tuple[int, int]]:
    """Make files, fill them, set owner, mode and time.

    Args:
        files: for each its open directory, name, content, mode, uid (-1: leave the owner), gid,
            and time in seconds and nanoseconds.

    Returns:
        For each how far it came (0: all was done) and the error number.
    """
    return [_write_file(*file) for file in files]


def _write_file(
    directory: int,
    name: bytes,
    data: Buffer,
    mode: int,
    uid: int,
    gid: int,
    seconds: int,
    nanoseconds: int,
) -> tuple[int, int]:
    stage = STAGE_OPEN
    try:
        descriptor = os.open(name, _CREATE, 0o600, dir_fd=directory)
        try:
            stage = STAGE_WRITE
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            stage = STAGE_METADATA
            if uid >= 0:
                os.fchown(descriptor, uid, gid)
            os.fchmod(descriptor, mode)
            when = seconds * _SECOND + nanoseconds
            os.utime(descriptor, ns=(when, when))
        finally:
            os.close(descriptor)
    except (OSError, OverflowError) as failed:
        return stage, getattr(failed, "errno", None) or errno.EINVAL
    return 0, 0


Cuts = Callable[[Buffer, bytes, int, int, int, int, int, bool], list[int]]


def hashes_plain(data: list[Buffer], key: bytes) -> bytes:
    """Keyed BLAKE3 of each of several pieces of data, 16 bytes each, joined.

    One call for many: hashing a small file takes less time than taking the interpreter's lock
    again after it.

    Raises:
        ValueError: the key has not 32 bytes.
    """
    return b"".join([blake3(one, key=key).digest(16) for one in data])


def page_hashes_plain(pages: Buffer, key: bytes) -> bytes:
    """Keyed BLAKE3 of each of several pages of 8 KiB, 16 bytes each, joined.

    Raises:
        ValueError: the last page is not whole.
    """
    view = memoryview(pages)
    if len(view) % _PAGE:
        raise ValueError("whole pages are needed")
    starts = range(0, len(view), _PAGE)
    return b"".join([blake3(view[at : at + _PAGE], key=key).digest(16) for at in starts])


def read_pages_plain(
    file: int, ranges: list[tuple[int, int]], into: bytearray | memoryview, key: bytes
) -> bytes | None:
    """Read ranges of a file one after another into a buffer, and hash their pages.

    Args:
        file: descriptor.
        ranges: offset and length of each, together whole pages of 8 KiB.
        into: has room for them.
        key: 32 bytes.

    Returns:
        Keyed BLAKE3 of the pages, 16 bytes each, joined; None when the file ends before.

    Raises:
        OSError: it cannot be read.
        ValueError: the pages are not whole, or there is no room.
    """
    view = memoryview(into)
    total = sum(length for _, length in ranges)
    if total % _PAGE or total > len(view):
        raise ValueError("whole pages, room for them and a key of 32 bytes")
    at = 0
    for offset, length in ranges:
        end = at + length
        while at < end:
            got = os.preadv(file, [view[at:end]], offset)
            if got == 0:
                return None
            at += got
            offset += got
    return page_hashes_plain(view[:total], key)


def _nothing() -> None:
    """Without the C module memory is kept as the allocator likes."""


cuts: Cuts | None = None
"""The C module's cutting, see :mod:`lazarette.backup.chunker`; None without it."""

if _native is None:
    scan = scan_plain
    read_files = read_files_plain
    write_files = write_files_plain
    hashes = hashes_plain
    page_hashes = page_hashes_plain
    read_pages = read_pages_plain
    keep_memory = _nothing
else:
    scan = _native.scan
    read_files = _native.read_files
    write_files = _native.write_files
    cuts = _native.cuts
    keep_memory = _native.keep_memory
    hashes = getattr(_native, "hashes", hashes_plain)
    page_hashes = getattr(_native, "page_hashes", page_hashes_plain)
    read_pages = getattr(_native, "read_pages", read_pages_plain)

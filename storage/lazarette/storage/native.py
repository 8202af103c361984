"""What a folder with many files costs most, in Python: what it does, and how without a C module.

They are the C module's when it was built (it needs nothing but a C compiler), and those of
this module otherwise, or when the environment has ``LAZ_NO_NATIVE``.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from typing import NamedTuple

from lazarette.fuse.differences import changed_ranges
from lazarette.storage import beneath, extents

try:
    if os.environ.get("LAZ_NO_NATIVE"):
        raise ImportError("not wanted")
    from lazarette.storage import _native
except ImportError:
    _native = None  # type: ignore[assignment]

_RECORD = struct.Struct("=QQqIIIH")
_SMALL = 1 << 20
_SECOND = 1_000_000_000
_DEEPEST = 499
_LEFT_OUT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV)
_IGNORED = ["security.selinux"]

_log = logging.getLogger(__name__)


class Record(NamedTuple):
    """What a listing says of an entry: numbers of ``lstat``, and the length of the name.

    Attributes:
        device, inode: which file it is.
        changed, changed_ns: its change time, seconds and nanoseconds.
        mode: kind and permissions.
        links: how many names the file has.
        name: length of this one, bytes.
    """

    device: int
    inode: int
    changed: int
    changed_ns: int
    mode: int
    links: int
    name: int

    @property
    def ctime_ns(self) -> int:
        """Change time, nanoseconds."""
        return self.changed * _SECOND + self.changed_ns

    @property
    def key(self) -> tuple[int, int]:
        """Which file it is."""
        return self.device, self.inode

    @property
    def is_folder(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_plain(self) -> bool:
        """Whether it is a regular file with one name."""
        return stat.S_ISREG(self.mode) and self.links == 1


def record(packed: bytes) -> Record:
    """Read a record that :func:`split` gave."""
    return Record(*_RECORD.unpack(packed))


def scan_plain(folder: int, /) -> bytes:
    """The entries of a folder: a record and its name, for each, in the folder's own order.

    Two listings that are the same bytes show the same files under the same names, and none
    of their change times moved.

    Args:
        folder: descriptor of the folder, opened for reading.
    """
    os.lseek(folder, 0, os.SEEK_SET)
    listing = bytearray()
    for name in map(os.fsencode, os.listdir(folder)):
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            continue
        listing += _RECORD.pack(
            *(status.st_dev, status.st_ino, *divmod(status.st_ctime_ns, _SECOND)),
            *(status.st_mode, status.st_nlink, len(name)),
        )
        listing += name
    return bytes(listing)


def scan_tree_plain(folder: int, /) -> dict[bytes, bytes]:
    """The listings of a folder and of those below it, by path; its own is ``b""``.

    A folder that vanishes meanwhile, is a mount point, or lies very deep may be left out.
    """
    found = {b"": scan_plain(folder)}
    left = [b""]
    while left:
        path = left.pop()
        for name, packed in split_plain(found[path]).items():
            if not record(packed).is_folder or path.count(b"/") == _DEEPEST:
                continue
            below = path + b"/" + name if path else name
            try:
                inner = beneath.open_parent(folder, below + b"/.")[0]
            except OSError as refused:
                if refused.errno in _LEFT_OUT:
                    continue
                raise
            try:
                found[below] = scan_plain(inner)
            finally:
                os.close(inner)
            left.append(below)
    return found


def split_plain(listing: bytes, /) -> dict[bytes, bytes]:
    """The packed records of a listing by name.

    Raises:
        ValueError: it ends in the middle of an entry.
    """
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(listing):
        packed = listing[at : at + _RECORD.size]
        at += _RECORD.size
        end = at + (int.from_bytes(packed[-2:], "little") if at <= len(listing) else 1)
        if end > len(listing):
            raise ValueError("a listing ends in the middle of an entry")
        found[listing[at:end]] = packed
        at = end
    return found


def copy_files_plain(
    source: int, target: int, names: Iterable[bytes], again: bool, /
) -> list[bytes]:
    """Copy plain files of a folder: content by reflink, owner, mode and times.

    Plain is a regular file with one name and no xattrs.  Without reflinks also content is
    copied that is small and has no holes.

    Args:
        source, target: descriptors of the folders.
        names: in the first one; for the second one.
        again: the target has the files, with other content; otherwise it must not have them.

    Returns:
        Names that were not copied for whatever reason; with ``again`` these may have some
        of the new content, otherwise nothing is there.
    """
    return [name for name in names if not _copied(source, target, name, again)]


def _copied(source: int, target: int, name: bytes, again: bool) -> bool:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    made = False
    with ExitStack() as opened:
        try:
            reading = os.open(name, os.O_RDONLY | flags, dir_fd=source)
            opened.callback(os.close, reading)
            status = _plain(reading)
            if status is None:
                return False
            flags |= os.O_WRONLY | (0 if again else os.O_CREAT | os.O_EXCL)
            writing = os.open(name, flags, 0o600, dir_fd=target)
            opened.callback(os.close, writing)
            made = not again
            if _plain(writing) is not None and _content(reading, status, writing, again):
                os.fchown(writing, status.st_uid, status.st_gid)
                os.fchmod(writing, stat.S_IMODE(status.st_mode))
                os.utime(writing, ns=(status.st_atime_ns, status.st_mtime_ns))
                return True
        except OSError as refused:
            _log.debug("copying %r: %s", name, refused)
        if made:
            os.unlink(name, dir_fd=target)
        return False


def _plain(file: int) -> os.stat_result | None:
    """Attributes of a plain file; None of another."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        return None
    return status if os.listxattr(file) in ([], _IGNORED) else None


def _content(source: int, status: os.stat_result, target: int, again: bool) -> bool:
    size = status.st_size
    if again and os.fstat(target).st_size > size:
        os.ftruncate(target, 0)
    if size == 0:
        return True
    try:
        extents.clone_content(source, target)
    except OSError:
        if again or size > _SMALL or status.st_blocks * 512 < size:
            return False
        content = os.pread(source, size, 0)
        return os.pwrite(target, content, 0) == len(content)
    if again and os.fstat(target).st_size != size:
        os.ftruncate(target, size)
    return True


def unlike_files_plain(one: int, other: int, names: Iterable[bytes], /) -> list[bytes]:
    """Compare plain files (see :func:`copy_files`) of two folders, both immutable.

    Returns:
        Names of which it is not known that the files share all their content and have the
        same owner, mode and modification time.
    """
    return [name for name in names if not _alike(one, other, name)]


def _alike(one: int, other: int, name: bytes) -> bool:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with ExitStack() as opened:
        try:
            a = os.open(name, flags, dir_fd=one)
            opened.callback(os.close, a)
            b = os.open(name, flags, dir_fd=other)
            opened.callback(os.close, b)
            before, after = _plain(a), _plain(b)
            if before is None or after is None or _kept(before) != _kept(after):
                return False
            return changed_ranges(a, b, before.st_size, after.st_size) == ()
        except OSError as refused:
            _log.debug("comparing %r: %s", name, refused)
            return False


def _kept(status: os.stat_result) -> tuple[int, ...]:
    """What a copy has of its file."""
    return status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns


if _native is None:
    scan = scan_plain
    scan_tree = scan_tree_plain
    split = split_plain
    copy_files = copy_files_plain
    unlike_files = unlike_files_plain
else:
    scan = _native.scan
    scan_tree = _native.scan_tree
    split = _native.split
    copy_files = _native.copy_files
    unlike_files = _native.unlike_files

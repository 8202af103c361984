"""Copying trees with all that belongs to them, sharing content where the disk can.

Kept: content with its holes, hard links inside the tree, owner, mode, nanosecond times,
xattrs with ACLs and ``security.capability``, devices, FIFOs and sockets.  Mount points
below the source are not entered.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from lazarette.storage import beneath, extents
from lazarette.storage.errors import Cancelled

BLOCK = 1 << 22
_NO_REFLINK = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ETXTBSY)
_IGNORED = ("trusted.overlay.", "user.overlay.", "btrfs.", "security.selinux")
_TRAVELLING_SYSTEM = ("system.posix_acl_access", "system.posix_acl_default")


def xattr_travels(name: str) -> bool:
    """Whether an xattr belongs to the file rather than to the filesystem under it."""
    if name.startswith("system."):
        return name in _TRAVELLING_SYSTEM
    return not name.startswith(_IGNORED)


def _via(parent: int, name: bytes) -> bytes:
    """A path for the calls that take none relative to a descriptor."""
    return f"/proc/self/fd/{parent}/".encode() + name


def read_xattrs(parent: int, name: bytes) -> dict[str, bytes]:
    """The travelling xattrs of an entry, by name in order; links are not followed."""
    path = _via(parent, name)
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as refused:
        if refused.errno in (errno.EOPNOTSUPP, errno.ENODATA):
            return {}
        raise
    found: dict[str, bytes] = {}
    for key in sorted(filter(xattr_travels, names)):
        try:
            found[key] = os.getxattr(path, key, follow_symlinks=False)
        except OSError as refused:
            if refused.errno != errno.ENODATA:
                raise
    return found


def set_metadata(
    parent: int,
    name: bytes,
    *,
    uid: int,
    gid: int,
    mode: int,
    mtime_ns: int,
    atime_ns: int | None = None,
    xattrs: dict[str, bytes],
) -> None:
    """Give an entry its owner, mode, xattrs and times, in the order in which they last."""
    path = _via(parent, name)
    os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISLNK(mode):
        # after chown, which takes setuid away
        os.chmod(path, stat.S_IMODE(mode))
    for key, value in xattrs.items():
        try:
            os.setxattr(path, key, value, follow_symlinks=False)
        except OSError as refused:
            # a namespace the target has not (user.* on a device, trusted.* without rights)
            if refused.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                raise
    times = (mtime_ns if atime_ns is None else atime_ns, mtime_ns)
    os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)


def copy_metadata(
    source: int, name: bytes, status: os.stat_result, target: int, target_name: bytes
) -> None:
    """Give an entry the metadata of another."""
    set_metadata(
        target,
        target_name,
        uid=status.st_uid,
        gid=status.st_gid,
        mode=status.st_mode,
        mtime_ns=status.st_mtime_ns,
        atime_ns=status.st_atime_ns,
        xattrs=read_xattrs(source, name),
    )


def renew_metadata(
    source: int, name: bytes, status: os.stat_result, target: int, target_name: bytes
) -> None:
    """:func:`copy_metadata` for an entry that had other metadata before."""
    kept = read_xattrs(source, name)
    for key in read_xattrs(target, target_name).keys() - kept.keys():
        os.removexattr(_via(target, target_name), key, follow_symlinks=False)
    copy_metadata(source, name, status, target, target_name)


def _replaced(name: bytes) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "replaced meanwhile", name)


def open_regular(parent: int, name: bytes) -> int:
    """Open for reading what was seen to be a regular file.

    Raises:
        FileNotFoundError: it vanished since, or something else has its name.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        opened = os.open(name, flags, dir_fd=parent)
    except OSError as refused:
        if refused.errno in (errno.ELOOP, errno.ENXIO, errno.ENODEV):
            raise _replaced(name) from refused
        raise
    if stat.S_ISREG(os.fstat(opened).st_mode):
        return opened
    os.close(opened)
    raise _replaced(name)


def copy_content(source: int, target: int, size: int) -> None:
    """Copy a file's content, by reflink where both are on a disk that can, holes kept."""
    if size == 0:
        return
    try:
        extents.clone_content(source, target)
        return
    except OSError as refused:
        if refused.errno not in _NO_REFLINK:
            raise
    os.ftruncate(target, 0)  # nothing of an earlier content may show in a hole
    os.ftruncate(target, size)
    position = 0
    while position < size:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
        except OSError as refused:
            if refused.errno == errno.ENXIO:
                return  # only a hole is left
            raise
        end = os.lseek(source, start, os.SEEK_HOLE)
        position = _copy_range(source, target, start, end)


def _copy_range(source: int, target: int, start: int, end: int) -> int:
    """Copy bytes ``start`` to ``end``; where it stopped, ``end`` unless the file shrank."""
    while start < end:
        wanted = min(BLOCK, end - start)
        try:
            done = os.copy_file_range(source, target, wanted, start, start)
        except OSError as refused:
            if refused.errno not in (*_NO_REFLINK, errno.ENOSYS):
                raise
            data = os.pread(source, wanted, start)
            done = os.pwrite(target, data, start) if data else 0
        if done == 0:
            return end
        start += done
    return end


def copy_entry(
    source: int, name: bytes, status: os.stat_result, target: int, target_name: bytes
) -> None:
    """Copy one entry, a folder without what is in it; metadata included.

    Raises:
        FileNotFoundError: it vanished meanwhile, or something else has its name; what is made
            of the copy stays.
    """
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        os.mkdir(target_name, 0o700, dir_fd=target)
    elif kind == stat.S_IFLNK:
        os.symlink(_read_link(source, name), target_name, dir_fd=target)
    elif kind == stat.S_IFREG:
        reading = open_regular(source, name)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            writing = os.open(target_name, flags, 0o600, dir_fd=target)
            try:
                copy_content(reading, writing, os.fstat(reading).st_size)
            finally:
                os.close(writing)
        finally:
            os.close(reading)
    else:
        os.mknod(target_name, kind | 0o600, status.st_rdev, dir_fd=target)
    copy_metadata(source, name, status, target, target_name)


def copy_tree(source: int, target: int, *, cancelled: Callable[[], bool] = lambda: False) -> None:
    """Copy the content of a folder, and its own metadata, into an empty folder.

    Args:
        source: descriptor of the folder.
        target: descriptor of the empty folder.
        cancelled: asked at each entry.

    Raises:
        Cancelled: it said so; what is copied stays.
        NoSpace: by way of ``OSError`` with ``ENOSPC`` or ``EDQUOT``.
    """
    linked: dict[tuple[int, int], bytes] = {}
    folders: list[tuple[bytes, os.stat_result]] = []
    for entry in beneath.walk(source):
        if cancelled():
            raise Cancelled("copying a tree: cancelled")
        if entry.path == b"":
            continue
        into, name = beneath.open_parent(target, entry.path)
        try:
            key = (entry.status.st_dev, entry.status.st_ino)
            if not entry.is_folder and entry.status.st_nlink > 1:
                first = linked.setdefault(key, entry.path)
                if first != entry.path:
                    _link(target, first, into, name)
                    continue
            copy_entry(entry.parent, entry.name, entry.status, into, name)
        except FileNotFoundError:  # it vanished meanwhile
            beneath.remove_tree(into, name)
            continue
        finally:
            os.close(into)
        if entry.is_folder:
            folders.append((entry.path, entry.status))
    for path, status in reversed(folders):
        into, name = beneath.open_parent(target, path)
        try:
            os.utime(
                name,
                ns=(status.st_atime_ns, status.st_mtime_ns),
                dir_fd=into,
                follow_symlinks=False,
            )
        finally:
            os.close(into)
    copy_metadata(source, b".", os.fstat(source), target, b".")


def _read_link(parent: int, name: bytes) -> bytes:
    try:
        return os.readlink(name, dir_fd=parent)
    except OSError as refused:
        if refused.errno == errno.EINVAL:
            raise _replaced(name) from refused
        raise


def _link(root: int, first: bytes, into: int, name: bytes) -> None:
    holder, original = beneath.open_parent(root, first)
    try:
        os.link(original, name, src_dir_fd=holder, dst_dir_fd=into, follow_symlinks=False)
    finally:
        os.close(holder)

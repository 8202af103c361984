"""Copying entries with all that belongs to them, sharing content where the disk can.

Kept: content with its holes, owner, mode, nanosecond times, xattrs with ACLs and
``security.capability``, devices, FIFOs and sockets.  Whole trees are copied by
:mod:`lazarette.storage.refresh`.
"""

from __future__ import annotations

import errno
import os
import stat

from lazarette.storage import extents

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


def replaced(name: bytes) -> FileNotFoundError:
    """The error for an entry that is no longer what it was seen to be."""
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
            raise replaced(name) from refused
        raise
    if stat.S_ISREG(os.fstat(opened).st_mode):
        return opened
    os.close(opened)
    raise replaced(name)


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


def _drop_inherited(parent: int, name: bytes) -> None:
    """Take away what a new entry has from the default ACL of its folder."""
    for key in read_xattrs(parent, name).keys() & set(_TRAVELLING_SYSTEM):
        os.removexattr(_via(parent, name), key, follow_symlinks=False)


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
    if kind != stat.S_IFLNK:
        _drop_inherited(target, target_name)
    copy_metadata(source, name, status, target, target_name)


def _read_link(parent: int, name: bytes) -> bytes:
    try:
        return os.readlink(name, dir_fd=parent)
    except OSError as refused:
        if refused.errno == errno.EINVAL:
            raise replaced(name) from refused
        raise

"""Linux system calls that Python does not offer, with types.

Numbers above 423 are the same on every architecture; the struct layouts are those of
``linux/openat2.h`` and ``linux/mount.h``.  Every function raises ``OSError`` with the
kernel's errno; nothing here decides anything.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntFlag

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mount.restype = ctypes.c_int
_libc.umount2.restype = ctypes.c_int
_libc.renameat2.restype = ctypes.c_int
_libc.syncfs.restype = ctypes.c_int

_OPEN_TREE = 428
_MOVE_MOUNT = 429
_FSOPEN = 430
_FSCONFIG = 431
_FSMOUNT = 432
_FSPICK = 433
_OPENAT2 = 437
_MOUNT_SETATTR = 442

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

UMOUNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_FSOPEN_CLOEXEC = 1
_CAPABILITY_VERSION_3 = 0x20080522
_FSMOUNT_CLOEXEC = 1
_FSPICK_CLOEXEC = 1

_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSCONFIG_CMD_RECONFIGURE = 7


class Resolve(IntFlag):
    """How :func:`openat2` may walk (``RESOLVE_*``)."""

    NONE = 0
    NO_XDEV = 0x01
    NO_MAGICLINKS = 0x02
    NO_SYMLINKS = 0x04
    BENEATH = 0x08
    IN_ROOT = 0x10


class MountAttr(IntFlag):
    """Attributes of one mount (``MOUNT_ATTR_*``)."""

    NONE = 0
    READ_ONLY = 0x01
    NOSUID = 0x02
    NODEV = 0x04
    NOEXEC = 0x08
    NOATIME = 0x10
    IDMAP = 0x100000
    NOSYMFOLLOW = 0x200000


class Propagation(IntFlag):
    """How mounts and unmounts spread (``MS_*``)."""

    UNCHANGED = 0
    UNBINDABLE = 1 << 17
    PRIVATE = 1 << 18
    SLAVE = 1 << 19
    SHARED = 1 << 20


def _failed(path: bytes = b"") -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), os.fsdecode(path) if path else None)


def _syscall(number: int, *arguments: object, path: bytes = b"") -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise _failed(path)
    return result


def openat2(
    directory: int, path: bytes, flags: int, mode: int = 0, resolve: Resolve = Resolve.NONE
) -> int:
    """Open a path below a directory descriptor with limits on the walk."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    while True:
        try:
            return _syscall(
                _OPENAT2,
                ctypes.c_int(directory),
                ctypes.c_char_p(path),
                ctypes.c_char_p(how),
                ctypes.c_size_t(len(how)),
                path=path,
            )
        except BlockingIOError:
            continue  # a rename raced with the walk: openat2(2) says try again


def open_tree(
    directory: int, path: bytes, *, clone: bool, recursive: bool, nofollow: bool = False
) -> int:
    """A descriptor of a mount, or with ``clone`` of a detached copy of it."""
    flags = _OPEN_TREE_CLOEXEC | (AT_EMPTY_PATH if not path else 0)
    flags |= _OPEN_TREE_CLONE if clone else 0
    flags |= AT_RECURSIVE if clone and recursive else 0
    flags |= AT_SYMLINK_NOFOLLOW if nofollow else 0
    return _syscall(
        _OPEN_TREE,
        ctypes.c_int(directory),
        ctypes.c_char_p(path),
        ctypes.c_uint(flags),
        path=path,
    )


def move_mount(mount: int, target_directory: int, target: bytes) -> None:
    """Attach the mount behind a descriptor at a path, or at a directory descriptor itself."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | (0 if target else _MOVE_MOUNT_T_EMPTY_PATH)
    _syscall(
        _MOVE_MOUNT,
        ctypes.c_int(mount),
        ctypes.c_char_p(b""),
        ctypes.c_int(target_directory),
        ctypes.c_char_p(target),
        ctypes.c_uint(flags),
        path=target,
    )


def fsopen(kind: str) -> int:
    """A context in which to set up a filesystem of that kind."""
    return _syscall(_FSOPEN, ctypes.c_char_p(kind.encode()), ctypes.c_uint(_FSOPEN_CLOEXEC))


def fsconfig(context: int, key: bytes, value: bytes | None) -> None:
    """Set one option of a filesystem context; None sets a flag.

    The kernel takes at most 255 bytes of value.  What it says against the option is in the
    context's log, see :func:`context_log`.
    """
    command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
    _syscall(
        _FSCONFIG,
        ctypes.c_int(context),
        ctypes.c_uint(command),
        ctypes.c_char_p(key),
        ctypes.c_char_p(value),
        ctypes.c_int(0),
        path=key,
    )


def fsconfig_create(context: int) -> None:
    """Make the superblock of a filesystem context, or find the one there is."""
    _syscall(
        _FSCONFIG,
        ctypes.c_int(context),
        ctypes.c_uint(_FSCONFIG_CMD_CREATE),
        ctypes.c_char_p(None),
        ctypes.c_char_p(None),
        ctypes.c_int(0),
    )


def fspick(path: bytes) -> int:
    """A context to reconfigure the filesystem mounted at a path."""
    return _syscall(
        _FSPICK,
        ctypes.c_int(AT_FDCWD),
        ctypes.c_char_p(path),
        ctypes.c_uint(_FSPICK_CLOEXEC),
        path=path,
    )


def fsconfig_reconfigure(context: int) -> None:
    """Apply what was set in a context from :func:`fspick`."""
    _syscall(
        _FSCONFIG,
        ctypes.c_int(context),
        ctypes.c_uint(_FSCONFIG_CMD_RECONFIGURE),
        ctypes.c_char_p(None),
        ctypes.c_char_p(None),
        ctypes.c_int(0),
    )


def fsmount(context: int, attributes: MountAttr = MountAttr.NONE) -> int:
    """A detached mount of a filesystem context."""
    return _syscall(
        _FSMOUNT,
        ctypes.c_int(context),
        ctypes.c_uint(_FSMOUNT_CLOEXEC),
        ctypes.c_uint(attributes),
    )


def context_log(context: int) -> str:
    """What the kernel said about a filesystem context, one line, possibly empty."""
    lines: list[str] = []
    while True:
        try:
            lines.append(os.read(context, 8192).decode(errors="replace").strip())
        except OSError:
            return "; ".join(lines)


def mount_setattr(
    directory: int,
    path: bytes,
    *,
    add: MountAttr = MountAttr.NONE,
    remove: MountAttr = MountAttr.NONE,
    propagation: Propagation = Propagation.UNCHANGED,
    user_namespace: int = 0,
    recursive: bool = False,
) -> None:
    """Change attributes of a mount, or of it and all mounts under it, at once or not at all."""
    attributes = struct.pack("=QQQQ", add, remove, propagation, user_namespace)
    flags = (AT_EMPTY_PATH if not path else 0) | (AT_RECURSIVE if recursive else 0)
    _syscall(
        _MOUNT_SETATTR,
        ctypes.c_int(directory),
        ctypes.c_char_p(path),
        ctypes.c_uint(flags),
        ctypes.c_char_p(attributes),
        ctypes.c_size_t(len(attributes)),
        path=path,
    )


@contextmanager
def filesystem_ids(uid: int, gid: int) -> Iterator[None]:
    """Make files as another user, in this thread alone, without losing root's rights.

    Through a mount that maps owners nobody can make a file whose user the map lacks, and
    the host's root is such a one.  Never ``await`` inside.
    """
    before = _libc.setfsgid(gid), _libc.setfsuid(uid)
    try:
        _raise_permitted()
        yield
    finally:
        _libc.setfsuid(before[1])
        _libc.setfsgid(before[0])


def _raise_permitted() -> None:
    """Make all permitted capabilities effective: leaving fsuid 0 has taken some away."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    if _libc.capget(ctypes.c_char_p(header), data) != 0:
        raise _failed()
    sets = list(struct.unpack("=6I", data.raw))
    sets[0], sets[3] = sets[1], sets[4]
    if _libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(struct.pack("=6I", *sets))) != 0:
        raise _failed()


def classic_mount(source: bytes, target: bytes, kind: str, flags: int, options: bytes) -> None:
    """``mount(2)``, for kernels whose filesystem lacks an option in the newer calls."""
    if (
        _libc.mount(
            ctypes.c_char_p(source),
            ctypes.c_char_p(target),
            ctypes.c_char_p(kind.encode()),
            ctypes.c_ulong(flags),
            ctypes.c_char_p(options),
        )
        != 0
    ):
        raise _failed(target)


def umount2(target: bytes, flags: int = 0) -> None:
    """Take the topmost mount off a path."""
    if _libc.umount2(ctypes.c_char_p(target), ctypes.c_int(flags)) != 0:
        raise _failed(target)


def renameat2(
    old_directory: int, old: bytes, new_directory: int, new: bytes, flags: int = 0
) -> None:
    """Rename with ``RENAME_NOREPLACE`` or ``RENAME_EXCHANGE``."""
    if (
        _libc.renameat2(
            ctypes.c_int(old_directory),
            ctypes.c_char_p(old),
            ctypes.c_int(new_directory),
            ctypes.c_char_p(new),
            ctypes.c_uint(flags),
        )
        != 0
    ):
        raise _failed(new)


def syncfs(descriptor: int) -> None:
    """Write back everything of the filesystem a descriptor is on."""
    if _libc.syncfs(ctypes.c_int(descriptor)) != 0:
        raise _failed()

"""Mounting and unmounting a FUSE filesystem, as root or through ``fusermount3``."""

from __future__ import annotations

import array
import errno
import os
import re
import socket
import stat
from dataclasses import dataclass

from lazarette.fuse import syscalls

DEVICE = "/dev/fuse"


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How a filesystem is mounted.

    Attributes:
        source: what ``/proc/self/mounts`` shows as the device.
        subtype: shown as ``fuse.SUBTYPE``.
        read_only: refuse all writing.
        allow_other: other users than the mounting one may enter (root always may).
        max_read: largest READ the kernel sends, bytes.
    """

    source: str = "lazarette"
    subtype: str = "lazarette"
    read_only: bool = False
    allow_other: bool = True
    max_read: int = 1 << 20


def privileged() -> bool:
    """Whether mount(2) itself can be used."""
    return os.geteuid() == 0


def mount(mountpoint: str, options: MountOptions) -> int:
    """Mount and return the descriptor requests are read from.

    Root mounts by itself; others through ``fusermount3``.

    Raises:
        OSError: the mount was refused.
    """
    if privileged():
        return _mount_directly(mountpoint, options)
    return _mount_through_helper(mountpoint, options)


def _mount_directly(mountpoint: str, options: MountOptions) -> int:
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        mode = stat.S_IFMT(os.stat(mountpoint).st_mode)
        fields = [
            f"fd={device}",
            f"rootmode={mode:o}",
            f"user_id={os.geteuid()}",
            f"group_id={os.getegid()}",
            "default_permissions",
            f"max_read={options.max_read}",
        ]
        if options.allow_other:
            fields.append("allow_other")
        flags = syscalls.MS_RDONLY if options.read_only else 0
        kind = f"fuse.{options.subtype}"
        syscalls.mount(options.source, mountpoint, kind, flags, ",".join(fields))
    except BaseException:
        os.close(device)
        raise
    return device


def _helper() -> str:
    for name in ("fusermount3", "fusermount"):
        for folder in os.environ.get("PATH", "/usr/bin:/bin").split(":"):
            path = os.path.join(folder, name)
            if os.access(path, os.X_OK):
                return path
    raise OSError(errno.ENOENT, "fusermount3 is not installed")


def _run_helper(arguments: list[str], descriptor: int | None = None) -> None:
    environment = dict(os.environ)
    if descriptor is not None:
        os.set_inheritable(descriptor, True)
        environment["_FUSE_COMMFD"] = str(descriptor)
    pid = os.posix_spawn(arguments[0], arguments, environment)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise OSError(errno.EPERM, f"{os.path.basename(arguments[0])} refused", arguments[-1])


def _mount_through_helper(mountpoint: str, options: MountOptions) -> int:
    """Let the setuid helper mount; it hands the descriptor back over a socket."""
    fields = ["default_permissions", f"fsname={options.source}", f"subtype={options.subtype}"]
    fields.append(f"max_read={options.max_read}")
    if options.read_only:
        fields.append("ro")
    if options.allow_other:
        fields.append("allow_other")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        command = [_helper(), "-o", ",".join(fields), "--", mountpoint]
        _run_helper(command, theirs.fileno())
        size = array.array("i").itemsize
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(size))
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors = array.array("i", data[:size])
                os.set_inheritable(descriptors[0], False)
                return descriptors[0]
    raise OSError(errno.EPROTO, "fusermount3 gave no descriptor", mountpoint)


def unmount(mountpoint: str, lazy: bool = False) -> None:
    """Unmount; ``lazy`` takes the mount away from sight while files on it are still open.

    Raises:
        OSError: EBUSY while it is used, EINVAL when nothing is mounted there.
    """
    if privileged():
        syscalls.umount(mountpoint, syscalls.MNT_DETACH if lazy else 0)
        return
    command = [_helper(), "-u", "-q"]
    if lazy:
        command.append("-z")
    _run_helper([*command, "--", mountpoint])


_ESCAPE = re.compile(rb"\\([0-7]{3})")


def is_mounted(mountpoint: str) -> bool:
    """Whether a FUSE filesystem is mounted there, its server alive or not."""
    wanted = os.fsencode(os.path.abspath(mountpoint))
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.split()
            kind = fields[fields.index(b"-") + 1]
            where = _ESCAPE.sub(lambda octal: bytes([int(octal[1], 8)]), fields[4])
            if kind.startswith(b"fuse.") and where == wanted:
                return True
    return False

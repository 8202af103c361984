"""Loop devices: a file as a block device, by the calls of ``linux/loop.h``."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from lazarette.storage.errors import MissingFeature

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_SET_CAPACITY = 0x4C07
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_AUTOCLEAR = 4
_DIRECT_IO = 16
_INFO64 = 232


def available() -> bool:
    """Whether the host has loop devices."""
    return os.access("/dev/loop-control", os.R_OK | os.W_OK)


def attach(backing: int, shown: bytes, *, block_size: int = 4096) -> tuple[int, Path]:
    """Make a block device of an open file.

    The device goes away by itself when its last user (the returned descriptor, a mount)
    lets go, so a killed process leaves none behind.  Direct I/O is asked for: without it
    every page would be cached twice.

    Args:
        backing: descriptor of the file, opened for writing.
        shown: name for ``losetup -l``; at most 63 bytes are kept.
        block_size: logical block of the device, bytes.

    Returns:
        A descriptor that keeps the device alive, and its path.

    Raises:
        MissingFeature: the host has no loop devices.
    """
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as refused:
        raise MissingFeature(
            "the kernel has no loop devices", hint="modprobe loop, or use a native btrfs"
        ) from refused
    try:
        while True:
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            path = Path(f"/dev/loop{number}")
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            info = struct.pack(
                "=QQQQQIIII64s", 0, 0, 0, 0, 0, 0, 0, 0, _AUTOCLEAR | _DIRECT_IO, shown[:63]
            )
            config = bytearray(struct.pack("=II", backing, block_size) + info.ljust(_INFO64, b"\0"))
            config += bytes(64)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as refused:
                os.close(device)
                if refused.errno == errno.EBUSY:
                    continue  # another process took it first
                raise
            return device, path
    finally:
        os.close(control)


def find(backing: int) -> Path | None:
    """The device that an open file is attached to already, if any."""
    wanted = os.fstat(backing)
    for name in os.listdir("/sys/block"):
        if not name.startswith("loop") or not os.path.exists(f"/sys/block/{name}/loop"):
            continue
        path = Path("/dev") / name
        try:
            device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            info = bytearray(_INFO64)
            fcntl.ioctl(device, _LOOP_GET_STATUS64, info)
        except OSError:
            continue
        finally:
            os.close(device)
        owner, inode = struct.unpack_from("=QQ", info)
        if inode == wanted.st_ino and _decode(owner) == wanted.st_dev:
            return path
    return None


def _decode(device: int) -> int:
    """``huge_encode_dev`` of the kernel as Python's ``st_dev``."""
    major = (device >> 8) & 0xFFF
    minor = (device & 0xFF) | ((device >> 12) & 0xFFF00)
    return os.makedev(major, minor)


def update_capacity(device: Path) -> None:
    """Let a device notice that its file's size changed."""
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _LOOP_SET_CAPACITY)
    finally:
        os.close(descriptor)

"""What xfs is told by ioctl (``xfs_fs.h``)."""

from __future__ import annotations

import fcntl
import os
import struct

_FSGROWFSDATA = (1 << 30) | (16 << 16) | (ord("X") << 8) | 110
_INODES_PERCENT = 25


def grow(root: int, size: int) -> None:
    """Make a mounted filesystem larger.

    Args:
        root: descriptor of its root.
        size: of its disk, bytes.

    Raises:
        OSError: the kernel refused.
    """
    block = os.fstatvfs(root).f_frsize
    fcntl.ioctl(root, _FSGROWFSDATA, struct.pack("=QIxxxx", size // block, _INODES_PERCENT))

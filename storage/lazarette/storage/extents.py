"""Extent maps of files (``FS_IOC_FIEMAP``) and clones of their content (``FICLONE``)."""

from __future__ import annotations

import fcntl
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FS_IOC_FIEMAP = 0xC020660B
_FICLONE = 0x40049409
_SYNC = 1
_LAST = 0x1
_UNKNOWN = 0x2 | 0x4
_SHARED = 0x2000
_BATCH = 1024
_MAX = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of a file on its disk, all numbers in bytes.

    Attributes:
        logical: offset in the file.
        physical: address on the filesystem's disk.
        length: of the run.
        shared: other files or snapshots refer to it too.
        located: the address is known; inline and delayed ones have none.
    """

    logical: int
    physical: int
    length: int
    shared: bool
    located: bool


def extents(descriptor: int, *, sync: bool = False) -> Iterator[Extent]:
    """The extents of a file in order; holes are left out.

    Args:
        descriptor: the file.
        sync: write back first, so that none is delayed.
    """
    start = 0
    buffer = bytearray(32 + 56 * _BATCH)
    while True:
        struct.pack_into(
            "=QQIIII", buffer, 0, start, _MAX - start, _SYNC if sync else 0, 0, _BATCH, 0
        )
        fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, buffer)
        count = struct.unpack_from("=I", buffer, 20)[0]
        if count == 0:
            return
        for index in range(count):
            logical, physical, length = struct.unpack_from("=QQQ", buffer, 32 + 56 * index)
            flags = struct.unpack_from("=I", buffer, 32 + 56 * index + 40)[0]
            start = logical + length
            yield Extent(logical, physical, length, bool(flags & _SHARED), not flags & _UNKNOWN)
            if flags & _LAST:
                return


def reflinks_work(folder: Path) -> bool:
    """Whether files in a folder can share their content; tried, not guessed."""
    with (
        tempfile.TemporaryFile(dir=folder) as source,
        tempfile.TemporaryFile(dir=folder) as target,
    ):
        source.write(bytes(4096))
        source.flush()
        try:
            clone_content(source.fileno(), target.fileno())
        except OSError:
            return False
        return True


def clone_content(source: int, target: int) -> None:
    """Let ``target`` share the whole content of ``source``; both on one filesystem.

    Raises:
        OSError: ``EOPNOTSUPP`` or ``EXDEV`` where that cannot be.
    """
    fcntl.ioctl(target, _FICLONE, source)

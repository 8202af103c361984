"""Where the content of a lazy tree comes from.

Someone else implements :class:`Source` (a backup repository, a folder); the lazy
filesystem only calls it.  Calls come from many threads at once.  A call that fails with
``OSError`` is repeated until a deadline; then the user's system call fails with EIO.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """One entry of a source folder.

    Attributes:
        name: bytes of one path component; ``b""`` for the root.
        id: how the source names the content: at most 255 bytes, stable over restarts.
        mode: type and permissions, as ``st_mode``.
        uid, gid: owner.
        size: bytes of a regular file.
        mtime_ns: time of the last change, ns since the epoch.
        rdev: device number of a device.
        target: of a symlink.
        links: names the inode has; from 2 on, entries of one ``id`` are hard links of it.
        xattrs: by full name, POSIX ACLs as ``system.posix_acl_*`` included.
    """

    name: bytes
    id: bytes
    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    rdev: int = 0
    target: bytes = b""
    links: int = 1
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)

    @property
    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)


@dataclass(frozen=True, slots=True)
class Totals:
    """How much a source holds: regular files and their bytes."""

    files: int
    bytes: int


class Source(Protocol):
    """An immutable tree to be brought here."""

    @property
    def block_size(self) -> int:
        """Unit of fetching, bytes: a power of two of at least 4096, the same at every mount."""
        ...

    def root(self) -> SourceEntry:
        """The root folder."""
        ...

    def entries(self, folder: bytes) -> Iterable[SourceEntry]:
        """The entries of the folder with that id, without ``.`` and ``..``."""
        ...

    def read(self, file: bytes, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes of a file's content, verified by the source.

        Raises:
            OSError: the store cannot be reached, or what it holds is damaged.
        """
        ...

    def totals(self) -> Totals:
        """How much there is to bring."""
        ...

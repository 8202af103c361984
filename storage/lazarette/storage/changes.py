"""The one type for what differs between two states of a tree.

Every volume driver reports differences in this form, whatever it finds them by (btrfs
extents, extent maps, dirty-range maps, comparing files).  The backup engine reads only
the ranges named here.

Semantics:

C1. Paths are bytes, relative to the volume root, without a leading slash; the root is ``b""``.
C2. A :class:`Change` with ``kind`` ``ADDED`` or ``MODIFIED`` and ``ranges is None`` means
    "the whole content may differ"; an empty tuple means "no content differs" (metadata only).
C3. Ranges are ascending, disjoint, may be wider than what really changed, never narrower.
    A stale block is never left out.
C4. A stream that cannot be complete is never begun: the driver raises
    :class:`ChangesUnknown`, and the caller compares everything.
C5. A renamed entry is reported as ``RENAMED`` with ``origin``, or as ``REMOVED`` plus
    ``ADDED``; both are correct, capabilities say which one a driver gives.
C6. With hard links, the content of a changed inode is reported under at least one of its
    names; every name whose directory entry changed is reported.  Where inodes do not keep
    their numbers from one snapshot to the next, every name of a changed inode is reported,
    and every name of inodes that exchanged names.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from lazarette.storage.errors import LazaretteError


class ChangeKind(Enum):
    """What happened to a directory entry or the inode behind it."""

    ADDED = "added"
    REMOVED = "removed"
    RENAMED = "renamed"
    MODIFIED = "modified"


class ByteRange(msgspec.Struct, frozen=True):
    """``length`` bytes from ``offset``."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """First byte after the range."""
        return self.offset + self.length


class Change(msgspec.Struct, frozen=True):
    """One entry that differs; see C1-C6 in the module's text."""

    kind: ChangeKind
    path: bytes
    origin: bytes | None = None
    ranges: tuple[ByteRange, ...] | None = None


class ChangesUnknown(LazaretteError):
    """The record of changes is lost or doubtful; compare everything instead."""

    number = 121
    http_status = 500

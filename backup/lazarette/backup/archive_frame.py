"""A directory under way in a backup."""

from __future__ import annotations

import msgspec

from lazarette.backup.native import Inode
from lazarette.backup.repository.entries import Entry


class Frame(msgspec.Struct):
    """A directory under way.

    Attributes:
        descriptor: it, open.
        path: from the root, for messages.
        entry: its own entry; gets its pages when finished.
        parent: the frame above, None for the root.
        children: entries of this directory.
        base: entries by name in the snapshot compared with.
        outstanding: files being read and directories under way.
        listed: all its names were gone through.
    """

    descriptor: int
    path: bytes
    entry: Entry
    parent: Frame | None
    base: dict[bytes, Entry]
    children: list[Entry] = []
    pending: list[Inode] = []
    outstanding: int = 0
    listed: bool = False

    def join(self, name: bytes) -> bytes:
        """Path of an entry."""
        return self.path + b"/" + name if self.path else name

"""How much room trees take on their disk."""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

from lazarette.storage import beneath, extents
from lazarette.storage.extents import Extent
from lazarette.storage.layers.contract import LayerUsage


def flagged(extent: Extent) -> int:
    """Bytes of an extent that the disk itself says are shared."""
    return extent.length if extent.shared else 0


def shared_below(disk: int) -> Callable[[Extent], int]:
    """The same for files in a filesystem that lies in a file: what that file shares.

    Args:
        disk: descriptor of the file the filesystem lies in.
    """
    pieces = [one for one in extents.extents(disk) if one.shared]
    starts = [one.logical for one in pieces]

    def shared(extent: Extent) -> int:
        end = extent.physical + extent.length
        index = max(0, bisect_right(starts, extent.physical) - 1)
        total = 0
        while index < len(pieces) and starts[index] < end:
            piece = pieces[index]
            overlap = min(piece.logical + piece.length, end) - max(piece.logical, extent.physical)
            total += max(0, overlap)
            index += 1
        return total

    return shared


def tree_space(root: int, shared: Callable[[Extent], int] | None) -> tuple[int, int]:
    """Bytes of all content below a folder, and of those that something else shares.

    Each inode counts once.

    Args:
        root: descriptor of the folder.
        shared: how much of an extent is shared; None where the disk shares none, so that
            blocks count.
    """
    total = common = 0
    seen: set[tuple[int, int]] = set()
    for entry in beneath.walk(root):
        key = (entry.status.st_dev, entry.status.st_ino)
        if entry.mount_point or not entry.path or key in seen:
            continue
        seen.add(key)
        if not (shared is not None and stat.S_ISREG(entry.status.st_mode)):
            total += entry.status.st_blocks * 512
            continue
        try:
            file = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=entry.parent)
        except FileNotFoundError:
            continue
        try:
            for extent in extents.extents(file):
                total += extent.length
                common += shared(extent)
        finally:
            os.close(file)
    return total, common


def tree_usage(folder: Path, *, shared: bool) -> LayerUsage:
    """A tree's own bytes and inodes; see :func:`tree_space`."""
    with beneath.opened(folder) as root:
        total, common = tree_space(root, flagged if shared else None)
        inodes = {entry.status.st_ino for entry in beneath.walk(root) if entry.path}
    return LayerUsage(total - common, len(inodes))

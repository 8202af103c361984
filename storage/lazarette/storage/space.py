"""How much room trees take on their disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lazarette.storage import beneath, extents
from lazarette.storage.layers.contract import LayerUsage


def tree_space(root: int, *, shared: bool) -> tuple[int, int]:
    """Bytes of all content below a folder, and of those that something else shares.

    Each inode counts once.

    Args:
        root: descriptor of the folder.
        shared: the disk shares extents, so extent maps are read; otherwise blocks count.
    """
    total = common = 0
    seen: set[tuple[int, int]] = set()
    for entry in beneath.walk(root):
        key = (entry.status.st_dev, entry.status.st_ino)
        if entry.mount_point or not entry.path or key in seen:
            continue
        seen.add(key)
        if not (shared and stat.S_ISREG(entry.status.st_mode)):
            total += entry.status.st_blocks * 512
            continue
        try:
            file = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=entry.parent)
        except FileNotFoundError:
            continue
        try:
            for extent in extents.extents(file):
                total += extent.length
                common += extent.length if extent.shared else 0
        finally:
            os.close(file)
    return total, common


def tree_usage(folder: Path, *, shared: bool) -> LayerUsage:
    """A tree's own bytes and inodes; see :func:`tree_space`."""
    with beneath.opened(folder) as root:
        total, common = tree_space(root, shared=shared)
        inodes = {entry.status.st_ino for entry in beneath.walk(root) if entry.path}
    return LayerUsage(total - common, len(inodes))

"""Whole contents of a volume: filling an empty one from an image, tar out and tar in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from lazarette.storage import beneath
from lazarette.storage.layers.apply import LayerReader
from lazarette.storage.layers.tar import TreeWriter
from lazarette.storage.refresh import copy_tree


def is_empty(root: Path) -> bool:
    """Whether a volume's root has no entry."""
    with os.scandir(root) as entries:
        return next(entries, None) is None


def is_untouched(root: Path) -> bool:
    """Whether a volume's root has no entry, and the owner and mode it was made with."""
    status = root.stat()
    made = (0, 0, 0o755)
    return is_empty(root) and (status.st_uid, status.st_gid, status.st_mode & 0o7777) == made


def populate(root: Path, source: Path | int) -> bool:
    """Copy a folder of an image into an empty volume, the root's own metadata included (A20).

    Args:
        root: the volume's root.
        source: the image's folder, as a path without links to follow or a descriptor.

    Returns:
        False when the volume has content, which is left as it is.
    """
    if not is_empty(root):
        return False
    with beneath.opened(root) as target:
        if isinstance(source, int):
            copy_tree(source, target)
        else:
            with beneath.opened(source) as folder:
                copy_tree(folder, target)
        os.fsync(target)
    return True


def clear(root: Path) -> None:
    """Delete everything in a folder but the folder; mounts inside are refused."""
    with beneath.opened(root) as folder:
        for name in beneath.names(folder):
            beneath.remove_tree(folder, name)


def write_tar(root: Path, out: BinaryIO) -> None:
    """Write a tree as a tar, its root as ``.``."""
    writer = TreeWriter(out)
    with beneath.opened(root) as folder:
        for entry in beneath.walk(folder):
            if not entry.mount_point:
                writer.entry(entry.path or b".", entry.parent, entry.name, entry.status)
    writer.close()


def read_tar(root: Path, stream: BinaryIO) -> int:
    """Unpack a tar into a tree; the unpacked bytes.

    Raises:
        InvalidArgument: it is hostile or broken.
        NoSpace: the volume is full.
    """
    with beneath.opened(root) as folder:
        return LayerReader(folder, None).apply(stream).size

"""Working in a folder without ever leaving it: single names from open directories.

Whatever somebody puts into the target while a restore runs (a symlink in place of a
directory, say), nothing outside it is touched.
"""

from __future__ import annotations

import os
import stat

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_directory(root: int, path: bytes) -> int:
    """Open a directory at a path below an open one; the caller closes it.

    Raises:
        OSError: a part is missing, a symlink, or no directory.
    """
    current = os.dup(root)
    try:
        for name in filter(None, path.split(b"/")):
            if name == b"..":
                raise NotADirectoryError(f"path {path!r} leads out of its root")
            below = os.open(name, OPEN_DIRECTORY, dir_fd=current)
            os.close(current)
            current = below
    except OSError:
        os.close(current)
        raise
    return current


def status(directory: int, name: bytes) -> os.stat_result | None:
    """``lstat`` of an entry, or None when there is none."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def remove(directory: int, name: bytes) -> None:
    """Remove an entry with all beneath it, never crossing into another filesystem.

    Raises:
        OSError: something in it cannot be removed, a mount point among others (EBUSY).
    """
    found = status(directory, name)
    if found is None:
        return
    if not stat.S_ISDIR(found.st_mode):
        os.unlink(name, dir_fd=directory)
        return
    stack = [(os.open(name, OPEN_DIRECTORY, dir_fd=directory), directory, name)]
    try:
        while stack:
            current, above, own = stack[-1]
            below = _empty(current, found.st_dev)
            if below is not None:
                opened = os.open(below, OPEN_DIRECTORY, dir_fd=current)
                stack.append((opened, current, below))
                continue
            stack.pop()
            os.close(current)
            os.rmdir(own, dir_fd=above)
    finally:
        for current, _, _ in stack:
            os.close(current)


def _empty(directory: int, device: int) -> bytes | None:
    """Unlink what is no directory; the name of a directory that is left, or None."""
    with os.scandir(directory) as listing:
        names = [os.fsencode(item.name) for item in listing]
    for name in names:
        found = status(directory, name)
        if found is None:
            continue
        if stat.S_ISDIR(found.st_mode):
            if found.st_dev != device:
                raise OSError(16, f"another filesystem is mounted at {name!r}")
            return name
        os.unlink(name, dir_fd=directory)
    return None

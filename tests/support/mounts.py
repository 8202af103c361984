"""Filesystems for tests, taken away at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazarette.storage import process


@contextmanager
def tmpfs(folder: Path, size: int = 16 << 20) -> Iterator[Path]:
    """A filesystem in memory, mounted at a folder that is made if absent."""
    folder.mkdir(exist_ok=True)
    process.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)])
    try:
        yield folder
    finally:
        process.run(["umount", "-l", str(folder)])


@contextmanager
def loop_filesystem(folder: Path, kind: str, size: int) -> Iterator[Path]:
    """A filesystem of a kind in a file, mounted at a new folder below ``folder``."""
    image = folder / f"{kind}.img"
    with open(image, "wb") as file:
        file.truncate(size)
    process.run([f"mkfs.{kind}", "-q", str(image)])
    place = folder / f"on-{kind}"
    place.mkdir()
    process.run(["mount", "-o", "loop", str(image), str(place)])
    try:
        yield place
    finally:
        process.run(["umount", str(place)])
        os.unlink(image)

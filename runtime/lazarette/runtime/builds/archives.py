"""ADD of local archives: recognised by content, never by name."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from lazarette.runtime.images.compression import Unpacked, UnpackLimits, read_up_to
from lazarette.runtime.images.errors import BadArchive

_BLOCK = 512


def is_archive(file: BinaryIO) -> bool:
    """Whether an open file is a tar, plain or in gzip, bzip2, xz or zstd; rewinds it."""
    file.seek(0)
    try:
        head = read_up_to(cast(BinaryIO, Unpacked(file)), _BLOCK)
    except (BadArchive, EOFError):
        return False
    finally:
        file.seek(0)
    return _is_header(head)


def _is_header(block: bytes) -> bool:
    if len(block) < _BLOCK or not any(block):
        return False
    try:
        tarfile.TarInfo.frombuf(block[:_BLOCK], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


@contextmanager
def unpacked(path: Path | int, limits: UnpackLimits) -> Iterator[BinaryIO]:
    """The plain tar of an archive file."""
    with open(path, "rb") as file:
        yield cast(BinaryIO, Unpacked(file, limits))

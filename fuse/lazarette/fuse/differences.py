"""What differs between two snapshots of an upper layer, by walking both.

One inode in both means that nothing changed (see :mod:`lazarette.fuse.snapshots`); otherwise
metadata and extents are compared: both are immutable, so equal addresses are equal bytes.
No record is needed, so none can be lost.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from lazarette.fuse import layers, syscalls
from lazarette.fuse.dirty import join
from lazarette.fuse.layers import entry_path, opened_beneath

_NEVER_SAME = 0x2 | 0x4 | 0x8 | 0x80 | 0x100 | 0x200 | 0x400
"""FIEMAP flags under which an address says nothing: unknown, not yet allocated, encoded,
encrypted, not aligned, inline, tail (``linux/fiemap.h``)."""

_UNWRITTEN = 0x800


@dataclass(frozen=True, slots=True)
class Difference:
    """One path that differs between two snapshots of an upper layer.

    Attributes:
        path: relative to the upper layer; whiteouts and opaque folders are entries too.
        before, after: attributes in either; None where it is missing.
        ranges: offset and length of content that may differ, in ``after``; None for all.
    """

    path: bytes
    before: os.stat_result | None
    after: os.stat_result | None
    ranges: tuple[tuple[int, int], ...] | None


def differences(base: str, target: str) -> Iterator[Difference]:
    """What differs between two snapshot folders, sorted by path; folders before entries."""
    old = os.open(os.path.join(base, "upper"), layers.DIRECTORY)
    try:
        new = os.open(os.path.join(target, "upper"), layers.DIRECTORY)
        try:
            yield from _differences(old, new, b"")
        finally:
            os.close(new)
    finally:
        os.close(old)


def _differences(old: int, new: int, path: bytes) -> Iterator[Difference]:
    names = {*_names(old), *_names(new)}
    for name in sorted(names):
        below = join(path, name)
        before, after = _stat(old, name), _stat(new, name)
        if before is not None and after is not None:
            if stat.S_ISDIR(before.st_mode) and stat.S_ISDIR(after.st_mode):
                if not _same_metadata(old, new, name, before, after):
                    yield Difference(below, before, after, ())
                with opened_beneath(old, name) as old_fd, opened_beneath(new, name) as new_fd:
                    yield from _differences(old_fd, new_fd, below)
                continue
            if before.st_ino == after.st_ino and before.st_dev == after.st_dev:
                continue
            ranges = _changed_ranges(old, new, name, before, after)
            if ranges == () and _same_metadata(old, new, name, before, after):
                continue
            yield Difference(below, before, after, ranges)
        else:
            yield Difference(below, before, after, None)
        for fd, st in ((old, before), (new, after)):
            if st is not None and stat.S_ISDIR(st.st_mode):
                with opened_beneath(fd, name) as folder:
                    yield from _all_of(folder, below, removed=fd == old)


def _all_of(folder: int, path: bytes, removed: bool) -> Iterator[Difference]:
    for name in sorted(_names(folder)):
        st = _stat(folder, name)
        if st is None:
            continue
        below = join(path, name)
        yield Difference(below, st if removed else None, None if removed else st, None)
        if stat.S_ISDIR(st.st_mode):
            with opened_beneath(folder, name) as deeper:
                yield from _all_of(deeper, below, removed)


def _names(fd: int) -> list[bytes]:
    return os.listdir(layers.descriptor_path(fd))


def _stat(fd: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _same_metadata(
    old: int, new: int, name: bytes, before: os.stat_result, after: os.stat_result
) -> bool:
    fields = ("st_mode", "st_uid", "st_gid", "st_rdev", "st_size", "st_mtime_ns")
    directory = stat.S_ISDIR(before.st_mode)
    for field in fields:
        if directory and field == "st_size":
            continue
        if getattr(before, field) != getattr(after, field):
            return False
    if stat.S_ISLNK(before.st_mode):
        return os.readlink(name, dir_fd=old) == os.readlink(name, dir_fd=new)
    return _xattrs(old, name) == _xattrs(new, name)


def _xattrs(fd: int, name: bytes) -> dict[str, bytes]:
    path = entry_path(fd, name)
    return {
        each: os.getxattr(path, each, follow_symlinks=False)
        for each in os.listxattr(path, follow_symlinks=False)
    }


def _changed_ranges(
    old: int, new: int, name: bytes, before: os.stat_result, after: os.stat_result
) -> tuple[tuple[int, int], ...] | None:
    """Ranges of a file that may differ; None when that cannot be told."""
    if not (stat.S_ISREG(before.st_mode) and stat.S_ISREG(after.st_mode)):
        return None if stat.S_IFMT(before.st_mode) != stat.S_IFMT(after.st_mode) else ()
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    old_fd = os.open(name, flags, dir_fd=old)
    try:
        new_fd = os.open(name, flags, dir_fd=new)
        try:
            return changed_ranges(old_fd, new_fd, before.st_size, after.st_size)
        finally:
            os.close(new_fd)
    finally:
        os.close(old_fd)


def changed_ranges(
    old: int, new: int, old_size: int, new_size: int
) -> tuple[tuple[int, int], ...] | None:
    """Ranges in which two immutable files that shared blocks may differ, by their extents.

    Returns:
        Ascending, disjoint (offset, length) within ``new_size``; None when unknown.
    """
    try:
        pieces_old, pieces_new = _pieces(old), _pieces(new)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
            return None
        raise
    borders = sorted({0, *_borders(pieces_old), *_borders(pieces_new), old_size, new_size})
    ranges: list[tuple[int, int]] = []
    at_old = at_new = 0
    for start, end in itertools.pairwise(borders):
        end = min(end, new_size)
        if start >= end:
            continue
        at_old = _advance(pieces_old, at_old, start)
        at_new = _advance(pieces_new, at_new, start)
        here_old = _address(pieces_old, at_old, start)
        here_new = _address(pieces_new, at_new, start)
        if start < old_size and here_old == here_new and here_old != -1:
            continue
        if ranges and sum(ranges[-1]) == start:
            ranges[-1] = (ranges[-1][0], end - ranges[-1][0])
        else:
            ranges.append((start, end - start))
    return tuple(ranges)


def _pieces(fd: int) -> list[syscalls.Extent]:
    return syscalls.extents(fd)


def _borders(pieces: list[syscalls.Extent]) -> Iterator[int]:
    for piece in pieces:
        yield piece.logical
        yield piece.logical + piece.length


def _advance(pieces: list[syscalls.Extent], index: int, offset: int) -> int:
    while index < len(pieces) and pieces[index].logical + pieces[index].length <= offset:
        index += 1
    return index


def _address(pieces: list[syscalls.Extent], index: int, offset: int) -> int | None:
    """Physical address at an offset; None for a hole, -1 when it says nothing."""
    if index == len(pieces) or pieces[index].logical > offset:
        return None
    piece = pieces[index]
    if piece.flags & _NEVER_SAME:
        return -1
    if piece.flags & _UNWRITTEN:
        return None  # reads as zero, like a hole
    return piece.physical + offset - piece.logical

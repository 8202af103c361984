"""What differs between two trees that share no history: by looking at both.

Used for snapshots that are copies or reflinks.  A file counts as unchanged only when its
bytes were compared, or when both lie in the same extents of a disk that shares them;
times prove nothing, since a store through a mapping need not move them.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator

from lazarette.fuse.differences import changed_ranges
from lazarette.storage import beneath, copying, extents, native
from lazarette.storage.changes import ByteRange, Change, ChangeKind

_BLOCK = 1 << 16

Suspects = Callable[[int, int, int, int], Iterable[tuple[int, int]]]
"""Given an older and a newer file and their sizes: the ranges of the newer one in which they
may differ, ascending and disjoint."""


def tree_changes(
    base: int, target: int, suspects: Suspects, *, reflinks: bool = False
) -> Iterator[Change]:
    """What differs between two folders, sorted by path within each folder.

    Args:
        base, target: descriptors of their roots.
        suspects: where files that are in both may differ.
        reflinks: both are immutable and on one disk that shares extents between files, so
            that a file in the same extents is the same.
    """
    if not _same_metadata(base, target, b"."):
        yield Change(ChangeKind.MODIFIED, b"", ranges=())
    groups = _Groups()
    yield from _folder(base, target, b"", suspects, groups, reflinks)
    for path in groups.regrouped():
        yield Change(ChangeKind.MODIFIED, path, ranges=())


class _Groups:
    """Names of inodes that have several, to see which were given to another one.

    Two files that look the same are told apart by nothing else.
    """

    def __init__(self) -> None:
        self._names: list[tuple[bytes, int, int]] = []

    def add(self, path: bytes, before: os.stat_result, after: os.stat_result) -> None:
        """Note a name that is in both trees."""
        if after.st_nlink > 1:
            self._names.append((path, before.st_ino, after.st_ino))

    def regrouped(self) -> Iterator[bytes]:
        """Names of inodes that exchanged some."""
        newer: dict[int, set[int]] = {}
        older: dict[int, set[int]] = {}
        for _, before, after in self._names:
            newer.setdefault(before, set()).add(after)
            older.setdefault(after, set()).add(before)
        for path, before, after in self._names:
            if len(newer[before]) > 1 or len(older[after]) > 1:
                yield path


def _folder(
    base: int, target: int, path: bytes, suspects: Suspects, groups: _Groups, reflinks: bool
) -> Iterator[Change]:
    was, now = set(beneath.names(base)), set(beneath.names(target))
    common = was & now
    looked_at = native.unlike_files(base, target, common) if reflinks else common
    for name in sorted((was ^ now).union(looked_at)):
        own = path + b"/" + name if path else name
        before = os.stat(name, dir_fd=base, follow_symlinks=False) if name in was else None
        after = os.stat(name, dir_fd=target, follow_symlinks=False) if name in now else None
        if before is not None and (
            after is None or stat.S_IFMT(before.st_mode) != stat.S_IFMT(after.st_mode)
        ):
            yield from _all(ChangeKind.REMOVED, base, name, own, before, itself=after is None)
            before = None
        if after is None:
            continue
        if before is None:
            yield from _all(ChangeKind.ADDED, target, name, own, after)
        elif stat.S_ISDIR(after.st_mode):
            yield from _both_folders(base, target, name, own, suspects, groups, reflinks)
        else:
            groups.add(own, before, after)
            yield from _entry(base, target, name, own, before, after, suspects)


def _both_folders(
    base: int,
    target: int,
    name: bytes,
    path: bytes,
    suspects: Suspects,
    groups: _Groups,
    reflinks: bool,
) -> Iterator[Change]:
    if not _same_metadata(base, target, name):
        yield Change(ChangeKind.MODIFIED, path, ranges=())
    older = beneath.open_folder(base, name)
    try:
        newer = beneath.open_folder(target, name)
        try:
            yield from _folder(older, newer, path, suspects, groups, reflinks)
        finally:
            os.close(newer)
    finally:
        os.close(older)


def _all(
    kind: ChangeKind,
    parent: int,
    name: bytes,
    path: bytes,
    status: os.stat_result,
    *,
    itself: bool = True,
) -> Iterator[Change]:
    """An entry and, of a folder, all below it."""
    if itself:
        yield Change(kind, path, ranges=None if stat.S_ISREG(status.st_mode) else ())
    if not stat.S_ISDIR(status.st_mode):
        return
    folder = beneath.open_folder(parent, name)
    try:
        for entry in beneath.walk(folder):
            if entry.path:
                whole = stat.S_ISREG(entry.status.st_mode)
                yield Change(kind, path + b"/" + entry.path, ranges=None if whole else ())
    finally:
        os.close(folder)


def _same_metadata(base: int, target: int, name: bytes) -> bool:
    return _metadata(base, name) == _metadata(target, name)


def _metadata(parent: int, name: bytes) -> tuple[object, ...]:
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    link = os.readlink(name, dir_fd=parent) if stat.S_ISLNK(status.st_mode) else b""
    links = 0 if stat.S_ISDIR(status.st_mode) else status.st_nlink
    return (
        *(status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns),
        *(status.st_rdev, links, link, copying.read_xattrs(parent, name)),
    )


def _entry(
    base: int,
    target: int,
    name: bytes,
    path: bytes,
    before: os.stat_result,
    after: os.stat_result,
    suspects: Suspects,
) -> Iterator[Change]:
    ranges: tuple[ByteRange, ...] | None = ()
    if stat.S_ISREG(after.st_mode):
        ranges = _file_ranges(base, target, name, before.st_size, after.st_size, suspects)
    if ranges != () or not _same_metadata(base, target, name):
        yield Change(ChangeKind.MODIFIED, path, ranges=ranges)


def _file_ranges(
    base: int, target: int, name: bytes, before: int, after: int, suspects: Suspects
) -> tuple[ByteRange, ...] | None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    older = os.open(name, flags, dir_fd=base)
    try:
        newer = os.open(name, flags, dir_fd=target)
        try:
            where = suspects(older, newer, before, after)
            return _differing(older, newer, before, after, where)
        finally:
            os.close(newer)
    finally:
        os.close(older)


def _differing(
    older: int, newer: int, before: int, after: int, where: Iterable[tuple[int, int]]
) -> tuple[ByteRange, ...] | None:
    """Ranges of differing blocks; None where that has no words (cut to nothing)."""
    found: list[ByteRange] = []
    for start, length in where:
        for position, block in _blocks(newer, start, start + length):
            if block == os.pread(older, len(block), position):
                continue
            if found and found[-1].end == position:
                found[-1] = ByteRange(found[-1].offset, found[-1].length + len(block))
            else:
                found.append(ByteRange(position, len(block)))
    if not found and after < before:
        start = max(0, after - 1) // _BLOCK * _BLOCK
        return (ByteRange(start, after - start),) if after else None
    return tuple(found)


def _blocks(file: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    while start < end:
        block = os.pread(file, min(_BLOCK, end - start), start)
        if not block:
            return
        yield start, block
        start += len(block)


# ---- where two files may differ


def everything(older: int, newer: int, before: int, after: int) -> list[tuple[int, int]]:
    """Anywhere: the disk says nothing."""
    return [(0, after)]


def by_extents(older: int, newer: int, before: int, after: int) -> list[tuple[int, int]]:
    """Where they lie in different places of one disk with reflinks; both are immutable."""
    ranges = changed_ranges(older, newer, before, after)
    return [(0, after)] if ranges is None else list(ranges)


def by_disk(older_disk: int, newer_disk: int) -> Suspects:
    """For files in two states of one disk: where they, or the disk below them, differ.

    Args:
        older_disk, newer_disk: both states, as files that share extents.
    """
    sizes = os.fstat(older_disk).st_size, os.fstat(newer_disk).st_size
    changed = by_extents(older_disk, newer_disk, *sizes)
    starts = [start for start, _ in changed]

    def below(physical: int, length: int) -> Iterator[tuple[int, int]]:
        index = max(0, bisect_right(starts, physical) - 1)
        while index < len(changed) and starts[index] < physical + length:
            start, size = changed[index]
            first, last = max(start, physical), min(start + size, physical + length)
            if first < last:
                yield first, last - first
            index += 1

    def suspects(older: int, newer: int, before: int, after: int) -> list[tuple[int, int]]:
        moved = by_extents(older, newer, before, after)
        for extent in extents.extents(newer):
            if not extent.located:
                return [(0, after)]
            for start, length in below(extent.physical, extent.length):
                offset = extent.logical + start - extent.physical
                moved.append((offset, min(length, after - offset)))
        return _merged(moved)

    return suspects


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending and disjoint."""
    merged: list[tuple[int, int]] = []
    for start, length in sorted(ranges):
        if length <= 0:
            continue
        if merged and start <= sum(merged[-1]):
            end = max(sum(merged[-1]), start + length)
            merged[-1] = (merged[-1][0], end - merged[-1][0])
        else:
            merged.append((start, length))
    return merged

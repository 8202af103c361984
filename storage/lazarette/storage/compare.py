"""What differs between two trees that share no history: by looking at both.

Used for snapshots that are copies or reflinks.  A file counts as unchanged only when its
bytes were compared, or when both lie in the same extents of a disk that shares them;
times prove nothing, since a store through a mapping need not move them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from lazarette.storage import beneath, copying, extents
from lazarette.storage.changes import ByteRange, Change, ChangeKind
from lazarette.storage.extents import Extent

_BLOCK = 1 << 16


def tree_changes(base: int, target: int, *, shared: bool) -> Iterator[Change]:
    """What differs between two folders, sorted by path within each folder.

    Args:
        base, target: descriptors of their roots.
        shared: both are on a disk with reflinks, so that equal extents mean equal bytes.
    """
    if not _same_metadata(base, target, b"."):
        yield Change(ChangeKind.MODIFIED, b"", ranges=())
    yield from _folder(base, target, b"", shared)


def _folder(base: int, target: int, path: bytes, shared: bool) -> Iterator[Change]:
    was, now = set(beneath.names(base)), set(beneath.names(target))
    for name in sorted(was | now):
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
            yield from _both_folders(base, target, name, own, shared)
        else:
            yield from _entry(base, target, name, own, before, after, shared)


def _both_folders(
    base: int, target: int, name: bytes, path: bytes, shared: bool
) -> Iterator[Change]:
    if not _same_metadata(base, target, name):
        yield Change(ChangeKind.MODIFIED, path, ranges=())
    older = beneath.open_folder(base, name)
    try:
        newer = beneath.open_folder(target, name)
        try:
            yield from _folder(older, newer, path, shared)
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
    shared: bool,
) -> Iterator[Change]:
    ranges: tuple[ByteRange, ...] | None = ()
    if stat.S_ISREG(after.st_mode):
        ranges = _file_ranges(base, target, name, before.st_size, after.st_size, shared)
    if ranges != () or not _same_metadata(base, target, name):
        yield Change(ChangeKind.MODIFIED, path, ranges=ranges)


def _file_ranges(
    base: int, target: int, name: bytes, before: int, after: int, shared: bool
) -> tuple[ByteRange, ...] | None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    older = os.open(name, flags, dir_fd=base)
    try:
        newer = os.open(name, flags, dir_fd=target)
        try:
            if shared and before == after and _same_extents(older, newer):
                return ()
            return _differing(older, newer, before, after)
        finally:
            os.close(newer)
    finally:
        os.close(older)


def _same_extents(older: int, newer: int) -> bool:
    was, now = list(extents.extents(older)), list(extents.extents(newer))
    return len(was) == len(now) and all(_same_place(a, b) for a, b in zip(was, now, strict=True))


def _same_place(older: Extent, newer: Extent) -> bool:
    return (
        older.located
        and newer.located
        and (
            (older.logical, older.physical, older.length)
            == (newer.logical, newer.physical, newer.length)
        )
    )


def _differing(older: int, newer: int, before: int, after: int) -> tuple[ByteRange, ...] | None:
    """Ranges of differing blocks; None where that has no words (cut to nothing)."""
    found: list[ByteRange] = []
    position = 0
    while position < after:
        block = os.pread(newer, _BLOCK, position)
        if not block:
            break
        if block != os.pread(older, len(block), position):
            if found and found[-1].end == position:
                found[-1] = ByteRange(found[-1].offset, found[-1].length + len(block))
            else:
                found.append(ByteRange(position, len(block)))
        position += len(block)
    if not found and after < before:
        start = max(0, after - 1) // _BLOCK * _BLOCK
        return (ByteRange(start, after - start),) if after else None
    return tuple(found)

"""Copies of trees: made once, or while the tree changes and finished in an instant.

:meth:`RefreshedCopy.refresh` brings a copy up to date: the first time it copies everything,
later only what may have changed since.  So a snapshot is refreshed while everything runs and
once more while the writers are held, when little is left to do: all folders are listed by one
call, and one in which nothing happened has a listing of the same bytes.

A file is taken as unchanged when its inode and change time are the same as at the last
refresh and that time lies before the refresh began.  That is safe because every clone of a
file (FICLONE) first writes back its dirty pages and makes mappings fault again: whatever is
stored afterwards, through a mapping too, moves the change time to the time of the refresh
or later.  It holds for xfs and btrfs, and only with reflinks.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field

from lazarette.storage import beneath, copying, native
from lazarette.storage.errors import Cancelled

_TICK_NS = 20_000_000  # file times are coarse: at most one timer tick old
_BATCH = 256
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

_Key = tuple[int, int]


@dataclass(slots=True)
class _Known:
    """A folder of the source at the last refresh.

    Attributes:
        listing: see :func:`native.scan`.
        doubtful: entries that changed so late that a later change need not show.
        folders: those in it.
        several: files that have more names than the one in it.
    """

    listing: bytes = b""
    doubtful: set[bytes] = field(default_factory=set)
    folders: dict[bytes, _Known] = field(default_factory=dict)
    several: dict[bytes, _Key] = field(default_factory=dict)


@dataclass(slots=True)
class _Level:
    """A folder on the way from the root to where the refresh is.

    Attributes:
        source: its descriptor.
        path: below the root.
        known: what is known of it.
        stale: the metadata of its copy are to be set when all in it is done.
        touched: folders in it whose own metadata may have changed.
        done: folders in it that were gone through.
        left: those that were not, in reverse order.
    """

    source: int
    path: bytes
    known: _Known
    stale: bool
    touched: set[bytes] = field(default_factory=set)
    done: set[bytes] = field(default_factory=set)
    left: list[bytes] = field(default_factory=list)

    def below(self, name: bytes) -> bytes:
        """The path of an entry."""
        return _join(self.path, name)


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name


def _never() -> bool:
    return False


class RefreshedCopy:
    """A copy of one tree.

    Kept is what :mod:`lazarette.storage.copying` says, and hard links inside the tree.  Mount
    points in the source are not entered.

    Args:
        source: descriptor of the tree's root.
        target: descriptor of an empty folder; on the same filesystem if the copy is refreshed.
        once: it is refreshed once only, and need not remember what it copied.
    """

    def __init__(self, source: int, target: int, *, once: bool = False) -> None:
        self._source = source
        self._target = target
        self._once = once
        self._root = _Known()
        self._began = 0
        self._touched = 0
        self._cancelled: Callable[[], bool] = _never
        self._linked: dict[_Key, bytes] = {}
        self._made: set[_Key] = set()
        self._skipped: dict[_Key, list[bytes]] = {}

    def refresh(self, *, cancelled: Callable[[], bool] = _never) -> int:
        """Bring the copy up to date; how many entries were copied.

        After an error it is good for nothing but being deleted.

        Args:
            cancelled: asked every few files.

        Raises:
            Cancelled: it said so.
            NoSpace: by way of ``OSError`` with ``ENOSPC`` or ``EDQUOT``.
        """
        os.utime(self._target)
        self._began = os.fstat(self._target).st_ctime_ns - _TICK_NS
        self._touched = 0
        self._cancelled = cancelled
        self._linked, self._made, self._skipped = {}, set(), {}
        quiet = self._quiet()
        levels = [_Level(os.dup(self._source), b"", self._root, stale=True)]
        try:
            self._look(levels[0])
            while levels:
                level = levels[-1]
                if not level.left:
                    self._leave(level)
                    os.close(levels.pop().source)
                    continue
                name = level.left.pop()
                path, known = level.below(name), level.known.folders[name]
                if path in quiet and name not in level.touched:
                    level.done.add(name)
                    self._skip_tree(path, known)
                    continue
                inner = self._open(level, name)
                if inner is None:
                    continue
                level.done.add(name)
                levels.append(_Level(inner, path, known, name in level.touched))
                self._look(levels[-1])
        finally:
            for level in levels:
                os.close(level.source)
        self._link_again()
        return self._touched

    # ---- folders

    def _quiet(self) -> set[bytes]:
        """Folders in which, and in those below which, no entry changed."""
        if not self._root.listing:
            return set()
        listings = native.scan_tree(self._source)
        every: set[bytes] = set()
        changed: set[bytes] = set()
        left = [(b"", self._root)]
        while left:
            path, known = left.pop()
            every.add(path)
            left += ((_join(path, name), inner) for name, inner in known.folders.items())
            if known.doubtful or listings.get(path) != known.listing:
                while path not in changed:
                    changed.add(path)
                    path = path.rpartition(b"/")[0]
        return every - changed

    def _skip_tree(self, path: bytes, known: _Known) -> None:
        """Note the names of hard links in a folder and below it."""
        left = [(path, known)]
        while left:
            path, known = left.pop()
            self._skip(path, known, ())
            left += ((_join(path, name), inner) for name, inner in known.folders.items())

    def _open(self, level: _Level, name: bytes) -> int | None:
        try:
            return beneath.open_folder(level.source, name)
        except OSError as refused:
            if refused.errno in _GONE:
                self._look(level)
            elif refused.errno == errno.EXDEV:
                self._show_mount_point(level, name)
            else:
                raise
        return None

    def _show_mount_point(self, level: _Level, name: bytes) -> None:
        level.done.add(name)
        level.stale = True
        level.known.folders[name] = _Known()
        into = self._open_target(level.path)
        try:
            beneath.remove_tree(into, name)
            os.mkdir(name, 0o700, dir_fd=into)
            status = os.stat(name, dir_fd=level.source, follow_symlinks=False)
            copying.copy_metadata(level.source, name, status, into, name)
        except FileNotFoundError:
            self._look(level)
        finally:
            os.close(into)

    def _open_target(self, path: bytes) -> int:
        return _open_parent(self._target, path + b"/." if path else b".")[0]

    def _look(self, level: _Level) -> None:
        """Bring up to date what is in a folder, but not what is in the folders in it."""
        self._check()
        known = level.known
        listing = native.scan(level.source)
        if listing == known.listing and not known.doubtful:
            self._skip(level.path, known, ())
        else:
            self._compare(level, listing)
        left = known.folders.keys() - level.done if known.folders else ()
        level.left = sorted(left, reverse=True)

    def _compare(self, level: _Level, listing: bytes) -> None:
        known = level.known
        now = native.split(listing)
        before = now if listing == known.listing else native.split(known.listing)
        touched = {
            name: native.record(packed)
            for name, packed in now.items()
            if before.get(name) != packed or name in known.doubtful
        }
        gone = before.keys() - now.keys()
        self._skip(level.path, known, touched.keys() | gone)
        vanished = self._bring(level, touched, before, gone) if touched or gone else []
        if vanished:
            for name in vanished:
                del now[name], touched[name]
            listing = b"".join(packed + name for name, packed in now.items())
        known.listing = listing
        known.doubtful = {name for name, entry in touched.items() if entry.ctime_ns >= self._began}
        for name in (*touched, *gone, *vanished):
            known.several.pop(name, None)
        for name, entry in touched.items():
            if entry.links > 1 and not entry.is_folder:
                known.several[name] = entry.key
        self._touched += len(touched)

    def _skip(self, folder: bytes, known: _Known, changed: Collection[bytes]) -> None:
        """Note the names of hard links that are right as they are."""
        for name, key in known.several.items():
            if name not in changed:
                path = _join(folder, name)
                self._linked.setdefault(key, path)
                self._skipped.setdefault(key, []).append(path)

    def _leave(self, level: _Level) -> None:
        """Set metadata of a folder when it is full, for filling it changes its times."""
        if level.stale:
            into = self._open_target(level.path)
            try:
                status = os.fstat(level.source)
                copying.renew_metadata(level.source, b".", status, into, b".")
            finally:
                os.close(into)
        if self._once:
            level.known.listing = b""
            level.known.folders.clear()

    # ---- what is in a folder

    def _bring(
        self,
        level: _Level,
        touched: dict[bytes, native.Record],
        before: dict[bytes, bytes],
        gone: Collection[bytes],
    ) -> list[bytes]:
        """Bring entries up to date; the names of those that vanished meanwhile."""
        fresh: list[bytes] = []
        again: list[bytes] = []
        others: list[bytes] = []
        into = self._open_target(level.path)
        try:
            for name in gone:
                level.known.folders.pop(name, None)
                beneath.remove_tree(into, name)
            for name in sorted(touched):
                entry = touched[name]
                was = native.record(before[name]) if name in before else None
                if entry.is_folder:
                    self._make_folder(level, into, name, was)
                    continue
                level.known.folders.pop(name, None)
                if not entry.is_plain:
                    others.append(name)
                elif was is None:
                    fresh.append(name)
                elif was.is_plain and was.key == entry.key:
                    again.append(name)
                else:
                    beneath.remove_tree(into, name)
                    fresh.append(name)
            level.stale = level.stale or len(again) < len(touched) or bool(gone)
            others += self._copy_plain(level, into, fresh, again=False)
            others += self._copy_plain(level, into, again, again=True)
            return [
                name
                for name in others
                if not self._copy_other(level, into, name, touched[name], before.get(name))
            ]
        finally:
            os.close(into)

    def _make_folder(
        self, level: _Level, into: int, name: bytes, was: native.Record | None
    ) -> None:
        level.touched.add(name)
        level.done.discard(name)
        known = level.known.folders.get(name)
        if was is not None and was.is_folder and known is not None and known.listing:
            return
        level.known.folders[name] = _Known()
        beneath.remove_tree(into, name)
        os.mkdir(name, 0o700, dir_fd=into)

    def _copy_plain(
        self, level: _Level, into: int, names: list[bytes], *, again: bool
    ) -> list[bytes]:
        left: list[bytes] = []
        for start in range(0, len(names), _BATCH):
            self._check()
            batch = names[start : start + _BATCH]
            left += native.copy_files(level.source, into, batch, again)
        return left

    def _copy_other(
        self,
        level: _Level,
        into: int,
        name: bytes,
        entry: native.Record,
        before: bytes | None,
    ) -> bool:
        """Copy what is no folder; False if it vanished, and then nothing of it stays."""
        self._check()
        path = level.below(name)
        first = self._linked.setdefault(entry.key, path) if entry.links > 1 else path
        try:
            status = os.stat(name, dir_fd=level.source, follow_symlinks=False)
            if stat.S_IFMT(status.st_mode) != stat.S_IFMT(entry.mode):
                raise copying.replaced(name)
            if first != path:
                self._link(first, into, name)
            elif not _same_file(entry, before) or not self._clone_again(level.source, into, name):
                beneath.remove_tree(into, name)
                copying.copy_entry(level.source, name, status, into, name)
                self._made.add(entry.key)
        except FileNotFoundError:
            beneath.remove_tree(into, name)
            if first == path:
                self._linked.pop(entry.key, None)
            return False
        return True

    def _check(self) -> None:
        if self._cancelled():
            raise Cancelled("copying a tree: cancelled")

    def _clone_again(self, parent: int, into: int, name: bytes) -> bool:
        """Give a copy the file's content of now; False if what is there is none."""
        source = copying.open_regular(parent, name)
        try:
            try:
                target = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=into)
            except OSError as refused:
                if refused.errno not in (*_GONE, errno.EISDIR):
                    raise
                return False
            try:
                # the end of a clone may lie in the middle of a block only at the end of a file
                status = os.fstat(source)
                if os.fstat(target).st_size > status.st_size:
                    os.ftruncate(target, 0)
                copying.copy_content(source, target, status.st_size)
                os.ftruncate(target, status.st_size)
            finally:
                os.close(target)
        finally:
            os.close(source)
        copying.renew_metadata(parent, name, status, into, name)
        return True

    # ---- hard links

    def _link(self, first: bytes, into: int, name: bytes) -> None:
        holder, original = _open_parent(self._target, first)
        try:
            # what is there stays if that is not
            kept = os.stat(original, dir_fd=holder, follow_symlinks=False)
            if stat.S_ISDIR(kept.st_mode):
                raise copying.replaced(first)
            beneath.remove_tree(into, name)
            os.link(original, name, src_dir_fd=holder, dst_dir_fd=into, follow_symlinks=False)
        finally:
            os.close(holder)

    def _link_again(self) -> None:
        """Give names that did not change to the copies that were made of their files anew."""
        for key in self._made & self._skipped.keys():
            first = self._linked.get(key)
            for path in self._skipped[key]:
                if first is not None and path != first:
                    # it vanished, or the first name did: the next refresh sees that
                    with suppress(FileNotFoundError):
                        self._link_skipped(key, first, path)

    def _link_skipped(self, key: _Key, first: bytes, path: bytes) -> None:
        source, name = _open_parent(self._source, path)
        try:
            status = os.stat(name, dir_fd=source, follow_symlinks=False)
            if (status.st_dev, status.st_ino) != key:
                return
            into = self._open_target(path.rpartition(b"/")[0])
            try:
                self._link(first, into, name)
                copying.renew_metadata(source, b".", os.fstat(source), into, b".")
            finally:
                os.close(into)
        finally:
            os.close(source)


def _open_parent(root: int, path: bytes) -> tuple[int, bytes]:
    """:func:`beneath.open_parent`, for which what is no folder any more has vanished."""
    try:
        return beneath.open_parent(root, path)
    except OSError as refused:
        if refused.errno in _GONE:
            raise copying.replaced(path) from refused
        raise


def _same_file(entry: native.Record, before: bytes | None) -> bool:
    """Whether an entry is the regular file it was."""
    if before is None or not stat.S_ISREG(entry.mode):
        return False
    was = native.record(before)
    return was.key == entry.key and stat.S_ISREG(was.mode)


def copy_tree(source: int, target: int, *, cancelled: Callable[[], bool] = _never) -> None:
    """Copy the content of a folder, and its own metadata, into an empty folder.

    Args:
        source: descriptor of the folder.
        target: descriptor of the empty folder.
        cancelled: asked every few files.

    Raises:
        Cancelled: it said so; what is copied stays.
        NoSpace: by way of ``OSError`` with ``ENOSPC`` or ``EDQUOT``.
    """
    RefreshedCopy(source, target, once=True).refresh(cancelled=cancelled)

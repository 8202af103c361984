"""A copy of a tree by reflinks that is made while the tree changes and finished in an instant.

:meth:`RefreshedCopy.refresh` brings the copy up to date: the first time it copies
everything, later only what may have changed since.  So a snapshot is refreshed while
everything runs and once more while the writers are held, when little is left to do.

A file is taken as unchanged when its inode and change time are the same as at the last
refresh and that time lies before the refresh began.  That is safe because every clone of a
file (FICLONE) first writes back its dirty pages and makes mappings fault again: whatever is
stored afterwards, through a mapping too, moves the change time to the time of the refresh
or later.  It holds for xfs and btrfs, and only with reflinks.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from lazarette.storage import beneath, copying

_TICK_NS = 20_000_000  # file times are coarse: at most one timer tick old


@dataclass(frozen=True, slots=True)
class _Seen:
    """An entry of the source at the last refresh."""

    inode: int
    kind: int
    ctime_ns: int
    links: int


class RefreshedCopy:
    """A copy of one tree.

    Args:
        source: descriptor of the tree's root.
        target: descriptor of an empty folder on the same filesystem.
    """

    def __init__(self, source: int, target: int) -> None:
        self._source = source
        self._target = target
        self._seen: dict[bytes, _Seen] = {}
        self._settled = 0

    def refresh(self) -> int:
        """Bring the copy up to date; how many entries were copied."""
        os.utime(self._target)
        began = os.fstat(self._target).st_ctime_ns - _TICK_NS
        before, now = self._seen, dict[bytes, _Seen]()
        linked: dict[int, bytes] = {}
        entries = beneath.walk(self._source)
        next(entries)
        touched: list[bytes] = []
        for entry in entries:
            status = entry.status
            found = _Seen(
                status.st_ino, stat.S_IFMT(status.st_mode), status.st_ctime_ns, status.st_nlink
            )
            now[entry.path] = found
            first = linked.setdefault(found.inode, entry.path)
            if before.get(entry.path) == found and found.ctime_ns < self._settled:
                continue
            touched.append(entry.path)
            try:
                self._renew(entry, before.get(entry.path), first)
            except FileNotFoundError:  # it vanished meanwhile: nothing of it may stay
                del now[entry.path]
                self._drop(entry.path)
        for path in sorted(before.keys() - now.keys(), reverse=True):
            self._drop(path)
        self._set_folders(now, touched)
        self._seen, self._settled = now, began
        return len(touched)

    def _renew(self, entry: beneath.Entry, was: _Seen | None, first: bytes) -> None:
        into, name = beneath.open_parent(self._target, entry.path)
        try:
            if entry.is_folder:
                if was is None or was.kind != stat.S_IFDIR:
                    beneath.remove_tree(into, name)
                    os.mkdir(name, 0o700, dir_fd=into)
                return
            same = was is not None and was.inode == entry.status.st_ino
            if same and stat.S_ISREG(entry.status.st_mode) and first == entry.path:
                self._clone_again(entry, into, name)
                return
            beneath.remove_tree(into, name)
            if first != entry.path:
                holder, original = beneath.open_parent(self._target, first)
                try:
                    os.link(
                        original, name, src_dir_fd=holder, dst_dir_fd=into, follow_symlinks=False
                    )
                finally:
                    os.close(holder)
                return
            copying.copy_entry(entry.parent, entry.name, entry.status, into, name)
        finally:
            os.close(into)

    def _clone_again(self, entry: beneath.Entry, into: int, name: bytes) -> None:
        source = copying.open_regular(entry.parent, entry.name)
        try:
            target = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=into)
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
        copying.renew_metadata(entry.parent, entry.name, status, into, name)

    def _drop(self, path: bytes) -> None:
        try:
            into, name = beneath.open_parent(self._target, path)
        except (FileNotFoundError, NotADirectoryError):
            return  # its folder is gone already
        try:
            beneath.remove_tree(into, name)
        finally:
            os.close(into)

    def _set_folders(self, now: dict[bytes, _Seen], touched: list[bytes]) -> None:
        """Metadata of folders last, deepest first: filling one changes its times."""
        folders = {path for path in touched if path in now and now[path].kind == stat.S_IFDIR}
        for path in touched:
            folders.add(path.rpartition(b"/")[0])
        for path in sorted(folders - {b""}, reverse=True):
            try:
                source, name = beneath.open_parent(self._source, path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                into, own = beneath.open_parent(self._target, path)
                try:
                    status = os.stat(name, dir_fd=source, follow_symlinks=False)
                    copying.renew_metadata(source, name, status, into, own)
                finally:
                    os.close(into)
            except (FileNotFoundError, NotADirectoryError):
                continue
            finally:
                os.close(source)
        copying.renew_metadata(self._source, b".", os.fstat(self._source), self._target, b".")

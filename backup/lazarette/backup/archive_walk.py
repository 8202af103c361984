"""Walking a source tree depth first, comparing with an earlier snapshot, building pages.

A :class:`Frame` is a directory under way: it is finished when its own listing is through
and nothing beneath it is outstanding.  Memory follows the depth and the largest directory,
not the number of files.
"""

from __future__ import annotations

import errno
import os

from lazarette.backup import native, scan
from lazarette.backup.archive_frame import Frame
from lazarette.backup.archive_run import Run
from lazarette.backup.native import Inode, inode_of
from lazarette.backup.repository.entries import Entry, Kind
from lazarette.backup.tree import TreeReader
from lazarette.storage.errors import SourceMissing

OPEN_DIRECTORIES = 400
"""Directories open at once beyond which reading is waited for."""


class Walk:
    """One depth-first walk.

    Args:
        run: the backup it is part of.
        base: reader of the snapshot compared with, if any.
        mounts: paths not to enter, relative to the root.
    """

    def __init__(self, run: Run, base: TreeReader | None, mounts: set[bytes]) -> None:
        self._run = run
        self._base = base
        self._mounts = mounts
        self._stack: list[Frame] = []
        self._open: dict[int, Frame] = {}
        run.settle = self.settle

    def whole(self, descriptor: int, base: Entry | None) -> Entry:
        """Save a tree from its root on; returns the root's entry.

        Raises:
            SourceMissing: the root cannot be listed.
        """
        entry = scan.entry_of(b"", inode_of(None, os.fstat(descriptor)))
        root = self.enter(descriptor, b"", entry, None, base)
        if root is None:
            raise SourceMissing("the root of the source cannot be listed")
        self.go()
        self._run.drain()
        return entry

    def enter(
        self,
        descriptor: int,
        path: bytes,
        entry: Entry,
        parent: Frame | None,
        base: Entry | None,
    ) -> Frame | None:
        """Begin a directory; the frame owns the descriptor."""
        try:
            scan.put_extras(entry, scan.xattrs(descriptor), scan.flags(descriptor))
            listed = native.scan(descriptor)
        except OSError as failed:
            os.close(descriptor)
            self._run.warn(path, f"directory cannot be read: {failed.strerror}")
            return None
        known = self._base_entries(path, base)
        frame = Frame(descriptor, path, entry, parent, known)
        frame.pending = listed[::-1]
        return self.push(frame)

    def push(self, frame: Frame) -> Frame:
        """Put a directory on the stack; waits when too many are open."""
        if frame.parent is not None:
            frame.parent.outstanding += 1
        self._stack.append(frame)
        self._open[id(frame)] = frame
        if len(self._open) > OPEN_DIRECTORIES:
            self._run.drain()
        return frame

    def _base_entries(self, path: bytes, base: Entry | None) -> dict[bytes, Entry]:
        if self._base is None or base is None or base.kind != Kind.DIRECTORY:
            return {}
        return self._run.readable_base(
            path, lambda reader: {entry.name: entry for entry in reader.pages(base)}, self._base
        )

    def go(self) -> None:
        """Walk until the stack is empty; files may still be read then."""
        while self._stack:
            frame = self._stack[-1]
            if self._names(frame):
                self._stack.pop()
                frame.listed = True
                self.settle(frame)
            self._run.breathe()

    def _names(self, frame: Frame) -> bool:
        """Go through names until a directory is to be entered; True when none is left."""
        pending, children, base = frame.pending, frame.children, frame.base
        depth = len(self._stack)
        mounts, unchanged, count = self._mounts, self._run.unchanged, self._run.count
        while pending:
            inode = pending.pop()
            name = inode[0]
            assert name is not None
            known = base.get(name)
            if known is not None and not mounts and unchanged(inode, known):
                children.append(known)
                count(known)
                continue
            self.visit(frame, name, inode)
            if len(self._stack) > depth:
                return False
        return True

    def visit(self, frame: Frame, name: bytes, inode: Inode) -> None:
        """Save one name of a directory."""
        path = frame.join(name)
        entry = scan.entry_of(name, inode)
        if path in self._mounts:
            self._run.warn_mount(path)
            if entry.kind == Kind.DIRECTORY:
                frame.children.append(entry)
                self._run.count(entry)
            return
        base = frame.base.get(name)
        if entry.kind == Kind.DIRECTORY:
            self._descend(frame, entry, path, base)
        elif base is not None and self._run.unchanged(inode, base):
            frame.children.append(base)
            self._run.count(base)
        else:
            self.save(frame, entry, path, base)

    def _descend(self, frame: Frame, entry: Entry, path: bytes, base: Entry | None) -> None:
        try:
            descriptor = os.open(entry.name, scan.OPEN_DIRECTORY, dir_fd=frame.descriptor)
        except OSError as failed:
            if failed.errno != errno.ENOENT:
                self._run.warn(path, f"directory cannot be opened: {failed.strerror}")
                frame.children.append(entry)
                self._run.count(entry)
            return
        frame.children.append(entry)
        self._run.count(entry)
        self.enter(descriptor, path, entry, frame, base)

    def save(self, frame: Frame, entry: Entry, path: bytes, base: Entry | None) -> None:
        """Save one entry that is no directory."""
        if entry.kind == Kind.FILE:
            same = base is not None and base.kind == Kind.FILE and base.inode == entry.inode
            self._run.read_file(frame, entry, path, base if same else None, None)
            return
        try:
            place = scan.beside(frame.descriptor, entry.name)
            if entry.kind == Kind.SYMLINK:
                entry.content = os.readlink(entry.name, dir_fd=frame.descriptor)
            scan.put_extras(entry, scan.xattrs(place), 0)
        except OSError as failed:
            self._run.warn(path, f"cannot be read: {failed.strerror}")
            return
        self._run.keep(frame, entry)

    def settle(self, frame: Frame) -> None:
        """Finish a directory, and those above it, when nothing is outstanding."""
        while frame.listed and frame.outstanding == 0:
            os.close(frame.descriptor)
            frame.descriptor = -1
            del self._open[id(frame)]
            self._run.store_directory(frame.entry, frame.children)
            frame.children = []
            if frame.parent is None:
                return
            frame = frame.parent
            frame.outstanding -= 1

    def close(self) -> None:
        """Let go of what a failed walk left open."""
        for frame in self._open.values():
            os.close(frame.descriptor)
        self._open = {}

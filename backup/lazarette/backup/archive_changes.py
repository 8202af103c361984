"""Backing up by a record of changes: only what it names is looked at.

The record becomes a tree of names.  A directory that is in it is taken from the earlier
snapshot entry by entry, with the named ones done anew; one that is not is taken as it was,
by the ids of its pages.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import msgspec

from lazarette.backup import native, scan
from lazarette.backup.archive_frame import Frame
from lazarette.backup.archive_run import Run
from lazarette.backup.archive_walk import Walk
from lazarette.backup.native import Inode, inode_of
from lazarette.backup.repository.entries import Entry, Extra, Kind
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.tree import PathNotFound, TreeReader
from lazarette.storage.changes import ByteRange, Change, ChangeKind, ChangesUnknown


class Node(msgspec.Struct):
    """A name in the tree of changes."""

    change: Change | None = None
    children: dict[bytes, Node] = {}


def plan(changes: Iterator[Change], root: int, base: TreeReader, inodes_kept: bool) -> Node:
    """Gather a record of changes.

    Other names of a changed inode are found in the earlier snapshot and added, because a
    record need only have one of them (rule C6) where inodes keep their numbers.

    Raises:
        ChangesUnknown: the record is not complete.
    """
    top = Node()
    linked: dict[int, tuple[ByteRange, ...] | None] = {}
    names: dict[int, list[Node]] = {}
    for change in changes:
        node = _insert(top, change)
        if inodes_kept and change.kind is not ChangeKind.REMOVED and change.path:
            status = _status(root, change.path)
            if status is not None and status.st_nlink > 1:
                known = linked.get(status.st_ino, ())
                linked[status.st_ino] = _union(known, change.ranges)
                names.setdefault(status.st_ino, []).append(node)
    if linked:
        for path, entry in base.walk():
            # Whatever number of names it had then: it may have got its second one since.
            if entry.inode in linked and entry.kind != Kind.DIRECTORY:
                node = _node(top, path)
                if node.change is None:
                    node.change = Change(ChangeKind.MODIFIED, path)
                names[entry.inode].append(node)
    for inode, nodes in names.items():
        for node in nodes:
            if node.change is not None:
                node.change = msgspec.structs.replace(node.change, ranges=linked[inode])
    return top


def _union(
    one: tuple[ByteRange, ...] | None, other: tuple[ByteRange, ...] | None
) -> tuple[ByteRange, ...] | None:
    """Ranges that cover both, ascending and disjoint; None stands for everything."""
    if one is None or other is None:
        return None
    joined: list[ByteRange] = []
    for part in sorted((*one, *other), key=lambda part: part.offset):
        if joined and part.offset <= joined[-1].end:
            end = max(joined[-1].end, part.end)
            joined[-1] = ByteRange(joined[-1].offset, end - joined[-1].offset)
        else:
            joined.append(part)
    return tuple(joined)


def _status(root: int, path: bytes) -> os.stat_result | None:
    directory = root
    opened = -1
    try:
        *above, name = path.split(b"/")
        for part in above:
            directory = os.open(part, scan.OPEN_DIRECTORY, dir_fd=directory)
            if opened >= 0:
                os.close(opened)
            opened = directory
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return None
    finally:
        if opened >= 0:
            os.close(opened)
    return None if stat.S_ISDIR(status.st_mode) else status


def _node(top: Node, path: bytes) -> Node:
    node = top
    for name in filter(None, path.split(b"/")):
        node = node.children.setdefault(name, Node())
    return node


def _insert(top: Node, change: Change) -> Node:
    if b".." in change.path.split(b"/"):
        raise ChangesUnknown(f"the record of changes has an impossible path {change.path!r}")
    if change.origin is not None:
        source = _node(top, change.origin)
        if source.change is None:
            source.change = Change(ChangeKind.REMOVED, change.origin)
    node = _node(top, change.path)
    before = node.change
    if before is None or before.kind is ChangeKind.REMOVED:
        node.change = change
        return node
    if change.kind is ChangeKind.REMOVED:
        return node
    ranges = _union(before.ranges, change.ranges)
    kind = before.kind if before.kind is not ChangeKind.MODIFIED else change.kind
    node.change = Change(kind, change.path, before.origin or change.origin, ranges)
    return node


class ChangedFrame(Frame):
    """A directory taken from the earlier snapshot with some names done anew."""

    node: Node = msgspec.field(default_factory=Node)
    known: dict[bytes, Entry] = msgspec.field(default_factory=dict)


class ChangedWalk(Walk):
    """A walk along a record of changes.

    Args:
        run: the backup.
        base: the earlier snapshot.
        mounts: paths where something else is mounted.
        inodes_kept: an inode has the same number as in the earlier snapshot; otherwise what
            the record says of a path goes for what lies there, as nothing else can (C2, C6).
    """

    def __init__(
        self, run: Run, base: TreeReader, mounts: set[bytes], inodes_kept: bool = True
    ) -> None:
        super().__init__(run, base, mounts)
        self._reader = base
        self._inodes_kept = inodes_kept
        if not inodes_kept:
            run.renumber_links()

    def apply(self, descriptor: int, base: SnapshotRecord, changed: Node) -> Entry:
        """Save a tree; returns the root's entry."""
        run = self._run
        run.files = base.stats.files
        run.entries = base.stats.entries
        run.bytes_total = base.stats.bytes_total
        entry = scan.entry_of(b"", inode_of(None, os.fstat(descriptor)))
        if changed.change is None and not changed.children:
            scan.put_extras(entry, scan.xattrs(descriptor), scan.flags(descriptor))
            entry.content = base.root.content
            os.close(descriptor)
            return entry
        self._enter_changed(descriptor, b"", entry, None, base.root, changed)
        self.go()
        run.drain()
        return entry

    def _enter_changed(
        self,
        descriptor: int,
        path: bytes,
        entry: Entry,
        parent: Frame | None,
        base: Entry,
        node: Node,
    ) -> None:
        try:
            scan.put_extras(entry, scan.xattrs(descriptor), scan.flags(descriptor))
        except OSError as failed:
            self._run.warn(path, f"directory cannot be read: {failed.strerror}")
        known = self._base_entries(path, base)
        frame = ChangedFrame(descriptor, path, entry, parent, {}, node=node, known=known)
        if base.content and not known:
            # The earlier snapshot is damaged here: read this directory anew, whole.
            self.push(Frame(descriptor, path, entry, parent, {}, pending=native.scan(descriptor)))
            return
        frame.children = [child for name, child in known.items() if name not in node.children]
        for name in sorted(node.children, reverse=True):
            if name in known:
                self._uncount(known[name], node.children[name])
            try:
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            except OSError:
                continue
            frame.pending.append(inode_of(name, status))
        self.push(frame)

    def _uncount(self, base: Entry, node: Node) -> None:
        """Take out of the totals what is going to be counted again, or is gone."""
        if base.kind != Kind.DIRECTORY or node.change is None:
            self._run.count(base, -1)
            return
        kept = node.change.kind is ChangeKind.MODIFIED
        if kept:
            self._run.count(base, -1)
            return
        for _, entry in self._reader.walk(base.name, base):
            self._run.count(entry, -1)

    def visit(self, frame: Frame, name: bytes, inode: Inode) -> None:
        """See :meth:`Walk.visit`."""
        if not isinstance(frame, ChangedFrame):
            super().visit(frame, name, inode)
            return
        node = frame.node.children[name]
        path = frame.join(name)
        entry = scan.entry_of(name, inode)
        base = self._origin(frame, node, name)
        if path in self._mounts:
            super().visit(frame, name, inode)
        elif entry.kind == Kind.DIRECTORY:
            self._directory(frame, entry, path, base, node)
        elif entry.kind == Kind.FILE:
            self._file(frame, entry, path, base, node)
        else:
            self.save(frame, entry, path, None)

    def _origin(self, frame: ChangedFrame, node: Node, name: bytes) -> Entry | None:
        change = node.change
        if change is not None and change.origin is not None:
            try:
                return self._reader.lookup(change.origin)
            except PathNotFound:
                return None
        return frame.known.get(name)

    def _file(
        self, frame: Frame, entry: Entry, path: bytes, base: Entry | None, node: Node
    ) -> None:
        ranges = None if node.change is None else node.change.ranges
        if not self._same(base, entry):
            base = None
        unstable = base is not None and base.extra is not None and base.extra.unstable
        if base is None or unstable or ranges is None:
            self._run.read_file(frame, entry, path, base, None)
        elif ranges or entry.size != base.size:
            self._run.read_file(frame, entry, path, base, ranges)
        else:
            self._metadata_only(frame, entry, path, base)

    def _same(self, base: Entry | None, entry: Entry) -> bool:
        """Whether what the record says of an entry is said of its difference to ``base``."""
        return (
            base is not None
            and base.kind == entry.kind
            and (base.inode == entry.inode or not self._inodes_kept)
        )

    def _metadata_only(self, frame: Frame, entry: Entry, path: bytes, base: Entry) -> None:
        try:
            attributes = scan.xattrs(scan.beside(frame.descriptor, entry.name))
            inode_flags = self._flags(frame.descriptor, entry.name)
        except OSError as failed:
            self._run.warn(path, f"cannot be read: {failed.strerror}")
            return
        scan.put_extras(entry, attributes, inode_flags)
        if base.extra is not None and base.extra.block:
            entry.extra = entry.extra or Extra()
            entry.extra.block = base.extra.block
            entry.extra.paged = base.extra.paged
        entry.content, entry.depth = base.content, base.depth
        self._run.keep(frame, entry)

    @staticmethod
    def _flags(directory: int, name: bytes) -> int:
        descriptor = os.open(name, native.OPEN_FILE, dir_fd=directory)
        try:
            return scan.flags(descriptor)
        finally:
            os.close(descriptor)

    def _directory(
        self, frame: Frame, entry: Entry, path: bytes, base: Entry | None, node: Node
    ) -> None:
        if base is None or not self._same(base, entry):
            self._descend(frame, entry, path, None)
            return
        try:
            descriptor = os.open(entry.name, scan.OPEN_DIRECTORY, dir_fd=frame.descriptor)
        except OSError as failed:
            self._run.warn(path, f"directory cannot be opened: {failed.strerror}")
            return
        frame.children.append(entry)
        self._run.count(entry)
        if node.change is not None and node.change.origin is not None:
            for _, moved in self._reader.walk(b"", base):
                self._run.count(moved)
            self._run.count(base, -1)
        self._enter_changed(descriptor, path, entry, frame, base, node)

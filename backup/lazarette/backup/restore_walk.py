"""Walking a snapshot depth first and making what is in it.

A directory gets its metadata when all beneath it is done, so its own permissions never
stand in the way and its times are the recorded ones.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping

import msgspec

from lazarette.backup import beneath, holes, native
from lazarette.backup.archive_content import SMALL
from lazarette.backup.repository.entries import HOLE, PART, Entry, Kind
from lazarette.backup.repository.format import RepositoryDamaged
from lazarette.backup.restore_content import (
    CREATE,
    UPDATE,
    Job,
    PartRun,
    SmallFiles,
    Target,
    Writer,
)
from lazarette.backup.restore_known import KnownTree
from lazarette.backup.restore_metadata import Metadata, loosen
from lazarette.backup.restore_selection import Selection
from lazarette.backup.tree import Part, TreeReader
from lazarette.storage.errors import NoSpace

_BATCH_FILES = 64
_BATCH_BYTES = 4 << 20
_RUN_BYTES = 8 << 20
_BREATH = 32
OPEN_DIRECTORIES = 400
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Place(msgspec.Struct):
    """A directory being restored.

    Attributes:
        descriptor: it, open.
        path: in the snapshot.
        entry: as recorded.
        parent: the one above.
        names: entries still to be made.
        listed: all names were gone through.
        outstanding: files and directories under way.
        dress: give it the recorded metadata at the end.
        fresh: it was made by this restore, so nothing is in it yet.
    """

    descriptor: int
    path: bytes
    entry: Entry
    parent: Place | None
    names: Iterator[Entry]
    listed: bool = False
    outstanding: int = 0
    dress: bool = True
    fresh: bool = False
    known: Mapping[bytes, Entry] = {}


class RestoreWalk:
    """One restore; used by one thread.

    Args:
        tree: the snapshot.
        metadata: sets owners, modes, times.
        selection: which paths.
        delta: use what is in the target already.
        delete: remove from the target what is not in the snapshot.
        keep_damaged: keep damaged files, with holes.
        threads: workers.
        warn: called with a path and a text.
        breathe: called often; may raise to stop.
        known: a snapshot that the target is exactly like.
    """

    def __init__(
        self,
        tree: TreeReader,
        writer: Callable[[Callable[[Job], None]], Writer],
        metadata: Metadata,
        selection: Selection,
        delta: bool,
        delete: bool,
        keep_damaged: bool,
        warn: Callable[[bytes, str], None],
        breathe: Callable[[], None],
        known: TreeReader | None = None,
    ) -> None:
        self._known = KnownTree(known)
        self._tree = tree
        self._metadata = metadata
        self._selection = selection
        self._delta = delta
        self._delete = delete
        self._keep_damaged = keep_damaged
        self._warn = warn
        self._breathe = breathe
        self._writer = writer(self._finished)
        self._stack: list[Place] = []
        self._open: dict[int, Place] = {}
        self._batch = SmallFiles()
        self._places: dict[int, Place] = {}
        self._links: dict[tuple[int, int], list[bytes]] = {}
        self._root = -1
        self._top = b""
        self.damaged: list[tuple[bytes, str]] = []
        self.files = 0
        self.bytes_total = 0
        self.bytes_written = 0
        self.path = b""

    def run(self, root: int, entry: Entry, path: bytes, dress: bool) -> None:
        """Restore a directory's content into an open folder."""
        self._root = root
        self._top = path
        self._enter(os.dup(root), path, entry, None, dress, known=self._known.root)
        steps = 0
        while self._stack:
            place = self._stack[-1]
            child = self._next(place)
            if child is None:
                self._stack.pop()
                place.listed = True
                self._settle(place)
                continue
            self.path = place.path + b"/" + child.name if place.path else child.name
            if self._selection.wanted(self.path):
                self._make(place, child, self.path)
            steps += 1
            if steps % _BREATH == 0:
                self._breathe()
        self._flush()
        self._writer.collect(0)

    def _next(self, place: Place) -> Entry | None:
        try:
            return next(place.names, None)
        except RepositoryDamaged as bad:
            self.damaged.append((place.path, f"directory is damaged: {bad}"))
            return None

    def _enter(
        self,
        descriptor: int,
        path: bytes,
        entry: Entry,
        parent: Place | None,
        dress: bool,
        fresh: bool = False,
        known: Entry | None = None,
    ) -> None:
        if self._delete and not fresh and self._selection.whole(path):
            self._remove_others(descriptor, path, entry)
        place = Place(
            descriptor,
            path,
            entry,
            parent,
            self._tree.pages(entry),
            dress=dress,
            fresh=fresh,
            known=self._known.entries(known),
        )
        if parent is not None:
            parent.outstanding += 1
        self._stack.append(place)
        self._open[id(place)] = place
        if len(self._open) > OPEN_DIRECTORIES:
            self._flush()
            self._writer.collect(0)

    def _remove_others(self, descriptor: int, path: bytes, entry: Entry) -> None:
        try:
            recorded = {child.name for child in self._tree.pages(entry)}
        except RepositoryDamaged:
            return
        with os.scandir(descriptor) as listing:
            present = [os.fsencode(item.name) for item in listing]
        for name in present:
            if name not in recorded:
                try:
                    beneath.remove(descriptor, name)
                except OSError as failed:
                    self._warn(path + b"/" + name, f"cannot be removed: {failed.strerror}")

    def _unchanged(self, entry: Entry, path: bytes) -> None:
        """Count what the target has already, and learn the names of its hard links."""
        try:
            for below, one in self._tree.walk(path, entry):
                if one.kind == Kind.FILE:
                    self.files += 1
                    self.bytes_total += one.size
                if one.kind != Kind.DIRECTORY and one.extra is not None and one.extra.links > 1:
                    self._links.setdefault((one.extra.filesystem, one.inode), []).append(below)
        except RepositoryDamaged as bad:
            self.damaged.append((path, f"directory is damaged: {bad}"))

    def _make(self, place: Place, entry: Entry, path: bytes) -> None:
        if place.known.get(entry.name) == entry:
            self._unchanged(entry, path)
            return
        try:
            if entry.kind == Kind.DIRECTORY:
                self._directory(place, entry, path)
            elif not self._linked(place, entry, path):
                if entry.kind == Kind.FILE:
                    self._file(place, entry, path)
                else:
                    self._special(place, entry, path)
        except OSError as failed:
            self._refused(path, failed)

    def _refused(self, path: bytes, failed: OSError) -> None:
        if failed.errno in _FULL:
            raise NoSpace(
                f"restore of {path!r} found the target full",
                hint="free space and run it again with delta: what is done is kept",
            ) from failed
        self._warn(path, f"cannot be restored: {failed.strerror}")

    def _directory(self, place: Place, entry: Entry, path: bytes) -> None:
        fresh = self._make_directory(place, entry.name)
        descriptor = os.open(entry.name, beneath.OPEN_DIRECTORY, dir_fd=place.descriptor)
        if not fresh:
            loosen(descriptor)
        known = None if fresh else place.known.get(entry.name)
        self._enter(descriptor, path, entry, place, True, fresh, known)

    @staticmethod
    def _make_directory(place: Place, name: bytes) -> bool:
        """Make a directory, in place of what is no directory; False when it is there."""
        try:
            os.mkdir(name, 0o700, dir_fd=place.descriptor)
        except FileExistsError:
            found = beneath.status(place.descriptor, name)
            if found is not None and stat.S_ISDIR(found.st_mode):
                return False
            beneath.remove(place.descriptor, name)
            os.mkdir(name, 0o700, dir_fd=place.descriptor)
        return True

    def _linked(self, place: Place, entry: Entry, path: bytes) -> bool:
        """Make another name of an inode that is restored already."""
        if entry.extra is None or entry.extra.links < 2:
            return False
        names = self._links.setdefault((entry.extra.filesystem, entry.inode), [])
        for leader in names:
            if self._link(leader, place, entry):
                names.append(path)
                self.files += entry.kind == Kind.FILE
                return True
        names.append(path)
        return False

    def _link(self, leader: bytes, place: Place, entry: Entry) -> bool:
        above, _, name = self._below(leader).rpartition(b"/")
        directory = beneath.open_directory(self._root, above)
        try:
            first = beneath.status(directory, name)
            if first is None:
                return False
            there = beneath.status(place.descriptor, entry.name)
            if there is not None:
                if os.path.samestat(first, there):
                    return True
                beneath.remove(place.descriptor, entry.name)
            os.link(
                name,
                entry.name,
                src_dir_fd=directory,
                dst_dir_fd=place.descriptor,
                follow_symlinks=False,
            )
        finally:
            os.close(directory)
        return True

    def _below(self, path: bytes) -> bytes:
        """A path in the snapshot as one in the target."""
        return path[len(self._top) + 1 :] if self._top else path

    def _file(self, place: Place, entry: Entry, path: bytes) -> None:
        self.files += 1
        self.bytes_total += entry.size
        found = None if place.fresh else beneath.status(place.descriptor, entry.name)
        linked = entry.extra is not None and entry.extra.links > 1
        parts = self._parts(entry, path)
        if parts is None:
            return
        before = place.known.get(entry.name)
        usable = (
            self._delta and found is not None and stat.S_ISREG(found.st_mode) and found.st_nlink < 2
        )
        if found is not None and not usable:
            beneath.remove(place.descriptor, entry.name)
            found = None
        target = Target(place.descriptor, entry, path, delta=found is not None)
        if found is None and entry.size <= SMALL and not linked:
            self._small(place, target, parts)
        else:
            if found is not None and before is not None:
                parts = self._known.missing(parts, before)
            differs = before is not None and before.content != entry.content
            self._large(place, target, parts, found, differs)

    def _parts(self, entry: Entry, path: bytes) -> list[Part] | None:
        if entry.depth == 0 and len(entry.content) == PART.size:
            chunk, length = PART.unpack(entry.content)
            if length == entry.size and chunk != HOLE:
                return [Part(0, length, chunk)]
        try:
            return list(self._tree.parts(entry))
        except RepositoryDamaged as bad:
            self.damaged.append((path, str(bad)))
            return None

    def _small(self, place: Place, target: Target, parts: list[Part]) -> None:
        place.outstanding += 1
        self._places[id(target)] = place
        self._batch.files.append((target, parts))
        self._batch.bytes += target.entry.size
        if len(self._batch.files) >= _BATCH_FILES or self._batch.bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._batch.files:
            batch, self._batch = self._batch, SmallFiles()
            self._writer.submit(batch)
        self._writer.collect(16)

    def _large(
        self,
        place: Place,
        target: Target,
        parts: list[Part],
        found: os.stat_result | None,
        differs: bool,
    ) -> None:
        entry = target.entry
        target.sparse = any(part.chunk is None for part in parts)
        if found is None:
            target.descriptor = os.open(entry.name, CREATE, 0o600, dir_fd=place.descriptor)
            self._metadata.prepare(target.descriptor, entry, target.path)
        else:
            target.descriptor = self._reopen(place, entry)
        place.outstanding += 1
        self._places[id(target)] = place
        try:
            if found is not None and not differs and self._same(found, entry):
                parts = []
            else:
                self._shape(target, parts, found)
        except OSError as failed:
            target.fault = failed
            parts = []
        runs = list(_runs(parts))
        target.waiting = len(runs)
        if not runs:
            self._end(target)
        for run in runs:
            self._writer.submit(PartRun(target, run))
            self._writer.collect(16)

    def _reopen(self, place: Place, entry: Entry) -> int:
        try:
            return os.open(entry.name, UPDATE, dir_fd=place.descriptor)
        except PermissionError:
            reading = os.open(entry.name, native.OPEN_FILE, dir_fd=place.descriptor)
            loosen(reading)
            os.close(reading)
            return os.open(entry.name, UPDATE, dir_fd=place.descriptor)

    @staticmethod
    def _same(found: os.stat_result, entry: Entry) -> bool:
        """Whether a file in the target was restored already: its time is set last."""
        return found.st_size == entry.size and found.st_mtime_ns == entry.mtime

    @staticmethod
    def _shape(target: Target, parts: list[Part], found: os.stat_result | None) -> None:
        descriptor = target.descriptor
        if found is None:
            if target.sparse:
                os.ftruncate(descriptor, target.entry.size)
            return
        os.ftruncate(descriptor, target.entry.size)
        for part in parts:
            if part.chunk is None:
                holes.clear(descriptor, part.offset, part.length)

    def _finished(self, job: Job) -> None:
        if isinstance(job, PartRun):
            job.target.waiting -= 1
            if job.target.waiting == 0:
                self._end(job.target)
            return
        for target, _ in job.files:
            self._done(target)

    def _end(self, target: Target) -> None:
        if target.fault is None and (not target.damage or self._keep_damaged):
            try:
                if target.damage:
                    os.ftruncate(target.descriptor, target.entry.size)
                self._metadata.set_open(target.descriptor, target.entry, target.path)
            except OSError as failed:
                target.fault = failed
        os.close(target.descriptor)
        if target.fault is None and target.damage and not self._keep_damaged:
            self._unlink(target)
        self._done(target)

    def _unlink(self, target: Target) -> None:
        """Remove a damaged file under each of its names."""
        os.unlink(target.entry.name, dir_fd=target.directory)
        extra = target.entry.extra
        if extra is None or extra.links < 2:
            return
        for path in self._links.pop((extra.filesystem, target.entry.inode), []):
            if path != target.path:
                above, _, name = self._below(path).rpartition(b"/")
                directory = beneath.open_directory(self._root, above)
                beneath.remove(directory, name)
                os.close(directory)
                self.damaged.append((path, "another name of a damaged file"))

    def _done(self, target: Target) -> None:
        place = self._places.pop(id(target))
        self.bytes_written += target.written
        if target.damage:
            self.damaged.append((target.path, "; ".join(target.damage)))
        if target.fault is not None:
            self._refused(target.path, target.fault)
        place.outstanding -= 1
        self._settle(place)

    def _special(self, place: Place, entry: Entry, path: bytes) -> None:
        directory, name = place.descriptor, entry.name
        if beneath.status(directory, name) is not None:
            beneath.remove(directory, name)
        if entry.kind == Kind.SYMLINK:
            os.symlink(entry.content, name, dir_fd=directory)
        else:
            kinds = {
                Kind.FIFO: stat.S_IFIFO,
                Kind.SOCKET: stat.S_IFSOCK,
                Kind.CHARACTER: stat.S_IFCHR,
                Kind.BLOCK: stat.S_IFBLK,
            }
            device = 0 if entry.extra is None else entry.extra.device
            os.mknod(name, kinds[Kind(entry.kind)] | 0o600, device, dir_fd=directory)
        self._metadata.set_named(directory, entry, path)

    def _settle(self, place: Place) -> None:
        while place.listed and place.outstanding == 0:
            if place.dress:
                self._metadata.set_open(place.descriptor, place.entry, place.path)
            os.close(place.descriptor)
            del self._open[id(place)]
            if place.parent is None:
                return
            place = place.parent
            place.outstanding -= 1

    def close(self) -> None:
        """End the threads and let go of what a failed restore left open."""
        self._writer.stop()
        for place in self._open.values():
            os.close(place.descriptor)
        self._open = {}


def _runs(parts: list[Part]) -> Iterator[list[Part]]:
    run: list[Part] = []
    size = 0
    for part in parts:
        if part.chunk is not None:
            run.append(part)
            size += part.length
            if size >= _RUN_BYTES:
                yield run
                run, size = [], 0
    if run:
        yield run

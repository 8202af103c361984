"""What may have changed in an upper layer since its last snapshot.

The record is a set of paths of the upper layer: whoever is in it may differ from the
snapshot in any way (presence, kind, metadata, content); whoever is not is exactly as in the
snapshot.  Writes that go through to a backing file never reach the server, so a file is in
the record from its first open for writing, and stays in it, snapshot after snapshot, until
no open and no mapping can write to it any more.

On disk there is only ``work/record``: the generation (number of snapshots taken), the
folder of the last one, and the set, written at a clean end.  While a server runs the file
says ``clean: false``; a server that finds that knows that changes were not recorded, and
the next snapshot is made from the whole tree.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

import msgspec

from lazarette.fuse import jsontext
from lazarette.fuse.nodes import Dir, File
from lazarette.fuse.tree import Tree


class Record(msgspec.Struct):
    """``work/record``.

    Attributes:
        generation: snapshots taken so far.
        clean: the set is whole: the server that wrote it ended in order.
        snapshot: folder of the last snapshot, or empty.
        paths: changed since, to whether everything below changed too.
    """

    generation: int = 0
    clean: bool = False
    snapshot: str = ""
    paths: list[tuple[bytes, bool]] = []


def path_of(folder: Dir) -> bytes:
    """Path of a folder below the root, ``b""`` for the root."""
    parts = []
    while folder.parent is not folder:
        parts.append(folder.name)
        folder = folder.parent
    return b"/".join(reversed(parts))


def join(folder: bytes, name: bytes) -> bytes:
    """Path of an entry."""
    return folder + b"/" + name if folder else name


class DirtyPaths:
    """Keeps the record; callers hold the filesystem's lock.

    Args:
        tree: of the union.
        work: descriptor of the work folder.

    Attributes:
        known: what changed since the last snapshot is known.
        noting: changes are noted: there is a snapshot, or one is being made.
    """

    def __init__(self, tree: Tree, work: int) -> None:
        self._tree = tree
        self._work = work
        self._paths: dict[bytes, bool] = {}
        self._writers: dict[File, None] = {}
        self.known = False
        self.noting = False
        self.generation = 0
        self.snapshot = ""
        self._load()

    def _load(self) -> None:
        found = self._read()
        record = found or Record()
        self.generation, self.snapshot = record.generation, record.snapshot
        self.known = record.clean and bool(record.snapshot)
        if self.known:
            self._paths = dict(record.paths)
            self.noting = True
        begun = Record(self.generation, False, self.snapshot)
        if found != begun:  # a server that was killed is followed by another on a full disk too
            self._store(begun)

    def _read(self) -> Record | None:
        """What is on disk; None when nothing whole is."""
        with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
            fd = os.open(b"record", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._work)
            with os.fdopen(fd, "rb") as stream:
                return jsontext.decode(stream.read(), type=Record)
        return None

    def _store(self, record: Record) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        fd = os.open(b"record.new", flags, 0o600, dir_fd=self._work)
        with os.fdopen(fd, "wb") as stream:
            stream.write(msgspec.json.encode(record))
            stream.flush()
            os.fsync(fd)
        os.rename(b"record.new", b"record", src_dir_fd=self._work, dst_dir_fd=self._work)
        folder = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._work)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """A clean end: everything is recorded."""
        if self.known:
            paths = self.take() | dict.fromkeys(self.writers(), False)
            record = Record(self.generation, True, self.snapshot, list(paths.items()))
            self._store(record)

    def reopen(self) -> None:
        """Take :meth:`close` back."""
        if self.known:
            record = self._read()
            self.known = record is not None
            self._paths = {} if record is None else dict(record.paths)
            self._store(Record(self.generation, False, self.snapshot))

    def begin(self) -> None:
        """A snapshot is being made: note changes from now on, even if none is there yet."""
        self.noting = True

    # -- noting -------------------------------------------------------------------------

    def entry(self, parent: Dir, name: bytes, deep: bool = False) -> None:
        """An entry came, went or changed; ``deep``: with everything below it."""
        if not self.noting:
            return
        folder = path_of(parent)
        path = join(folder, name)
        self._paths[path] = deep or self._paths.get(path, False)
        self._paths.setdefault(folder, False)

    def folder(self, node: Dir) -> None:
        """The metadata of a folder changed."""
        if not self.noting:
            return
        self._paths.setdefault(path_of(node), False)

    def file(self, node: File) -> None:
        """The metadata or content of a file changed."""
        if not self.noting:
            return
        for path in self._names(node):
            self._paths.setdefault(path, False)

    def writer(self, node: File) -> None:
        """A file was opened for writing."""
        self._writers[node] = None
        if self.noting:
            self.file(node)

    def forget(self, node: File) -> None:
        """The kernel has forgotten a file: nothing writes to it any more."""
        self._writers.pop(node, None)

    def note_writers(self) -> None:
        """Files that can be written to count as changed from now on."""
        for path in self.writers():
            self._paths.setdefault(path, False)

    @staticmethod
    def _names(node: File) -> list[bytes]:
        return [join(path_of(parent), name) for (parent, name), up in node.names.items() if up]

    # -- reading ------------------------------------------------------------------------

    def paths(self) -> dict[bytes, bool]:
        """The set as it is now."""
        return dict(self._paths)

    def take(self) -> dict[bytes, bool]:
        """The set as it is now; noting starts anew."""
        taken, self._paths = self._paths, {}
        return taken

    def give_back(self, paths: dict[bytes, bool]) -> None:
        """Undo :meth:`take` after a snapshot that failed."""
        for path, deep in paths.items():
            self._paths[path] = deep or self._paths.get(path, False)

    def writers(self) -> list[bytes]:
        """Paths of files that an open or a mapping may write to."""
        paths = []
        for node in list(self._writers):
            if not node.writers and not self._may_be_mapped(node):
                del self._writers[node]
            else:
                paths.extend(self._names(node))
        return paths

    def _may_be_mapped(self, node: File) -> bool:
        """Whether a writable mapping outlives the opens: a read lease is then refused."""
        try:
            fd = self._tree.open(node, os.O_RDONLY)
        except OSError:
            return False  # no name any more: in no snapshot
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError:
            return True
        else:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return False
        finally:
            os.close(fd)

    def taken(self, snapshot: str) -> None:
        """A snapshot is there: from now on changes count from it."""
        self.generation += 1
        self.snapshot = snapshot
        self.known = True
        self._store(Record(self.generation, False, snapshot))

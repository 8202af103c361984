"""A snapshot as the source of a lazy tree (see :mod:`lazarette.fuse.source`).

An entry is named by where it stands in the repository, which never changes: the id of its
directory's page and its number in it.  The names of one inode share an id made of the inode
instead; after a restart such an id is found again by walking the tree once.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from lazarette.backup.jobs.access import open_repository
from lazarette.backup.jobs.model import StoreAccess
from lazarette.backup.repository.entries import Entry, Kind, decode_page
from lazarette.backup.repository.format import ID_SIZE
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.stores.contract import Buffer
from lazarette.backup.stores.retry import RetryPolicy
from lazarette.backup.tree import Content
from lazarette.fuse import jsontext
from lazarette.fuse.latesource import Facts
from lazarette.fuse.source import SourceEntry, Totals
from lazarette.storage.clock import SystemClock
from lazarette.storage.errors import LazaretteError

BLOCK = 128 << 10
_ROOT = b"/"
_PLACE = struct.Struct(f"<{ID_SIZE}sI")
_INODE = struct.Struct("<cQQ")
# The lazy tree tries again by itself, until its own deadline.
_ONCE = RetryPolicy(attempts=1, silence=10.0)
_PAGES = 512
_CONTENTS = 256


class _AccessFile(msgspec.Struct):
    """A file that holds at least the access to a repository."""

    access: StoreAccess


def open_source(access: str, snapshot: str, cache: str, blocks: str = "0") -> RepositorySource:
    """What a FUSE server calls to get its source.

    Args:
        access: file with the access to the repository, readable by root alone.
        snapshot: id of the snapshot.
        cache: folder for copies of index and directories.
        blocks: bytes of file contents to keep there too, for others that read the same.

    Raises:
        OSError: EIO, when the repository cannot be opened.
    """
    try:
        told = jsontext.decode(Path(access).read_bytes(), type=_AccessFile)
        repository = open_repository(told.access, SystemClock(), Path(cache), retry=_ONCE)
        repository.ready()
        if int(blocks):
            repository.keep_blocks(int(blocks))
        return RepositorySource(repository, repository.snapshot(snapshot))
    except LazaretteError as error:
        raise OSError(errno.EIO, error.message) from error


def facts_of(snapshot: SnapshotRecord) -> Facts:
    """What a FUSE server need not ask the repository for."""
    stats = snapshot.stats
    return Facts(BLOCK, stats.files, stats.bytes_total, _described(snapshot.root, _ROOT))


class RepositorySource:
    """Serves one snapshot; may be asked by many threads.

    Args:
        repository: where it is; its index is loaded.
        snapshot: which.
    """

    def __init__(self, repository: Repository, snapshot: SnapshotRecord) -> None:
        self._reader = repository.reader
        self._snapshot = snapshot
        self._lock = threading.Lock()
        self._pages: OrderedDict[bytes, list[Entry]] = OrderedDict()
        self._contents: OrderedDict[bytes, _OpenContent] = OrderedDict()
        self._linked: dict[bytes, Entry] = {}
        self._walked = False

    @property
    def block_size(self) -> int:
        """Unit of fetching, bytes."""
        return BLOCK

    def root(self) -> SourceEntry:
        """The volume's root."""
        return _described(self._snapshot.root, _ROOT)

    def totals(self) -> Totals:
        """Files and bytes of the snapshot."""
        return Totals(self._snapshot.stats.files, self._snapshot.stats.bytes_total)

    def entries(self, folder: bytes) -> Iterator[SourceEntry]:
        """The entries of a folder by its id.

        Raises:
            OSError: EIO, when the store does not answer or what it holds is damaged.
        """
        try:
            for page in self._resolve(folder).page_ids():
                for number, entry in enumerate(self._page(page)):
                    yield _described(entry, self._identity(entry, page, number))
        except LazaretteError as error:
            raise OSError(errno.EIO, error.message) from error

    def read(self, file: bytes, offset: int, length: int) -> bytes:
        """Bytes of a file, each chunk checked against its id.

        Raises:
            OSError: EIO, when the store does not answer or what it holds is damaged.
        """
        try:
            data = self._content(file).read(offset, length)
        except LazaretteError as error:
            raise OSError(errno.EIO, error.message) from error
        if len(data) != length:
            raise OSError(errno.EIO, "the file is shorter than its entry says")
        return data

    def _content(self, file: bytes) -> _OpenContent:
        with self._lock:
            known = self._contents.get(file)
            if known is not None:
                self._contents.move_to_end(file)
                return known
        made = _OpenContent(Content(self._reader, self._resolve(file)), self._reader.get)
        with self._lock:
            self._contents[file] = made
            while len(self._contents) > _CONTENTS:
                self._contents.popitem(last=False)
        return made

    def _resolve(self, identity: bytes) -> Entry:
        if identity == _ROOT:
            return self._snapshot.root
        if len(identity) == _PLACE.size:
            page, number = _PLACE.unpack(identity)
            return self._page(bytes(page))[int(number)]
        if identity not in self._linked and not self._walked:
            self._walk(self._snapshot.root)
            self._walked = True
        try:
            return self._linked[identity]
        except KeyError:
            raise OSError(errno.EIO, "the snapshot has no such entry") from None

    def _walk(self, folder: Entry) -> None:
        """Learn the ids of all entries with several names."""
        for page in folder.page_ids():
            for number, entry in enumerate(self._page(page)):
                self._identity(entry, page, number)
                if entry.kind == Kind.DIRECTORY:
                    self._walk(entry)

    def _identity(self, entry: Entry, page: bytes, number: int) -> bytes:
        if entry.kind == Kind.DIRECTORY or entry.extra is None or entry.extra.links < 2:
            return _PLACE.pack(page, number)
        identity = _INODE.pack(b"i", entry.inode, entry.extra.filesystem)
        self._linked[identity] = entry
        return identity

    def _page(self, page: bytes) -> list[Entry]:
        with self._lock:
            known = self._pages.get(page)
            if known is not None:
                self._pages.move_to_end(page)
                return known
        found = decode_page(self._reader.get(page), page.hex())
        with self._lock:
            self._pages[page] = found
            while len(self._pages) > _PAGES:
                self._pages.popitem(last=False)
        return found


class _OpenContent:
    """A file's content for several threads: looking parts up is serial, fetching is not."""

    def __init__(self, content: Content, get: Callable[[bytes], Buffer]) -> None:
        self._content = content
        self._get = get
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self._content.size)
        pieces = []
        while offset < end:
            with self._lock:
                start, size, chunk = self._content.part_at(offset)
            stop = min(end, start + size)
            if chunk is None:
                pieces.append(bytes(stop - offset))
            else:
                pieces.append(bytes(memoryview(self._get(chunk))[offset - start : stop - start]))
            offset = stop
        return b"".join(pieces)


def _described(entry: Entry, identity: bytes) -> SourceEntry:
    extra = entry.extra
    symlink = entry.kind == Kind.SYMLINK
    return SourceEntry(
        name=entry.name,
        id=identity,
        mode=Kind(entry.kind).file_type | entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        size=entry.size if entry.kind == Kind.FILE else 0,
        mtime_ns=entry.mtime,
        rdev=extra.device if extra else 0,
        target=entry.content if symlink else b"",
        links=extra.links if extra else 1,
        xattrs=dict(extra.xattrs) if extra else {},
    )

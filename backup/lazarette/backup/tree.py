"""Reading a snapshot's tree: directories, paths, and file content at random offsets."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from lazarette.backup.repository.chunks import ChunkReader
from lazarette.backup.repository.entries import (
    HOLE,
    LIST,
    PART,
    Entry,
    Kind,
    decode_page,
)
from lazarette.backup.repository.format import RepositoryDamaged
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.storage.errors import NotFound

_LISTINGS = 64
_LISTED_ENTRIES = 20_000
MAX_DEPTH = 4


class PathNotFound(NotFound):
    """The snapshot has nothing at that path."""

    number = 223


class Part(msgspec.Struct, frozen=True):
    """A run of a file's content: a chunk, or a hole when ``chunk`` is None."""

    offset: int
    length: int
    chunk: bytes | None


class TreeReader:
    """A snapshot's tree; used by one thread at a time.

    Args:
        reader: of the repository's chunks.
        snapshot: which one.
    """

    def __init__(self, reader: ChunkReader, snapshot: SnapshotRecord) -> None:
        self._reader = reader
        self.snapshot = snapshot
        self.root = snapshot.root
        self._recent: OrderedDict[bytes, list[Entry]] = OrderedDict()
        self._held = 0

    def listing(self, directory: Entry) -> list[Entry]:
        """Entries of a directory, ascending by name.

        Raises:
            RepositoryDamaged: a page of it is missing or damaged.
        """
        found = self._recent.get(directory.content)
        if found is None:
            found = list(self.pages(directory))
            self._recent[directory.content] = found
            self._held += len(found)
            while len(self._recent) > 1 and (
                len(self._recent) > _LISTINGS or self._held > _LISTED_ENTRIES
            ):
                _, dropped = self._recent.popitem(last=False)
                self._held -= len(dropped)
        else:
            self._recent.move_to_end(directory.content)
        return found

    def pages(self, directory: Entry) -> Iterator[Entry]:
        """Entries of a directory one page at a time, for directories too large to hold."""
        if directory.kind != Kind.DIRECTORY:
            raise PathNotFound(f"{directory.name!r} is no directory in the snapshot")
        for page in directory.page_ids():
            yield from decode_page(self._reader.get(page), page.hex())

    def lookup(self, path: bytes) -> Entry:
        """The entry at a path relative to the volume's root; symlinks are not followed.

        Raises:
            PathNotFound: there is none.
        """
        entry = self.root
        for name in filter(None, path.split(b"/")):
            entry = self.child(entry, name, path)
        return entry

    def child(self, directory: Entry, name: bytes, path: bytes = b"") -> Entry:
        """An entry of a directory by name.

        Raises:
            PathNotFound: there is none.
        """
        entries = self.listing(directory)
        at = bisect_right(entries, name, key=lambda entry: entry.name) - 1
        if at < 0 or entries[at].name != name:
            raise PathNotFound(f"the snapshot has nothing at {path or name!r}")
        return entries[at]

    def walk(
        self, path: bytes = b"", directory: Entry | None = None
    ) -> Iterator[tuple[bytes, Entry]]:
        """Every path and entry beneath a directory, itself first, parents before children.

        Names come in the order of a depth-first walk.
        """
        top = self.lookup(path) if directory is None else directory
        yield path, top
        if top.kind != Kind.DIRECTORY:
            return
        stack = [(path, iter(self.pages(top)))]
        while stack:
            prefix, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                stack.pop()
                continue
            whole = prefix + b"/" + entry.name if prefix else entry.name
            yield whole, entry
            if entry.kind == Kind.DIRECTORY:
                stack.append((whole, iter(self.pages(entry))))

    def parts(self, entry: Entry) -> Iterator[Part]:
        """What a file's content is made of, in order.

        Raises:
            RepositoryDamaged: a page of parts is missing, damaged, or does not add up.
        """
        return parts_of(self._reader, entry)

    def content(self, entry: Entry) -> Content:
        """A file's content, for reading anywhere in it."""
        if entry.kind != Kind.FILE:
            raise PathNotFound(f"{entry.name!r} is no regular file in the snapshot")
        return Content(self._reader, entry)


def parts_of(reader: ChunkReader, entry: Entry) -> Iterator[Part]:
    """See :meth:`TreeReader.parts`."""
    at = 0
    for raw in raw_parts(reader, entry.content, entry.depth):
        if len(raw) % PART.size:
            raise RepositoryDamaged(f"content of {entry.name!r} has a cut list of parts")
        for chunk, length in PART.iter_unpack(raw):
            yield Part(at, length, None if chunk == HOLE else chunk)
            at += length
    if at != entry.size:
        raise RepositoryDamaged(
            f"content of {entry.name!r} is {at} bytes long, its entry says {entry.size}"
        )


def raw_parts(reader: ChunkReader, content: bytes, depth: int) -> Iterator[bytes]:
    """Pages of parts, from the top of a file's list downwards."""
    if depth == 0:
        yield content
        return
    if depth > MAX_DEPTH or len(content) % LIST.size:
        raise RepositoryDamaged("a file's list of parts is malformed")
    for chunk, _ in LIST.iter_unpack(content):
        yield from raw_parts(reader, bytes(reader.get(chunk)), depth - 1)


class Content:
    """A file's bytes at any offset; pages of parts are fetched when they are needed."""

    _PAGES = 16

    def __init__(self, reader: ChunkReader, entry: Entry) -> None:
        self._reader = reader
        self.size = entry.size
        self._depth = entry.depth
        self._top = entry.content
        self._parsed: OrderedDict[bytes, tuple[list[int], list[tuple[bytes, int]]]] = OrderedDict()

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``offset``; fewer only at the end of the file.

        Raises:
            RepositoryDamaged: they are missing or damaged.
            StoreUnavailable: the store does not answer.
        """
        end = min(offset + length, self.size)
        pieces = []
        while offset < end:
            start, size, chunk = self.part_at(offset)
            stop = min(end, start + size)
            if chunk is None:
                pieces.append(bytes(stop - offset))
            else:
                data = memoryview(self._reader.get(chunk))
                if len(data) != size:
                    raise RepositoryDamaged(f"chunk {chunk.hex()} is of another length")
                pieces.append(bytes(data[offset - start : stop - start]))
            offset = stop
        return b"".join(pieces)

    def part_at(self, offset: int) -> tuple[int, int, bytes | None]:
        """Offset, length and chunk (None: a hole) of the part that covers ``offset``."""
        content, base = self._top, 0
        for level in range(self._depth, -1, -1):
            starts, rows = self._rows(content, level)
            at = bisect_right(starts, offset - base) - 1
            if at < 0 or offset - base >= starts[at] + rows[at][1]:
                raise RepositoryDamaged("a file's list of parts is shorter than the file")
            chunk, length = rows[at]
            base += starts[at]
            if level == 0:
                return base, length, None if chunk == HOLE else chunk
            content = bytes(self._reader.get(chunk))
        raise AssertionError

    def _rows(self, content: bytes, level: int) -> tuple[list[int], list[tuple[bytes, int]]]:
        found = self._parsed.get(content)
        if found is None:
            layout = PART if level == 0 else LIST
            if len(content) % layout.size:
                raise RepositoryDamaged("a file's list of parts is malformed")
            rows: list[tuple[bytes, int]] = list(layout.iter_unpack(content))
            starts = []
            at = 0
            for _, length in rows:
                starts.append(at)
                at += length
            found = self._parsed[content] = (starts, rows)
            while len(self._parsed) > self._PAGES:
                self._parsed.popitem(last=False)
        return found

"""What a snapshot refers to: its pages, and the chunks its files are made of.

Shared parts are gone through once, however many snapshots have them: a page that was seen
is not opened again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from lazarette.backup.repository.chunks import ChunkReader
from lazarette.backup.repository.entries import HOLE, LIST, PART, Entry, Kind, decode_page
from lazarette.backup.repository.format import ID_SIZE, RepositoryDamaged

_MAX_DEPTH = 4


class References(msgspec.Struct):
    """Goes through trees.

    Args:
        reader: of the repository's chunks.
        damaged: called with a path and what cannot be read there; None raises instead.
        seen: pages and lists gone through already; grows.
        added: those this walk added to ``seen``, for taking them back.
    """

    reader: ChunkReader
    damaged: Callable[[bytes, bytes, RepositoryDamaged], None] | None = None
    seen: set[bytes] = msgspec.field(default_factory=set)
    added: list[bytes] = []

    def of(self, root: Entry) -> Iterator[tuple[bytes, bytes]]:
        """Directory path and ids (joined) of everything under a root that was not seen yet.

        Raises:
            RepositoryDamaged: a page is missing or damaged, and ``damaged`` is None.
        """
        yield b"", root.content
        stack: list[tuple[bytes, bytes]] = [(b"", page) for page in root.page_ids()]
        while stack:
            path, page = stack.pop()
            if page in self.seen:
                continue
            self._note(page)
            try:
                entries = decode_page(self.reader.get(page), page.hex())
            except RepositoryDamaged as bad:
                self._report(path, page, bad)
                continue
            ids = []
            for entry in entries:
                if entry.kind == Kind.DIRECTORY:
                    below = path + b"/" + entry.name if path else entry.name
                    ids.append(entry.content)
                    stack += [(below, one) for one in entry.page_ids()]
                elif entry.kind == Kind.FILE:
                    ids += self._file(path, entry.content, entry.depth)
            yield path, b"".join(ids)

    def entries(self, root: Entry) -> Iterator[tuple[bytes, Entry]]:
        """Directory path and entry of everything under a root that was not seen yet."""
        stack: list[tuple[bytes, bytes]] = [(b"", page) for page in root.page_ids()]
        while stack:
            path, page = stack.pop()
            if page in self.seen:
                continue
            self._note(page)
            try:
                entries = decode_page(self.reader.get(page), page.hex())
            except RepositoryDamaged as bad:
                self._report(path, page, bad)
                continue
            for entry in entries:
                yield path, entry
                if entry.kind == Kind.DIRECTORY:
                    below = path + b"/" + entry.name if path else entry.name
                    stack += [(below, one) for one in entry.page_ids()]

    def file(self, path: bytes, entry: Entry) -> bytes:
        """Ids (joined) of everything a file is made of that was not seen yet."""
        return b"".join(self._file(path, entry.content, entry.depth))

    def _file(self, path: bytes, content: bytes, depth: int) -> Iterator[bytes]:
        if depth == 0:
            yield strip_parts(content)
            return
        if depth > _MAX_DEPTH or len(content) % LIST.size:
            self._report(path, HOLE, RepositoryDamaged("a file's list of parts is malformed"))
            return
        for chunk, _ in LIST.iter_unpack(content):
            if chunk in self.seen:
                continue
            self._note(chunk)
            yield chunk
            try:
                below = bytes(self.reader.get(chunk))
            except RepositoryDamaged as bad:
                self._report(path, chunk, bad)
                continue
            yield from self._file(path, below, depth - 1)

    def _note(self, chunk: bytes) -> None:
        self.seen.add(chunk)
        self.added.append(chunk)

    def _report(self, path: bytes, chunk: bytes, bad: RepositoryDamaged) -> None:
        if self.damaged is None:
            raise bad
        self.damaged(path, chunk, bad)


def strip_parts(parts: bytes) -> bytes:
    """The chunk ids of packed parts, joined, without holes."""
    if len(parts) == PART.size:
        return b"" if parts[:ID_SIZE] == HOLE else parts[:ID_SIZE]
    return b"".join(
        parts[at : at + ID_SIZE]
        for at in range(0, len(parts), PART.size)
        if parts[at : at + ID_SIZE] != HOLE
    )

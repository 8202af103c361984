"""Blocks of which only some pages were written, by a record of changes: only those are read.

The hashes of the other pages are known on this host, and prove themselves against the id of the
block that was there (:mod:`lazarette.backup.pagemaps`).  Where they are not known the block is
read whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from lazarette.backup.archive_content import Worker, fill_buffer
from lazarette.backup.pagemaps import PageMap, delta
from lazarette.backup.repository.entries import PART
from lazarette.backup.repository.format import ID_SIZE, PAGE
from lazarette.storage.changes import ByteRange


class Touched(msgspec.Struct, frozen=True):
    """A whole block of which some pages may differ.

    Attributes:
        offset: in the file.
        length: bytes, whole pages.
        base: the chunk that was there.
        pages: numbers of the pages that may differ, ascending; at most half of them.
    """

    offset: int
    length: int
    base: bytes
    pages: tuple[int, ...]


def touched_pages(offset: int, length: int, ranges: tuple[ByteRange, ...], number: int) -> set[int]:
    """Pages of a block that ranges overlap, from the range ``number`` on."""
    found: set[int] = set()
    end = offset + length
    while number < len(ranges) and ranges[number].offset < end:
        first = max(ranges[number].offset - offset, 0) // PAGE
        last = -(-(min(ranges[number].end, end) - offset) // PAGE)
        found.update(range(first, last))
        number += 1
    return found


class _Short(Exception):
    """The file ended before the block."""


class _Stale(Exception):
    """A page is not what the record of changes says it still is."""


class Pages(msgspec.Struct):
    """A run of a large file: parts kept as they were and blocks touched, in order.

    Attributes:
        file: the open file.
        length: bytes the run covers.
        items: packed ``PART`` rows of what is kept, and what is touched.
        parts: result, packed ``PART`` rows.
        read: ``length`` when all was there; 0 when the file shrank.
    """

    file: int
    owner: object
    length: int = 0
    items: list[bytes | Touched] = []
    blocks: int = 0
    parts: bytes = b""
    read: int = 0
    error: BaseException | None = None
    fault: OSError | None = None

    def add(self, item: bytes | Touched, length: int) -> None:
        """Append to the run."""
        self.items.append(item)
        self.length += length
        self.blocks += isinstance(item, Touched)

    def run(self, worker: Worker) -> None:
        """Read and store what is touched."""
        try:
            touched = [item for item in self.items if isinstance(item, Touched)]
            known = worker.known_maps([(one.base, one.length // PAGE) for one in touched])
            self.parts = b"".join(
                self._block(worker, item, known.get(item.base))
                if isinstance(item, Touched)
                else item
                for item in self.items
            )
            self.read = self.length
        except _Short:
            self.read = 0
        except OSError as failed:
            self.fault = failed

    def _block(self, worker: Worker, block: Touched, known: PageMap | None) -> bytes:
        row = None if known is None else self._patched(worker, block, known)
        if row is not None:
            return row
        view = worker.view[: block.length]
        self._fill(worker, view, block.offset)
        bases = {block.offset: block.base}
        return worker.store_blocks(view, [block.length], block.offset, bases, True)

    def _patched(self, worker: Worker, block: Touched, known: PageMap) -> bytes | None:
        """Store the block from its new pages alone; None when it has to be read whole."""
        hashes = bytearray(known.hashes)
        for first, last in _runs(block.pages):
            view = worker.view[first * PAGE : last * PAGE]
            self._fill(worker, view, block.offset + first * PAGE)
            hashes[first * ID_SIZE : last * ID_SIZE] = worker.crypt.page_hashes(view)
        chunk = worker.crypt.paged_id(bytes(hashes))
        ingest = worker.ingest
        if not ingest.has(chunk):
            if worker.maps is None or chunk in worker.lost:
                return None
            try:
                found = delta(
                    lambda page: self._page(worker, block, page, bytes(hashes)),
                    bytes(hashes),
                    known,
                    ingest.holds_plain,
                    worker.crypt.chunk_id,
                )
            except _Stale:
                return None
            if found is None:
                return None
            if ingest.claim(chunk):
                worker.add_delta(chunk, found, True)
        return PART.pack(chunk, block.length)

    def _page(self, worker: Worker, block: Touched, page: int, hashes: bytes) -> memoryview:
        """A page to store: one that was read for its hash, or one that only a patch holds."""
        view = worker.view[page * PAGE : (page + 1) * PAGE]
        if page not in block.pages:
            self._fill(worker, view, block.offset + page * PAGE)
            if worker.crypt.page_hashes(view) != hashes[page * ID_SIZE : (page + 1) * ID_SIZE]:
                raise _Stale
        return view

    def _fill(self, worker: Worker, view: memoryview, offset: int) -> None:
        got = fill_buffer(self.file, view, 0, len(view), offset)
        worker.bytes_read += got
        if got < len(view):
            raise _Short


def _runs(numbers: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers: first, and one past the last."""
    start = end = -1
    for number in numbers:
        if number != end:
            if end > start:
                yield start, end
            start = number
        end = number + 1
    if end > start:
        yield start, end

"""Blocks of which only some pages were written, by a record of changes: only those are read.

The hashes of the other pages are known on this host, and prove themselves against the id of the
block that was there (:mod:`lazarette.backup.pagemaps`).  Where they are not known the block is
read whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from lazarette.backup.archive_content import Worker, fill_buffer
from lazarette.backup.pagemaps import PageMap, changed_pages, delta
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


class _State(msgspec.Struct, frozen=True):
    """What a block is made of now.

    Attributes:
        hashes: of all its pages.
        base: what was there.
    """

    hashes: bytes
    base: PageMap

    @classmethod
    def of(cls, block: Touched, base: PageMap, fresh: bytes) -> _State:
        """From the hashes of the pages that were touched."""
        joined = bytearray(base.hashes)
        for number, page in enumerate(block.pages):
            at = number * ID_SIZE
            joined[page * ID_SIZE : (page + 1) * ID_SIZE] = fresh[at : at + ID_SIZE]
        return cls(bytes(joined), base)


class _Patch(msgspec.Struct, frozen=True):
    """A block to be stored as a patch: its id, its state, its new pages and their bytes."""

    chunk: bytes
    state: _State
    changed: list[int]
    new: bytes


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
            rows = self._patched(worker, touched)
            self.parts = b"".join(
                item if isinstance(item, bytes) else rows.get(item) or self._whole(worker, item)
                for item in self.items
            )
            self.read = self.length
        except _Short:
            self.read = 0
        except OSError as failed:
            self.fault = failed

    def _whole(self, worker: Worker, block: Touched) -> bytes:
        """Store a block after reading all of it."""
        view = worker.view[: block.length]
        self._fill(worker, view, block.offset)
        bases = {block.offset: block.base}
        return worker.store_blocks(view, [block.length], block.offset, bases, True)

    def _patched(self, worker: Worker, touched: list[Touched]) -> dict[Touched, bytes]:
        """Store blocks from their new pages alone; those that have to be read whole are not there.

        Their pages are read at once, so that they lie one after another.
        """
        maps = worker.known_maps([(one.base, one.length // PAGE) for one in touched], True)
        known = [one for one in touched if one.base in maps]
        ranges = [
            (block.offset + first * PAGE, (last - first) * PAGE)
            for block in known
            for first, last in _runs(block.pages)
        ]
        hashes = worker.crypt.read_pages(self.file, ranges, worker.view)
        if hashes is None:
            raise _Short
        worker.bytes_read += len(hashes) // ID_SIZE * PAGE
        rows = {}
        patches = []
        first = 0
        for block in known:
            last = first + len(block.pages)
            state = _State.of(block, maps[block.base], hashes[first * ID_SIZE : last * ID_SIZE])
            chunk = worker.crypt.paged_id(state.hashes)
            if not worker.ingest.has(chunk):
                patch = self._patch(worker, block, chunk, state, first)
                if patch is None:
                    first = last
                    continue
                patches.append(patch)
            rows[block] = PART.pack(chunk, block.length)
            first = last
        self._store(worker, patches)
        return rows

    def _patch(
        self, worker: Worker, block: Touched, chunk: bytes, state: _State, first: int
    ) -> _Patch | None:
        """What to store of a block, of whose pages those touched lie from ``first`` on.

        None when it has to be read whole.
        """
        if worker.maps is None or chunk in worker.lost:
            return None
        changed = changed_pages(state.hashes, state.base, worker.ingest.holds_plain)
        if changed is None:
            return None
        numbers = dict(zip(block.pages, range(first, first + len(block.pages)), strict=True))
        try:
            new = [
                worker.view[numbers[page] * PAGE : (numbers[page] + 1) * PAGE]
                if page in numbers
                else self._page(worker, block, page, state.hashes)
                for page in changed
            ]
        except _Stale:
            return None
        return _Patch(chunk, state, changed, b"".join(new))

    @staticmethod
    def _store(worker: Worker, patches: list[_Patch]) -> None:
        holders = worker.crypt.chunk_ids([patch.new for patch in patches])
        for patch, holder in zip(patches, holders, strict=True):
            if worker.ingest.claim(patch.chunk):
                state = patch.state
                found = delta(state.hashes, state.base, patch.changed, holder, patch.new)
                worker.add_delta(patch.chunk, found, True)

    def _page(self, worker: Worker, block: Touched, page: int, hashes: bytes) -> memoryview:
        """A page that was not touched but that only a patch holds."""
        view = memoryview(bytearray(PAGE))
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

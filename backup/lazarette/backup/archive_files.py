"""Large files of a backup: which of their bytes to read, and putting their parts together.

One thread (the one that walks) owns a :class:`FileJob`; the worker threads get segments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import msgspec

from lazarette.backup import native, scan
from lazarette.backup.archive_content import (
    BLOCK,
    SEGMENT,
    Segment,
    fill_entry,
)
from lazarette.backup.archive_pages import Pages, Touched, touched_pages
from lazarette.backup.pagemaps import MOST_NEW
from lazarette.backup.repository.chunks import ChunkReader
from lazarette.backup.repository.entries import (
    HOLE,
    LIST,
    PART,
    PARTS_A_PAGE,
    Entry,
    Extra,
    holes,
    parts_pages,
)
from lazarette.backup.repository.format import PAGE, Crypt, RepositoryDamaged
from lazarette.backup.repository.ingest import Ingest, Lane
from lazarette.backup.tree import Part, parts_of
from lazarette.storage.changes import ByteRange

_PAGE = 4096
_TAR_MAGIC_AT = 257
_SPAN_PARTS = 4 * PARTS_A_PAGE
_BLOCKS_A_TASK = 64
_STRETCH = 1 << 20
_TOUCHED_A_WHOLE = 4
"""Blocks that are read as quickly as one more read is begun."""


class FileJob(msgspec.Struct):
    """A file being read in segments.

    Attributes:
        directory: open directory it is in.
        entry: its entry, completed at the end.
        path: for messages.
        base: its entry in the snapshot compared with, when that is the same inode.
        ranges: what may differ from ``base``; None for everything.
        pieces: kept runs of parts and segments being read, in the order of the file.
    """

    directory: int
    entry: Entry
    path: bytes
    base: Entry | None = None
    ranges: tuple[ByteRange, ...] | None = None
    descriptor: int = -1
    status: os.stat_result | None = None
    block: int = 0
    paged: bool = False
    pieces: list[bytes | Segment | Pages] = []
    bases: dict[int, bytes] = {}
    waiting: int = 0
    attempts: int = 0
    fault: OSError | None = None
    unstable: bool = False

    def begin(self, reader: ChunkReader, deltas: bool, paged: bool) -> list[Segment | Pages]:
        """Open the file and plan what to read.

        Args:
            reader: of the repository's chunks.
            deltas: hashes of pages are kept on this host.
            paged: the repository takes chunks named by the hashes of their pages.

        Raises:
            OSError: it cannot be opened.
        """
        if self.descriptor < 0:
            self.descriptor = native.open_file(self.directory, self.entry.name)
        self.attempts += 1
        self.status = os.fstat(self.descriptor)
        size = self.status.st_size
        kept: Iterable[Part | Touched] | None = None
        if self.base is not None:
            self.block = self.base.extra.block if self.base.extra is not None else 0
            self.paged = self.base.extra is not None and self.base.extra.paged
            if self.base.size <= SMALL_BASE:
                self.base = None
        self.bases = {}
        if self.base is None:
            self.block = BLOCK if changes_in_place(self.descriptor, size) else 0
            self.paged = paged and bool(self.block)
        else:
            if self.ranges is not None and self.attempts == 1:
                kept = self._kept(reader, deltas)
            if deltas and self.block and kept is None:
                self.bases = self._bases(reader)
        sparse = self.status.st_blocks * 512 < size
        data = scan.data_ranges(self.descriptor, size) if sparse else [(0, size)]
        if self.block:
            data = _on_grid(data, self.block, size)
        self.pieces = []
        at = 0
        for part in kept or ():
            if at < part.offset:
                self._read_between(data, at, part.offset)
            self._keep(part)
            at = part.offset + part.length
        self._read_between(data, at, size)
        segments = [piece for piece in self.pieces if not isinstance(piece, bytes)]
        self.waiting = len(segments)
        return segments

    def _bases(self, reader: ChunkReader) -> dict[int, bytes]:
        """Whole blocks of the base by offset."""
        assert self.base is not None
        try:
            return {
                part.offset: part.chunk
                for part in parts_of(reader, self.base)
                if part.chunk is not None and part.length == self.block
            }
        except RepositoryDamaged:
            return {}

    def _kept(self, reader: ChunkReader, deltas: bool) -> list[Part | Touched] | None:
        """Parts of the base that no change touches, and blocks of which some pages are.

        None when the base is unreadable.
        """
        assert self.base is not None and self.ranges is not None and self.status is not None
        size = self.status.st_size
        by_pages = deltas and self.paged
        kept: list[Part | Touched] = []
        number = 0
        ranges = self.ranges
        stretch = begun = whole = 0
        try:
            for part in parts_of(reader, self.base):
                end = part.offset + part.length
                if part.offset // _STRETCH != stretch:
                    _even_out(kept, begun, whole)
                    stretch, begun, whole = part.offset // _STRETCH, len(kept), 0
                while number < len(ranges) and ranges[number].end <= part.offset:
                    number += 1
                if number == len(ranges) or ranges[number].offset >= end:
                    if end <= size:
                        kept.append(part)
                elif part.chunk is None:
                    kept += _hole_pieces(part, ranges, number)
                elif part.length == self.block and end <= size:
                    self.bases[part.offset] = part.chunk
                    pages = touched_pages(part.offset, part.length, ranges, number)
                    # Where most pages may be new, whole blocks are read, those beside at once.
                    if by_pages and len(pages) <= part.length // PAGE * MOST_NEW:
                        touched = tuple(sorted(pages))
                        kept.append(Touched(part.offset, part.length, part.chunk, touched))
                    else:
                        whole += 1
            _even_out(kept, begun, whole)
        except RepositoryDamaged:
            return None
        last = kept[-1] if kept else None
        if last is not None and last.offset + last.length == self.base.size < size:
            # The file grew: its last chunk was cut short by the end that is no end any more.
            kept.pop()
        return [part for part in kept if part.offset + part.length <= size]

    def _keep(self, part: Part | Touched) -> None:
        last = self.pieces[-1] if self.pieces else None
        if isinstance(part, Touched):
            if not isinstance(last, Pages) or last.blocks >= _BLOCKS_A_TASK:
                last = Pages(self.descriptor, self)
                self.pieces.append(last)
            last.add(part, part.length)
            return
        row = PART.pack(part.chunk or HOLE, part.length)
        if isinstance(last, Pages) and len(last.items) < 2 * PARTS_A_PAGE:
            last.add(row, part.length)
        elif isinstance(last, bytes) and len(last) < _SPAN_PARTS * PART.size:
            self.pieces[-1] = last + row
        else:
            self.pieces.append(row)

    def _read_between(self, data: list[tuple[int, int]], start: int, end: int) -> None:
        """Plan ``start`` to ``end``: segments where there is data, holes elsewhere."""
        at = start
        for first, last in data:
            if last <= at:
                continue
            if first >= end:
                break
            if first > at:
                self.pieces += [b"".join(holes(first - at))]
                at = first
            stop = min(last, end)
            while at < stop:
                length = min(SEGMENT - at % SEGMENT, stop - at)
                self.pieces.append(
                    Segment(self.descriptor, at, length, self.block, self, self.bases, self.paged)
                )
                at += length
        if at < end:
            self.pieces.append(b"".join(holes(end - at)))

    def settled(self) -> bool:
        """Whether what was read is one state of the file; a second try is made if not.

        Called when no segment is outstanding.
        """
        assert self.status is not None
        segments = [piece for piece in self.pieces if not isinstance(piece, bytes)]
        self.fault = next((one.fault for one in segments if one.fault is not None), None)
        if self.fault is not None:
            return True
        after = os.fstat(self.descriptor)
        same = (after.st_mtime_ns, after.st_ctime_ns, after.st_size) == (
            self.status.st_mtime_ns,
            self.status.st_ctime_ns,
            self.status.st_size,
        ) and all(one.read == one.length for one in segments)
        if same or self.attempts > 1:
            self.unstable = not same
            return True
        return False

    def complete(self, crypt: Crypt, ingest: Ingest, lane: Lane) -> None:
        """Put the parts together and fill the entry."""
        pieces: list[bytes] = []
        size = 0
        for piece in self.pieces:
            if not isinstance(piece, bytes):
                pieces.append(piece.parts)
                size += piece.read
                if piece.read < piece.length:
                    break
            else:
                pieces.append(piece)
                size += sum(length for _, length in PART.iter_unpack(piece))
        assert self.status is not None
        fill_entry(self.entry, self.status, self.descriptor, size)
        if self.block or self.unstable:
            self.entry.extra = self.entry.extra or Extra()
            self.entry.extra.block = self.block
            self.entry.extra.paged = self.paged
            self.entry.extra.unstable = self.unstable
        store_parts(self.entry, pieces, crypt, ingest, lane)

    def close(self) -> None:
        """Close the file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


SMALL_BASE = 128 << 10


def _even_out(kept: list[Part | Touched], begun: int, whole: int) -> None:
    """Read a stretch's touched blocks whole where some beside them are: one read, not many.

    Args:
        kept: what is kept and touched; the stretch is its end.
        begun: where the stretch begins.
        whole: blocks of the stretch that are read whole.
    """
    kept_parts = [one for one in kept[begun:] if not isinstance(one, Touched)]
    if 0 < len(kept) - begun - len(kept_parts) <= _TOUCHED_A_WHOLE * whole:
        kept[begun:] = kept_parts


def _hole_pieces(part: Part, ranges: tuple[ByteRange, ...], number: int) -> list[Part]:
    """What is left of a hole when changed ranges are taken out, to whole filesystem pages."""
    left = []
    at = part.offset
    end = part.offset + part.length
    while number < len(ranges) and ranges[number].offset < end:
        start = max(part.offset, ranges[number].offset // BLOCK * BLOCK)
        if start > at:
            left.append(Part(at, start - at, None))
        at = max(at, min(end, -(-ranges[number].end // BLOCK) * BLOCK))
        number += 1
    if at < end:
        left.append(Part(at, end - at, None))
    return left


def _on_grid(data: list[tuple[int, int]], block: int, size: int) -> list[tuple[int, int]]:
    """Widen ranges of data to whole blocks of the grid."""
    wide: list[tuple[int, int]] = []
    for start, end in data:
        first = start // block * block
        last = min(-(-end // block) * block, size)
        if wide and first <= wide[-1][1]:
            wide[-1] = (wide[-1][0], last)
        else:
            wide.append((first, last))
    return wide


def changes_in_place(descriptor: int, size: int) -> bool:
    """Whether a file looks like one whose pages are written in place.

    Databases and disk images are whole pages long; of other files few are, tar archives
    among them, which say what they are.
    """
    if size % _PAGE:
        return False
    return os.pread(descriptor, 5, _TAR_MAGIC_AT) != b"ustar"


def store_parts(
    entry: Entry, pieces: Iterable[bytes], crypt: Crypt, ingest: Ingest, lane: Lane
) -> None:
    """Set an entry's content: its parts, or pages of them when they are many."""
    pages = list(parts_pages(pieces))
    entry.depth = 0
    if len(pages) <= 1:
        entry.content = pages[0][0] if pages else b""
        return
    layout_rows = [(page, length) for page, length in pages]
    while len(layout_rows) > 1:
        rows = []
        for page, length in layout_rows:
            chunk = crypt.chunk_id(page)
            if ingest.claim(chunk):
                lane.add(chunk, page)
            rows.append((chunk, length))
        entry.depth += 1
        layout_rows = [
            (
                b"".join(LIST.pack(*row) for row in rows[at : at + PARTS_A_PAGE]),
                sum(length for _, length in rows[at : at + PARTS_A_PAGE]),
            )
            for at in range(0, len(rows), PARTS_A_PAGE)
        ]
    entry.content = layout_rows[0][0]


Finish = Callable[[FileJob], None]

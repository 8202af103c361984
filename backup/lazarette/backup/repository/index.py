"""The index in memory: which chunk is where, in sorted arrays.

A chunk costs 28 bytes (id 16, block 4, offset 4, length 4) and a block 16 to 18, so about 30
bytes a chunk when a block holds ten, and 46 when it holds one.  Segments are sorted once and
never changed; new records gather in a small dictionary and become a segment when they are
many; segments of like size are merged.  Safe for readers in several threads while one
writes: a lookup takes the tuple of segments as it finds it.
"""

from __future__ import annotations

import itertools
import threading
from array import array
from collections.abc import Iterable, Iterator
from operator import or_
from typing import TYPE_CHECKING

import msgspec

from lazarette.backup.repository.format import ID_SIZE, PAGE
from lazarette.backup.repository.packs import LENGTH_MASK, PAGED_BIT, PATCH_BIT, PackRecord

if TYPE_CHECKING:
    import numpy as np

    from lazarette.backup.repository.segments import Segment

FRESH_LIMIT = 100_000
"""Chunks kept in the dictionary before they become a segment."""


class Location(msgspec.Struct, frozen=True):
    """Where a chunk is.

    Attributes:
        pack: id of the pack.
        offset: of the block in the pack.
        stored: stored length of the block.
        plain: plain length of the block.
        start: of the chunk in the plain block.
        length: of the chunk, or of its payload when it is a patch.
        patch: it takes pages from other chunks.
        paged: its id is made of the hashes of its pages.
    """

    pack: bytes
    offset: int
    stored: int
    plain: int
    start: int
    length: int
    patch: bool
    paged: bool = False

    @property
    def in_pages(self) -> bool:
        """Whether it is stored whole, in whole pages, and named by their hashes."""
        return self.paged and not self.patch and self.length % PAGE == 0

    def follows(self, other: Location, end: int) -> bool:
        """Whether it is in pages and begins at ``end`` of another's block."""
        return (
            self.start == end
            and self.offset == other.offset
            and self.pack == other.pack
            and self.in_pages
        )


class Index:
    """All chunks of a repository that are known here.

    Of a chunk that is stored more than once the plain form counts: patches name pages of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: tuple[Segment, ...] = ()
        self._fresh: dict[bytes, tuple[int, int, int]] = {}
        self._packs: list[PackRecord] = []
        self._numbers: dict[bytes, int] = {}
        # By the number of a block: its pack's number, its offset, stored and plain lengths.
        self._block_pack = array("I")
        self._block_offset = array("I")
        self._block_stored = array("I")
        self._block_plain = array("I")
        self._needs: dict[bytes, tuple[bytes, ...]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._segments)) + len(self._fresh)

    @property
    def resident_bytes(self) -> int:
        """Memory of the arrays, bytes (without the small dictionary)."""
        rows = sum(map(len, self._segments))
        return rows * 28 + len(self._block_pack) * 16

    def packs(self) -> list[PackRecord]:
        """Heads of the packs known, without their arrays: id, kind, size, created_ns."""
        return list(self._packs)

    def has_pack(self, pack: bytes) -> bool:
        """Whether a pack is known."""
        return pack in self._numbers

    def add(self, records: Iterable[PackRecord]) -> None:
        """Take in records of packs; one that is known already is passed over."""
        with self._lock:
            new: dict[bytes, PackRecord] = {}
            for record in records:
                if record.pack not in self._numbers and record.blocks:
                    new.setdefault(record.pack, record)
            if not new:
                return
            chunks = sum(record.chunk_count for record in new.values())
            if chunks + len(self._fresh) <= FRESH_LIMIT:
                for record in new.values():
                    self._remember(record, self._enter(record))
                return
            # On use: see that module's text.
            from lazarette.backup.repository import segments

            made = [segments.of_record(record, self._enter(record)) for record in new.values()]
            if self._fresh:
                made.append(segments.of_rows(self._fresh))
            self._segments = segments.compact([*self._segments, segments.join(made)])
            self._fresh = {}

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._segments, self._fresh = (), {}
            self._packs, self._numbers, self._needs = [], {}, {}
            for column in self._columns():
                del column[:]

    def _columns(self) -> tuple[array[int], ...]:
        return self._block_pack, self._block_offset, self._block_stored, self._block_plain

    def _enter(self, record: PackRecord) -> int:
        """Take in a pack and its blocks; returns the number of the first."""
        number = len(self._packs)
        self._numbers[record.pack] = number
        self._packs.append(
            PackRecord(
                record.pack, record.kind, record.key, record.size, b"", b"", b"", record.created_ns
            )
        )
        first = len(self._block_pack)
        for offset, stored, plain, _ in record.block_rows():
            self._block_offset.append(offset)
            self._block_stored.append(stored)
            self._block_plain.append(plain)
            self._block_pack.append(number)
        if record.patches:
            self._note_needs(record)
        return first

    def _note_needs(self, record: PackRecord) -> None:
        gathered: dict[bytes, list[bytes]] = {}
        for number, source in record.patch_rows():
            gathered.setdefault(record.chunk_id(number), []).append(source)
        for chunk, needs in gathered.items():
            # Two hosts may have made different patches of one chunk: what either needs stays.
            self._needs[chunk] = tuple(dict.fromkeys((*self._needs.get(chunk, ()), *needs)))

    def _remember(self, record: PackRecord, first: int) -> None:
        fresh = self._fresh
        rows = record.chunk_rows()
        for block, (_, _, _, count) in enumerate(record.block_rows(), first):
            start = 0
            for chunk, length in itertools.islice(rows, count):
                known = fresh.get(chunk)
                if known is None or known[2] & PATCH_BIT:
                    fresh[chunk] = block, start, length
                start += length & LENGTH_MASK

    def __contains__(self, chunk: bytes) -> bool:
        return self._find(chunk) is not None

    def _find(self, chunk: bytes) -> tuple[int, int, int] | None:
        patch = self._fresh.get(chunk)
        if patch is not None and not patch[2] & PATCH_BIT:
            return patch
        high = int.from_bytes(chunk[:8], "big")
        low = int.from_bytes(chunk[8:], "big")
        for segment in self._segments:
            at = segment.find(high, low)
            if at >= 0:
                length = int(segment.length[at])
                row = int(segment.block[at]), int(segment.start[at]), length
                if not length & PATCH_BIT:
                    return row
                patch = patch or row
        return patch or self._fresh.get(chunk)

    def find(self, chunk: bytes) -> Location | None:
        """Where a chunk is, or None."""
        row = self._find(chunk)
        if row is None:
            return None
        block, start, length = row
        return Location(
            self._packs[self._block_pack[block]].pack,
            self._block_offset[block],
            self._block_stored[block],
            self._block_plain[block],
            start,
            length & LENGTH_MASK,
            bool(length & PATCH_BIT),
            bool(length & PAGED_BIT),
        )

    def known(self, ids: bytes) -> list[bool]:
        """For each of several ids (16 bytes each, joined) whether it is known."""
        count = len(ids) // ID_SIZE
        fresh = self._fresh
        found = [ids[at : at + ID_SIZE] in fresh for at in range(0, count * ID_SIZE, ID_SIZE)]
        if not self._segments or count == 0:
            return found
        from lazarette.backup.repository import segments

        return list(map(or_, found, segments.present(self._segments, ids)))

    def consolidate(self) -> None:
        """Make one sorted segment of everything, so that rows have numbers."""
        from lazarette.backup.repository import segments

        with self._lock:
            self._segments = (segments.join([*self._segments, segments.of_rows(self._fresh)]),)
            self._fresh = {}

    def rows(self, ids: bytes) -> np.ndarray:
        """Row numbers of several ids (16 bytes each, joined), -1 where unknown.

        Needs :meth:`consolidate` before, and nothing added since.
        """
        (segment,) = self._segments
        return segment.rows(ids)

    def row_lengths(self) -> np.ndarray:
        """Stored payload length (before compression) of each row."""
        lengths: np.ndarray = self._segments[0].length & LENGTH_MASK
        return lengths

    def row_packs(self) -> np.ndarray:
        """Number of the pack (in :meth:`packs`) each row is in."""
        return self._of_rows(self._block_pack)

    def row_costs(self) -> np.ndarray:
        """Stored bytes each row accounts for: its share of its block."""
        plain = self._of_rows(self._block_plain)
        plain[plain == 0] = 1
        share: np.ndarray = self.row_lengths() * (self._of_rows(self._block_stored) / plain)
        return share

    def _of_rows(self, column: array[int]) -> np.ndarray:
        """A column of the blocks for the block of each row."""
        import numpy as np

        # A copy: nothing can be added to an array while something looks into it.
        blocks = np.frombuffer(column.tobytes(), np.uint32)
        values: np.ndarray = blocks[self._segments[0].block]
        return values

    def row_ids(self, rows: np.ndarray) -> bytes:
        """Ids of rows, joined."""
        return self._segments[0].ids(rows)

    def needs(self, chunk: bytes) -> tuple[bytes, ...]:
        """Ids of the chunks a patch takes pages from; empty for a plain chunk."""
        return self._needs.get(chunk, ())

    def all_needs(self) -> dict[bytes, tuple[bytes, ...]]:
        """The needs of every patch."""
        return dict(self._needs)

    def pack_of(self, chunk: bytes) -> bytes | None:
        """Id of the pack a chunk is in."""
        row = self._find(chunk)
        return None if row is None else self._packs[self._block_pack[row[0]]].pack

    def head(self, pack: bytes) -> PackRecord:
        """What is known of a pack, without its arrays."""
        return self._packs[self._numbers[pack]]

    def ids(self) -> Iterator[bytes]:
        """Every chunk id known, in no order; the same id may come twice."""
        for segment in self._segments:
            joined = segment.ids()
            for at in range(0, len(joined), ID_SIZE):
                yield joined[at : at + ID_SIZE]
        yield from list(self._fresh)

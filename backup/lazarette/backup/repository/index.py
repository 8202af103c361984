"""The index in memory: which chunk is where, in sorted arrays.

A chunk costs 28 bytes (id 16, block 4, offset 4, length 4) and a block 16 to 18, so about 30
bytes a chunk when a block holds ten, and 46 when it holds one.  Segments are sorted once and
never changed; new records gather in a small dictionary and become a segment when they are
many; segments of like size are merged.  Safe for readers in several threads while one
writes: a lookup takes the tuple of segments as it finds it.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lazarette.backup.repository.format import ID_SIZE
from lazarette.backup.repository.packs import LENGTH_MASK, PAGED_BIT, PATCH_BIT, PackRecord

FRESH_LIMIT = 100_000
"""Chunks kept in the dictionary before they become a segment."""


@dataclass(frozen=True, slots=True)
class Location:
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


@dataclass(frozen=True)
class _Segment:
    high: np.ndarray
    low: np.ndarray
    block: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.high)

    def find(self, high: int, low: int) -> int:
        """Row of an id, or -1; a bisection over a plain view beats a call into numpy."""
        view, lows = self._views
        row = bisect_left(view, high)
        while row < len(view) and view[row] == high:
            if lows[row] == low:
                return row
            row += 1
        return -1

    @cached_property
    def _views(self) -> tuple[memoryview, memoryview]:
        return self.high.data, self.low.data


def _split(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = ids.view(">u8").reshape(-1, 2)
    return pairs[:, 0].astype(np.uint64), pairs[:, 1].astype(np.uint64)


def _join(segments: Sequence[_Segment]) -> _Segment:
    columns = [
        np.concatenate([getattr(segment, name) for segment in segments])
        for name in ("high", "low", "block", "start", "length")
    ]
    # By the first half alone: two ids that share it are next to never met, and looked for.
    patch = (columns[4] & np.uint32(PATCH_BIT)) != 0
    if patch.any():
        plain_first = np.argsort(patch, kind="stable")
        order = plain_first[np.argsort(columns[0][plain_first], kind="stable")]
    else:
        order = np.argsort(columns[0])
    return _Segment(*(column[order] for column in columns))


class Index:
    """All chunks of a repository that are known here.

    Of a chunk that is stored more than once the plain form counts: patches name pages of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: tuple[_Segment, ...] = ()
        self._fresh: dict[bytes, tuple[int, int, int]] = {}
        self._packs: list[PackRecord] = []
        self._numbers: dict[bytes, int] = {}
        self._block_pack = np.zeros(1024, np.uint32)
        self._block_rows = np.zeros((1024, 3), np.uint32)
        self._blocks = 0
        self._needs: dict[bytes, tuple[bytes, ...]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._segments)) + len(self._fresh)

    @property
    def resident_bytes(self) -> int:
        """Memory of the arrays, bytes (without the small dictionary)."""
        rows = sum(map(len, self._segments))
        return rows * 28 + self._block_pack.nbytes + self._block_rows.nbytes

    def packs(self) -> list[PackRecord]:
        """Heads of the packs known, without their arrays: id, kind, size, created_ns."""
        return list(self._packs)

    def has_pack(self, pack: bytes) -> bool:
        """Whether a pack is known."""
        return pack in self._numbers

    def add(self, records: Iterable[PackRecord]) -> None:
        """Take in records of packs; one that is known already is passed over."""
        with self._lock:
            segments = []
            for record in records:
                if record.pack in self._numbers or not record.blocks:
                    continue
                segment = self._rows_of(record)
                segments.append(segment)
            if not segments:
                return
            if sum(map(len, segments)) + len(self._fresh) <= FRESH_LIMIT:
                for segment in segments:
                    self._remember(segment)
                return
            if self._fresh:
                segments.append(self._fresh_segment())
            self._segments = self._compact([*self._segments, _join(segments)])
            self._fresh = {}

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._segments, self._fresh = (), {}
            self._packs, self._numbers, self._needs = [], {}, {}
            self._blocks = 0

    def _rows_of(self, record: PackRecord) -> _Segment:
        blocks = record.block_array()
        chunks = record.chunk_array()
        number = len(self._packs)
        self._numbers[record.pack] = number
        self._packs.append(
            PackRecord(
                record.pack, record.kind, record.key, record.size, b"", b"", b"", record.created_ns
            )
        )
        first = self._blocks
        count = len(blocks)
        if first + count > len(self._block_pack):
            more = first + count - len(self._block_pack) + self._blocks // 8
            self._block_pack = np.concatenate((self._block_pack, np.zeros(more, np.uint32)))
            self._block_rows = np.concatenate((self._block_rows, np.zeros((more, 3), np.uint32)))
        self._block_pack[first : first + count] = number
        for column, name in enumerate(("offset", "stored", "plain")):
            self._block_rows[first : first + count, column] = blocks[name]
        self._blocks = first + count
        payload = (chunks["length"] & np.uint32(LENGTH_MASK)).astype(np.int64)
        ends = np.cumsum(payload)
        block_of = np.repeat(np.arange(count), blocks["chunks"])
        before = np.concatenate(([0], np.cumsum(blocks["chunks"], dtype=np.int64)[:-1]))
        base = np.concatenate(([0], ends))[before]
        start = ends - payload - base[block_of]
        high, low = _split(np.ascontiguousarray(chunks["id"]))
        self._note_needs(record)
        return _Segment(
            high,
            low,
            (block_of + first).astype(np.uint32),
            start.astype(np.uint32),
            chunks["length"].astype(np.uint32),
        )

    def _note_needs(self, record: PackRecord) -> None:
        patches = record.patch_array()
        if not len(patches):
            return
        ids = record.chunk_array()["id"]
        gathered: dict[bytes, list[bytes]] = {}
        for row in patches:
            gathered.setdefault(ids[row["chunk"]].tobytes(), []).append(row["source"].tobytes())
        for chunk, needs in gathered.items():
            # Two hosts may have made different patches of one chunk: what either needs stays.
            self._needs[chunk] = tuple(dict.fromkeys((*self._needs.get(chunk, ()), *needs)))

    def _remember(self, segment: _Segment) -> None:
        ids = np.stack((segment.high, segment.low), axis=1).astype(">u8").tobytes()
        rows = zip(
            segment.block.tolist(), segment.start.tolist(), segment.length.tolist(), strict=True
        )
        for number, row in enumerate(rows):
            chunk = ids[number * ID_SIZE : (number + 1) * ID_SIZE]
            known = self._fresh.get(chunk)
            if known is None or known[2] & PATCH_BIT:
                self._fresh[chunk] = row

    def _fresh_segment(self) -> _Segment:
        high, low = _split(np.frombuffer(b"".join(self._fresh), "V16"))
        rows = np.array(list(self._fresh.values()), np.uint32).reshape(-1, 3)
        return _Segment(high, low, rows[:, 0], rows[:, 1], rows[:, 2])

    @staticmethod
    def _compact(segments: list[_Segment]) -> tuple[_Segment, ...]:
        while len(segments) > 1 and len(segments[-2]) < 2 * len(segments[-1]):
            segments[-2:] = [_join(segments[-2:])]
        return tuple(segments)

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
        offset, stored, plain = self._block_rows[block].tolist()
        pack = self._packs[int(self._block_pack[block])].pack
        patch, paged = bool(length & PATCH_BIT), bool(length & PAGED_BIT)
        return Location(pack, offset, stored, plain, start, length & LENGTH_MASK, patch, paged)

    def known(self, ids: bytes) -> list[bool]:
        """For each of several ids (16 bytes each, joined) whether it is known."""
        count = len(ids) // ID_SIZE
        fresh = self._fresh
        found = [ids[at : at + ID_SIZE] in fresh for at in range(0, count * ID_SIZE, ID_SIZE)]
        if not self._segments or count == 0:
            return found
        total = np.array(found, bool)
        high, low = _split(np.frombuffer(ids, "V16"))
        for segment in self._segments:
            if len(segment):
                total |= _present(segment, high, low)
        return [bool(one) for one in total]

    def consolidate(self) -> None:
        """Make one sorted segment of everything, so that rows have numbers."""
        with self._lock:
            segments = list(self._segments)
            if self._fresh:
                segments.append(self._fresh_segment())
            self._segments = (_join(segments),) if segments else (_join([_empty_segment()]),)
            self._fresh = {}

    def rows(self, ids: bytes) -> np.ndarray:
        """Row numbers of several ids (16 bytes each, joined), -1 where unknown.

        Needs :meth:`consolidate` before, and nothing added since.
        """
        (segment,) = self._segments
        high, low = _split(np.frombuffer(ids, "V16"))
        if not len(segment):
            return np.full(len(high), -1)
        at = np.minimum(np.searchsorted(segment.high, high), len(segment) - 1)
        same = segment.high[at] == high
        exact = same & (segment.low[at] == low)
        for row in np.flatnonzero(same & ~exact):
            found = segment.find(int(high[row]), int(low[row]))
            at[row], exact[row] = max(found, 0), found >= 0
        return np.where(exact, at, -1)

    def row_lengths(self) -> np.ndarray:
        """Stored payload length (before compression) of each row."""
        lengths: np.ndarray = self._segments[0].length & np.uint32(LENGTH_MASK)
        return lengths

    def row_packs(self) -> np.ndarray:
        """Number of the pack (in :meth:`packs`) each row is in."""
        packs: np.ndarray = self._block_pack[self._segments[0].block]
        return packs

    def row_costs(self) -> np.ndarray:
        """Stored bytes each row accounts for: its share of its block."""
        blocks = self._segments[0].block
        rows = self._block_rows[blocks]
        share: np.ndarray = self.row_lengths() * (rows[:, 1] / np.maximum(rows[:, 2], 1))
        return share

    def row_ids(self, rows: np.ndarray) -> bytes:
        """Ids of rows, joined."""
        segment = self._segments[0]
        pairs = np.stack((segment.high[rows], segment.low[rows]), axis=1)
        return pairs.astype(">u8").tobytes()

    def needs(self, chunk: bytes) -> tuple[bytes, ...]:
        """Ids of the chunks a patch takes pages from; empty for a plain chunk."""
        return self._needs.get(chunk, ())

    def all_needs(self) -> dict[bytes, tuple[bytes, ...]]:
        """The needs of every patch."""
        return dict(self._needs)

    def pack_of(self, chunk: bytes) -> bytes | None:
        """Id of the pack a chunk is in."""
        row = self._find(chunk)
        return None if row is None else self._packs[int(self._block_pack[row[0]])].pack

    def head(self, pack: bytes) -> PackRecord:
        """What is known of a pack, without its arrays."""
        return self._packs[self._numbers[pack]]

    def ids(self) -> Iterator[bytes]:
        """Every chunk id known, in no order; the same id may come twice."""
        for segment in self._segments:
            joined = np.stack((segment.high, segment.low), axis=1).astype(">u8").tobytes()
            for at in range(0, len(joined), ID_SIZE):
                yield joined[at : at + ID_SIZE]
        yield from list(self._fresh)


def _empty_segment() -> _Segment:
    return _Segment(
        np.zeros(0, np.uint64),
        np.zeros(0, np.uint64),
        np.zeros(0, np.uint32),
        np.zeros(0, np.uint32),
        np.zeros(0, np.uint32),
    )


def _present(segment: _Segment, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    at = np.searchsorted(segment.high, high)
    inside = np.minimum(at, len(segment) - 1)
    same = segment.high[inside] == high
    exact: np.ndarray = same & (segment.low[inside] == low)
    for row in np.flatnonzero(same & ~exact):
        exact[row] = segment.find(int(high[row]), int(low[row])) >= 0
    return exact

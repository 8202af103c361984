"""Sorted arrays of chunks: what a large index is made of.

The only part of reading and writing a repository that needs numpy, whose import costs as much
as a small backup: :mod:`lazarette.backup.repository.index` imports it when it is large.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lazarette.backup.repository.format import ID_SIZE
from lazarette.backup.repository.packs import PATCH_BIT, PackRecord

BLOCK_DTYPE = np.dtype([("offset", "<u4"), ("stored", "<u4"), ("plain", "<u4"), ("chunks", "<u4")])
CHUNK_DTYPE = np.dtype([("id", "V16"), ("length", "<u4")])
PATCH_DTYPE = np.dtype([("chunk", "<u4"), ("source", "V16")])

COLUMNS = ("high", "low", "block", "start", "length")


@dataclass(frozen=True)
class Segment:
    """Chunks ascending by the first half of their ids.

    Attributes:
        high: first half of each id.
        low: second half.
        block: number of the block it is in.
        start: where it begins in the plain block.
        length: as in the record, with its two marking bits.
    """

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

    def ids(self, rows: np.ndarray | slice = slice(None)) -> bytes:
        """Ids of rows, joined."""
        pairs = np.stack((self.high[rows], self.low[rows]), axis=1)
        return pairs.astype(">u8").tobytes()

    def rows(self, ids: bytes) -> np.ndarray:
        """Row of each of several ids (joined), -1 where there is none."""
        high, low = split(ids)
        if not len(self):
            return np.full(len(high), -1)
        at = np.minimum(np.searchsorted(self.high, high), len(self) - 1)
        same = self.high[at] == high
        exact = same & (self.low[at] == low)
        for row in np.flatnonzero(same & ~exact):
            found = self.find(int(high[row]), int(low[row]))
            at[row], exact[row] = max(found, 0), found >= 0
        return np.where(exact, at, -1)


def split(ids: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The halves of joined ids as numbers."""
    pairs = np.frombuffer(ids, ">u8").reshape(-1, 2)
    return pairs[:, 0].astype(np.uint64), pairs[:, 1].astype(np.uint64)


def join(segments: Sequence[Segment]) -> Segment:
    """One sorted segment of several, sorted or not; of equal ids the plain form goes first."""
    columns = [np.concatenate([getattr(segment, name) for segment in segments]) for name in COLUMNS]
    # By the first half alone: two ids that share it are next to never met, and looked for.
    patch = (columns[4] & np.uint32(PATCH_BIT)) != 0
    if patch.any():
        plain_first = np.argsort(patch, kind="stable")
        order = plain_first[np.argsort(columns[0][plain_first], kind="stable")]
    else:
        order = np.argsort(columns[0])
    return Segment(*(column[order] for column in columns))


def compact(segments: list[Segment]) -> tuple[Segment, ...]:
    """Merge segments of like size."""
    while len(segments) > 1 and len(segments[-2]) < 2 * len(segments[-1]):
        segments[-2:] = [join(segments[-2:])]
    return tuple(segments)


def of_record(record: PackRecord, first: int) -> Segment:
    """The chunks of a record, unsorted; ``first`` is the number of its first block."""
    blocks = np.frombuffer(record.blocks, BLOCK_DTYPE)
    chunks = np.frombuffer(record.chunks, CHUNK_DTYPE)
    payload = (chunks["length"] & np.uint32((1 << 30) - 1)).astype(np.int64)
    ends = np.cumsum(payload)
    block_of = np.repeat(np.arange(len(blocks)), blocks["chunks"])
    before = np.concatenate(([0], np.cumsum(blocks["chunks"], dtype=np.int64)[:-1]))
    base = np.concatenate(([0], ends))[before]
    start = ends - payload - base[block_of]
    high, low = split(chunks["id"].tobytes())
    return Segment(
        high,
        low,
        (block_of + first).astype(np.uint32),
        start.astype(np.uint32),
        chunks["length"].astype(np.uint32),
    )


def of_rows(found: Mapping[bytes, tuple[int, int, int]]) -> Segment:
    """Chunks by id, each with block, start and length; unsorted."""
    high, low = split(b"".join(found))
    rows = np.array(list(found.values()), np.uint32).reshape(-1, 3)
    return Segment(high, low, rows[:, 0], rows[:, 1], rows[:, 2])


def present(segments: Sequence[Segment], ids: bytes) -> list[bool]:
    """For each of several ids (joined) whether it is in one of the segments."""
    found = np.zeros(len(ids) // ID_SIZE, bool)
    for segment in segments:
        if len(segment):
            found |= segment.rows(ids) >= 0
    return [bool(one) for one in found]

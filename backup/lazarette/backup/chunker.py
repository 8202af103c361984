"""Cutting files into chunks.

Ordinary files are cut where their content says so: a rolling (gear) hash over the last 32
bytes, whose table comes from the repository's key, so that the sizes of chunks tell an
outsider nothing about known files.  Cuts depend on the content near them only: an insertion
moves them along.  Between ``MIN_SIZE`` and ``AVERAGE_SIZE`` a stricter mask is asked for
than after it (normalised chunking, as FastCDC does), which narrows the spread of sizes.

Files changed in place (databases, disk images) are cut into blocks on a fixed grid.

This module is the reference; the C module gives the same cuts.
"""

from __future__ import annotations

import numpy as np
from blake3 import blake3

from lazarette.backup import native
from lazarette.backup.stores.contract import Buffer

MIN_SIZE = 128 << 10
AVERAGE_SIZE = 512 << 10
MAX_SIZE = 2 << 20
WINDOW = 32

_STRICT_BITS = 21
_LOOSE_BITS = 17
STRICT_MASK = ((1 << _STRICT_BITS) - 1) << (32 - _STRICT_BITS)
LOOSE_MASK = ((1 << _LOOSE_BITS) - 1) << (32 - _LOOSE_BITS)

_STEP = 1 << 20


def gear_table(chunk_id_key: bytes) -> np.ndarray:
    """256 random 32-bit numbers from the repository's key."""
    stream = blake3(b"lazarette/gear", key=chunk_id_key).digest(length=1024)
    return np.frombuffer(stream, "<u4").astype(np.uint32)


def _hashes(table: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Gear hash at each byte: the sum of table[byte k back] << k over the last 32."""
    rolling: np.ndarray = table[data]
    width = 1
    while width < WINDOW:
        shifted = np.zeros_like(rolling)
        shifted[width:] = rolling[:-width] << np.uint32(width)
        rolling = rolling + shifted
        width *= 2
    return rolling


class Chunker:
    """Content-defined cuts with one repository's table."""

    def __init__(self, chunk_id_key: bytes) -> None:
        self.table = gear_table(chunk_id_key)
        self._packed = self.table.tobytes()

    def cuts(self, data: Buffer, final: bool) -> list[int]:
        """Lengths of the chunks at the start of ``data``.

        Args:
            data: content from the last cut on.
            final: nothing follows; the rest becomes a chunk too.

        Returns:
            Lengths, in order; what is left over (if not ``final``) is to be given again with
            more behind it.
        """
        if native.cuts is not None:
            return native.cuts(
                data, self._packed, MIN_SIZE, AVERAGE_SIZE, MAX_SIZE, STRICT_MASK, LOOSE_MASK, final
            )
        return self.cuts_plain(data, final)

    def cuts_plain(self, data: Buffer, final: bool) -> list[int]:
        """:meth:`cuts` without the C module."""
        bytes_ = np.frombuffer(data, np.uint8)
        strict, loose = self._candidates(bytes_)
        lengths = []
        start = 0
        total = len(bytes_)
        while total - start > (0 if final else MAX_SIZE):
            length = _first_cut(strict, loose, start, total)
            lengths.append(length)
            start += length
        return lengths

    def _candidates(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for at in range(0, len(data), _STEP):
            lead = min(at, WINDOW - 1)
            rolling = _hashes(self.table, data[at - lead : at + _STEP])[lead:]
            hits = np.flatnonzero((rolling & np.uint32(LOOSE_MASK)) == 0)
            found.append((hits + at + 1, (rolling[hits] & np.uint32(STRICT_MASK)) == 0))
        if not found:
            none = np.zeros(0, np.int64)
            return none, none
        loose = np.concatenate([hits for hits, _ in found])
        return loose[np.concatenate([strict for _, strict in found])], loose


def _first_cut(strict: np.ndarray, loose: np.ndarray, start: int, total: int) -> int:
    """Length of the chunk that begins at ``start``.

    A candidate is the position after the byte where the mask fits; its window must lie
    within the chunk, which holds because the least size is more than the window.
    """
    left = total - start
    if left <= MIN_SIZE:
        return left
    at = int(np.searchsorted(strict, start + MIN_SIZE))
    if at < len(strict) and strict[at] < start + AVERAGE_SIZE:
        return int(strict[at]) - start
    at = int(np.searchsorted(loose, start + AVERAGE_SIZE))
    if at < len(loose) and loose[at] <= start + MAX_SIZE:
        return int(loose[at]) - start
    return min(left, MAX_SIZE)

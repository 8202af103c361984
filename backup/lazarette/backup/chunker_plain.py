"""Cutting by content without the C module: the reference, with numpy.

The rule is told in :mod:`lazarette.backup.chunker`.
"""

from __future__ import annotations

import numpy as np

from lazarette.backup.chunker import AVERAGE_SIZE, LOOSE_MASK, MAX_SIZE, MIN_SIZE, STRICT_MASK
from lazarette.backup.stores.contract import Buffer

WINDOW = 32
_STEP = 1 << 20


def cuts(table: bytes, data: Buffer, final: bool) -> list[int]:
    """See :meth:`lazarette.backup.chunker.Chunker.cuts`."""
    strict, loose = _candidates(np.frombuffer(table, "<u4"), np.frombuffer(data, np.uint8))
    lengths = []
    start = 0
    total = len(data)
    while total - start > (0 if final else MAX_SIZE):
        length = _first_cut(strict, loose, start, total)
        lengths.append(length)
        start += length
    return lengths


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


def _candidates(table: np.ndarray, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for at in range(0, len(data), _STEP):
        lead = min(at, WINDOW - 1)
        rolling = _hashes(table, data[at - lead : at + _STEP])[lead:]
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

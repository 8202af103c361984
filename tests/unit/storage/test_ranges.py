"""Comparing extent lists, against comparing bytes."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lazarette.storage.btrfs_changes import _EXTENT_ITEM, changed_ranges

BLOCK = 4096


def items(layout: list[tuple[int, int, int, int]]) -> np.ndarray:
    """Extent items of (first block, blocks, address, offset in the extent)."""
    found = np.zeros(len(layout), _EXTENT_ITEM)
    for index, (first, count, address, offset) in enumerate(layout):
        found[index]["logical"] = first * BLOCK
        found[index]["bytes"] = found[index]["ram_bytes"] = count * BLOCK
        found[index]["bytenr"] = address * (1 << 20)
        found[index]["offset"] = offset * BLOCK
        found[index]["type"] = 1
        found[index]["length"] = 53
    return found


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    found = []
    position = 0
    for _ in range(draw(st.integers(0, 6))):
        position += draw(st.integers(0, 3))
        count = draw(st.integers(1, 4))
        # an address of 0 is a hole written as an extent
        found.append((position, count, draw(st.integers(0, 3)), draw(st.integers(0, 3))))
        position += count
    return found


def content(layout: list[tuple[int, int, int, int]], blocks: int) -> list[object]:
    """What each block holds: where it lies, or None in a hole."""
    found: list[object] = [None] * blocks
    for first, count, address, offset in layout:
        for step in range(count):
            if address and first + step < blocks:
                found[first + step] = (address, offset + step)
    return found


@given(layouts(), layouts(), st.integers(0, 30), st.integers(0, 30))
def test_every_block_that_differs_is_in_a_range_and_no_other(
    older: list[tuple[int, int, int, int]],
    newer: list[tuple[int, int, int, int]],
    was: int,
    now: int,
) -> None:
    ranges = changed_ranges(items(older), items(newer), was * BLOCK, now * BLOCK)
    before, after = content(older, 60), content(newer, 60)
    reported = {block for r in ranges for block in range(r.offset // BLOCK, r.end // BLOCK)}
    wanted = {b for b in range(now) if before[b] != after[b] or b >= was}
    assert reported == wanted
    assert all(a.end < b.offset for a, b in itertools.pairwise(ranges))


def test_an_inline_extent_is_known_by_the_transaction_that_wrote_it() -> None:
    older, newer = items([(0, 1, 0, 0)]), items([(0, 1, 0, 0)])
    for one, generation in ((older, 7), (newer, 7)):
        one["type"] = 0
        one["ram_bytes"] = 100
        one["generation"] = generation
    assert changed_ranges(older, newer, 100, 100) == ()
    newer["generation"] = 8
    (found,) = changed_ranges(older, newer, 100, 100)
    assert (found.offset, found.length) == (0, 100)

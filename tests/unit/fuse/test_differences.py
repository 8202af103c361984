"""Changed ranges from extent maps."""

from __future__ import annotations

import pytest

from lazarette.fuse import differences
from lazarette.fuse.differences import changed_ranges
from lazarette.fuse.syscalls import Extent

Map = list[tuple[int, int, int, int]]
CASES: list[tuple[str, Map, Map, int, int, tuple[tuple[int, int], ...]]] = [
    ("same", [(0, 100, 8, 0)], [(0, 100, 8, 0)], 8, 8, ()),
    ("moved", [(0, 100, 8, 0)], [(0, 200, 8, 0)], 8, 8, ((0, 8),)),
    (
        "middle",
        [(0, 100, 12, 0)],
        [(0, 100, 4, 0), (4, 9, 4, 0), (8, 108, 4, 0)],
        12,
        12,
        ((4, 4),),
    ),
    ("split only", [(0, 100, 8, 0)], [(0, 100, 4, 0), (4, 104, 4, 0)], 8, 8, ()),
    ("hole punched", [(0, 100, 8, 0)], [(0, 100, 4, 0)], 8, 8, ((4, 4),)),
    ("unwritten is a hole", [], [(0, 5, 8, 0x800)], 8, 8, ()),
    ("inline says nothing", [(0, 0, 8, 0x200)], [(0, 0, 8, 0x200)], 8, 8, ((0, 8),)),
    ("delayed says nothing", [(0, 0, 8, 6)], [(0, 0, 8, 6)], 8, 8, ((0, 8),)),
    ("grown by a hole", [(0, 100, 8, 0)], [(0, 100, 8, 0)], 8, 20, ((8, 12),)),
    ("grown in its block", [(0, 100, 8, 0)], [(0, 100, 8, 0)], 5, 7, ((5, 2),)),
    ("cut", [(0, 100, 8, 0)], [(0, 100, 4, 0)], 8, 4, ()),
]


@pytest.mark.parametrize(("name", "old", "new", "old_size", "new_size", "expected"), CASES)
def test_ranges(
    name: str,
    old: Map,
    new: Map,
    old_size: int,
    new_size: int,
    expected: tuple[tuple[int, int], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maps = {1: [Extent(*each) for each in old], 2: [Extent(*each) for each in new]}
    monkeypatch.setattr(differences, "_pieces", maps.__getitem__)
    assert changed_ranges(1, 2, old_size, new_size) == expected, name

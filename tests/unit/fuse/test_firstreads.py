"""The record of first reads: what goes into it, for how long, and who adds to it."""

from __future__ import annotations

from pathlib import Path

from lazarette.fuse.firstreads import SPAN, FirstReads


class Hands:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def test_first_reads_are_remembered_in_their_order_and_added_to(tmp_path: Path) -> None:
    file, clock = tmp_path / "reads" / "data", Hands()
    first = FirstReads(file, clock)
    assert first.known == []
    assert first.wants()
    first.note(b"base/5/1", 3 * SPAN - 1, 2)
    first.note(b"\xff\n", 0, 10)
    first.note(b"base/5/1", 2 * SPAN, 10)
    clock.now += 61
    assert not first.wants()
    first.save()
    second = FirstReads(file, clock)
    assert second.known == [(b"base/5/1", 2), (b"base/5/1", 3), (b"\xff\n", 0)]
    assert second.wants()
    second.note(b"other", 0, 1)
    second.note(b"\xff\n", 0, 1)
    second.save()
    assert FirstReads(file).known == [*second.known, (b"other", 0)]


def test_a_record_that_is_none_counts_for_nothing(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b'[["x"')
    record = FirstReads(file)
    assert record.known == []
    record.note(b"a", 0, 1)
    record.save()
    assert FirstReads(file).known == [(b"a", 0)]
    nowhere = FirstReads(None)
    assert not nowhere.wants() and nowhere.known == []
    nowhere.save()

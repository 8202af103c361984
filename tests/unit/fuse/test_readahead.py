"""Windows of read-ahead: they grow for whoever goes on, and shrink for whoever does not."""

from __future__ import annotations

import random

from lazarette.fuse.readahead import LEAST, MOST, ReadAhead

_READ = 128 << 10


def test_a_sequential_reader_is_never_caught_up_with() -> None:
    ahead, brought, asked = ReadAhead(), 0, 0
    for offset in range(0, 256 << 20, _READ):
        if offset:
            assert brought > offset, "the reader has to wait"
        start, length = ahead.due(offset, _READ)
        if length:
            assert start == max(brought, offset + _READ), "a gap, or brought twice"
            brought, asked = start + length, asked + 1
    assert ahead.window == MOST
    assert brought <= (256 << 20) + MOST
    assert asked < 40


def test_a_random_reader_costs_nothing() -> None:
    ahead, chosen = ReadAhead(), random.Random(1)
    ahead.due(0, _READ)
    due = [ahead.due(_READ * chosen.randrange(2, 10_000), 8192)[1] for _ in range(1000)]
    assert sum(due) <= LEAST
    assert ahead.window == 0


def test_one_jump_halves_the_window_and_goes_on_from_there() -> None:
    ahead = ReadAhead()
    for offset in range(0, 64 << 20, _READ):
        ahead.due(offset, _READ)
    before = ahead.window
    assert ahead.due(1 << 30, _READ) == ((1 << 30) + _READ, 0)
    assert ahead.window == before // 2
    start, length = ahead.due((1 << 30) + _READ, _READ)
    assert (start, ahead.window) == ((1 << 30) + 2 * _READ, before)
    assert length == before

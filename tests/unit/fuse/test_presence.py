"""Presence maps: what counts after a kill, and what after a reboot."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support.mounts import tmpfs

from lazarette.fuse.presence import PresenceMap

BOOT, LATER = b"b" * 16, b"l" * 16


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def opened(folder: int, boot: bytes = BOOT, content: bytes = b"id") -> PresenceMap:
    return PresenceMap(folder, b"m", content, 20, 4096, boot)


def test_blocks_survive_the_process_but_not_the_machine(folder: int) -> None:
    first = opened(folder)
    first.add(3, 2)
    first.close()
    again = opened(folder)
    assert 3 in again and 4 in again and 5 not in again
    assert again.missing(20) == 18
    again.close()
    rebooted = opened(folder, LATER)
    assert 3 not in rebooted
    rebooted.close()


def test_settled_blocks_survive_the_machine(folder: int) -> None:
    first = opened(folder)
    first.add(0, 1)
    bits = first.snapshot()
    first.add(9, 1)
    first.settle(bits)
    assert first.unsafe
    first.close()
    rebooted = opened(folder, LATER)
    assert 0 in rebooted and 9 not in rebooted
    assert rebooted.missing(1) == 0
    rebooted.close()


def test_map_of_other_content_counts_for_nothing(folder: int) -> None:
    first = opened(folder)
    first.add(0, 20)
    first.settle(first.snapshot())
    first.close()
    other = opened(folder, content=b"other")
    assert other.missing(20) == 20
    other.remove()
    assert os.listdir(folder) == []


def test_a_block_counts_once_that_is_written_down(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "full", 1 << 20) as place:
        folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            map_ = opened(folder)
            assert os.listdir(folder) == []
            with open(place / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
                while ballast.write(bytes(4096)):
                    pass
            with pytest.raises(OSError) as caught:
                map_.add(3, 1)
            assert caught.value.errno == errno.ENOSPC
            assert 3 not in map_ and not map_.unsafe
            (place / "ballast").unlink()
            map_.add(3, 1)
            map_.close()
            again = opened(folder)
            assert 3 in again and again.missing(20) == 19
            again.close()
        finally:
            os.close(folder)


def test_blocks_past_the_end_are_always_here(folder: int) -> None:
    map_ = opened(folder)
    assert 20 in map_
    map_.add(18, 50)
    assert map_.missing(20) == 18
    map_.close()

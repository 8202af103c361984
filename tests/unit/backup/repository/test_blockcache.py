"""The cache of blocks: bounded, and never other bytes than were put in."""

import os
from pathlib import Path

import pytest

from lazarette.backup.repository.blockcache import BlockCache
from lazarette.storage.clock import SystemClock

PACK = bytes(16)


def _cache(folder: Path, limit: int = 1 << 20) -> BlockCache:
    return BlockCache(folder, limit, SystemClock())


def test_blocks_are_shared_between_caches_of_one_folder(tmp_path: Path) -> None:
    _cache(tmp_path).write(PACK, 7, b"stored")
    assert _cache(tmp_path).read(PACK, 7) == b"stored"
    assert _cache(tmp_path).read(PACK, 8) is None


@pytest.mark.parametrize("damage", [b"", b"stor", b"sTored\0\0\0\0\0\0\0\0", None])
def test_torn_or_changed_copies_are_not_given(tmp_path: Path, damage: bytes | None) -> None:
    cache = _cache(tmp_path)
    cache.write(PACK, 7, b"stored")
    [path] = tmp_path.iterdir()
    if damage is None:
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.write_bytes(damage)
    assert cache.read(PACK, 7) is None
    cache.write(PACK, 7, b"stored")
    assert cache.read(PACK, 7) == b"stored"


def test_the_limit_is_kept_and_the_newest_stay(tmp_path: Path) -> None:
    limit, block = 1 << 20, 16 << 10
    cache = _cache(tmp_path, limit)
    for number in range(200):
        cache.write(PACK, number, bytes(block))
        path = next(one for one in tmp_path.iterdir() if one.name.endswith(f"-{number}"))
        os.utime(path, ns=(number, number))
        if number:
            assert cache.read(PACK, 0) is not None  # used again and again, so never the oldest
    held = sum(one.stat().st_size for one in tmp_path.iterdir())
    assert held <= limit + limit // 8
    assert cache.read(PACK, 199) is not None


def test_a_lost_folder_is_no_error(tmp_path: Path) -> None:
    cache = _cache(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    cache.write(PACK, 7, b"stored")
    assert cache.read(PACK, 7) is None

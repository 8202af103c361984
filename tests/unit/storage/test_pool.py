from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tests.support.kills import killed_at, steps_of
from tests.support.waiting import until

from lazarette.storage import loop, mounts
from lazarette.storage import pool as pool_module
from lazarette.storage.mounts import MountFailed
from lazarette.storage.pool import GIB, SMALLEST, STEP, Pool, PoolFormat, PoolSpace


@pytest.fixture(params=list(PoolFormat), ids=lambda kind: kind.value)
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pool]:
    made = Pool(tmp_path / "file", tmp_path / "mounted", request.param, GIB)
    made.open()
    try:
        yield made
    finally:
        made.close()


def _device(pool: Pool) -> Path | None:
    file = os.open(pool.file, os.O_RDWR)
    try:
        return loop.find(file)
    finally:
        os.close(file)


def test_a_pool_is_sparse_and_cleans_up(pool: Pool) -> None:
    (pool.target / "f").write_text("kept")
    assert pool.file.stat().st_size == GIB
    assert pool.file.stat().st_blocks * 512 < GIB // 4
    pool.close()
    assert _device(pool) is None
    assert not mounts.is_mount_point(pool.target)
    pool.open()
    assert (pool.target / "f").read_text() == "kept"


def test_closing_says_who_does_not_let_go(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "LET_GO_SECONDS", 0.05)
    with open(pool.target / "held", "w"), pytest.raises(MountFailed, match=f"by.* {os.getpid()} "):
        pool.close()
    assert mounts.is_mount_point(pool.target)
    pool.close()
    assert not mounts.is_mount_point(pool.target)


def test_opening_twice_attaches_once(pool: Pool) -> None:
    device = _device(pool)
    again = Pool(pool.file, pool.target, pool.format, GIB)
    again.open()
    assert _device(pool) == device
    assert len([m for m in mounts.mounts() if m.target == os.fsencode(pool.target)]) == 1


def test_a_pool_that_is_mounted_no_more_but_attached_is_found(pool: Pool) -> None:
    device = _device(pool)
    with open(pool.target / "held", "w") as held:
        mounts.unmount(pool.target, detach=True)
        pool.open()
        assert _device(pool) == device
        held.write("x")
    assert (pool.target / "held").exists()


def test_a_pool_grows_while_in_use(pool: Pool) -> None:
    before = pool.space()
    with open(pool.target / "held", "w") as held:
        pool.resize(2 * GIB)
        held.write("x")
    after = pool.space()
    assert after.size == 2 * GIB
    assert after.free - before.free > GIB // 2


def test_a_pool_shrinks_and_grows_again(pool: Pool) -> None:
    pool.resize(2 * GIB)
    large = pool.space()
    pool.resize(GIB)
    small = pool.space()
    assert small.size == GIB
    assert large.free - small.free > GIB // 2
    assert pool.file.stat().st_size == (GIB if pool.format is PoolFormat.BTRFS else 2 * GIB)
    assert small.allocated - large.allocated < STEP
    for size in (GIB + STEP, 2 * GIB, 3 * GIB):
        pool.resize(size)
        assert pool.space().size == size
    assert pool.ballast() == 0


def test_a_pool_killed_while_it_is_resized_is_resized_again(pool: Pool) -> None:
    def resize(larger: int) -> None:
        pool.resize(larger)
        pool.resize(GIB)

    (pool.target / "f").write_text("kept")
    for number, step in enumerate(steps_of(partial(resize, 2 * GIB)), 3):
        assert killed_at(step, partial(resize, number * GIB))
        for size in (GIB, 3 * GIB // 2, GIB):
            pool.resize(size)
            assert pool.space().size == size
            assert size * 3 // 4 < pool.space().free < size
    pool.close()
    pool.open()
    assert (pool.target / "f").read_text() == "kept"


def test_no_more_than_is_free_can_be_given_up(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "file", tmp_path / "mounted", PoolFormat.XFS, GIB)
    pool.open()
    try:
        with open(pool.target / "used", "wb") as used:
            os.posix_fallocate(used.fileno(), 0, GIB // 2)
        pool.resize(GIB // 4)
        space = pool.space()
        assert GIB // 2 < space.size < GIB
        assert space.free < STEP
        pool.resize(GIB)
        assert pool.space().free > GIB // 4
    finally:
        pool.close()


def test_deleted_data_is_given_back_to_the_host(pool: Pool) -> None:
    (pool.target / "big").write_bytes(os.urandom(64 << 20))
    os.sync()
    full = pool.space().allocated
    (pool.target / "big").unlink()
    for _ in range(100):
        os.sync()
        if pool.space().allocated < full - (48 << 20):
            return
        os.system("sleep 0.1")
    # discard waits for its own interval on btrfs: what matters is that it is asked for
    options = next(m for m in mounts.mounts() if m.target == os.fsencode(pool.target))
    assert any(option.startswith("discard") for option in options.super_options)


def _space(size: int, free: int, host_free: int, allocated: int = 0) -> PoolSpace:
    return PoolSpace(size, free, allocated, host_free, 100 * GIB)


def test_a_pool_with_room_stays_as_it_is() -> None:
    assert _space(16 * GIB, 15 * GIB, 80 * GIB).wanted == 16 * GIB


def test_a_pool_grows_before_it_is_short() -> None:
    assert _space(16 * GIB, 3 * GIB, 80 * GIB, 13 * GIB).wanted == 24 * GIB


def test_a_pool_never_promises_what_the_host_has_not() -> None:
    space = _space(16 * GIB, 3 * GIB, 6 * GIB, 13 * GIB)
    assert space.wanted <= 13 * GIB + 6 * GIB - 2 * GIB
    full = _space(16 * GIB, 3 * GIB, 3 * GIB, 13 * GIB)
    assert full.wanted < 16 * GIB
    assert full.wanted - full.allocated <= 3 * GIB


def test_a_pool_of_a_format_that_must_not_be_small_stays_so_large() -> None:
    full = _space(16 * GIB, 3 * GIB, 2 * GIB)
    assert full.wanted == SMALLEST
    assert replace(full, smallest=0).wanted == 0


def test_a_pool_does_not_grow_by_crumbs() -> None:
    almost = _space(16 * GIB, 2 * GIB, 5 * GIB + STEP // 2, 13 * GIB)
    assert almost.wanted == 16 * GIB


def test_the_watch_grows_a_pool_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazarette.storage.pool.FIRST_SIZE", GIB)
    monkeypatch.setattr("lazarette.storage.pool.WATCH_SECONDS", 0.05)
    pool = Pool(tmp_path / "file", tmp_path / "mounted", PoolFormat.BTRFS)
    pool.open()
    try:
        until(lambda: pool.space().free > GIB)  # the file grows first, then what is in it
        assert GIB < pool.space().size <= pool.capacity()
    finally:
        pool.close()

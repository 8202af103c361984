"""A host that has little room, and then none."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazarette.storage import loop, mounts, process
from lazarette.storage.errors import NoSpace
from lazarette.storage.pool import GIB, MIB, SMALLEST, Pool, PoolFormat


def _host(tmp_path: Path, size: int) -> Path:
    with open(tmp_path / "disk", "wb") as disk:
        disk.truncate(size)
    process.run(["mkfs.ext4", "-q", "-m", "0", str(tmp_path / "disk")])
    host = tmp_path / "host"
    host.mkdir()
    with open(tmp_path / "disk", "r+b") as disk:
        device, path = loop.attach(disk.fileno(), b"host")
        mounts.mount("ext4", host, [("source", str(path))])
        os.close(device)
    return host


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    made = _host(tmp_path, 1400 * MIB)
    try:
        yield made
    finally:
        mounts.unmount(made)


def _fill(folder: Path) -> None:
    """Take all the room there is."""
    with open(folder / "filler", "wb") as filler:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        os.posix_fallocate(filler.fileno(), 0, free - MIB)


def _write_all(folder: Path) -> int:
    """Write until there is no room; how much there was."""
    written = 0
    with open(folder / "data", "wb", buffering=0) as file:
        while True:
            try:
                written += file.write(os.urandom(4 * MIB))
                os.fsync(file.fileno())
            except OSError as refused:
                assert refused.errno == errno.ENOSPC
                return written


@pytest.mark.parametrize("kind", list(PoolFormat), ids=lambda kind: kind.value)
def test_what_a_pool_promises_it_has_when_the_host_is_full(host: Path, kind: PoolFormat) -> None:
    pool = Pool(host / "file", host / "pool", kind)
    pool.open(watch=False)
    try:
        promised = pool.space().free
        assert SMALLEST // 3 < promised < SMALLEST
        (pool.target / "kept").write_text("kept")
        os.sync()
        pool.maintain()
        _fill(host)
        pool.maintain()
        assert _write_all(pool.target) > promised * 3 // 4
        assert not os.statvfs(pool.target).f_flag & os.ST_RDONLY
        pool.close()
        pool.open(watch=False)
        assert (pool.target / "kept").read_text() == "kept"
    finally:
        pool.close()


def test_an_xfs_pool_gives_up_what_the_host_has_no_more(tmp_path: Path) -> None:
    host = _host(tmp_path, 6 * GIB)
    pool = Pool(host / "file", host / "pool", PoolFormat.XFS)
    try:
        pool.open(watch=False)
        assert pool.space().size > 2 * GIB
        _fill(host)
        pool.maintain()
        assert pool.space().free < MIB
        (host / "filler").unlink()
        pool.maintain()
        assert pool.space().free > GIB
        assert pool.ballast() < 4 * GIB
    finally:
        pool.close()
        mounts.unmount(host)


def test_a_host_without_room_for_a_pool_is_told_so(host: Path) -> None:
    with open(host / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, 600 * MIB)
    for kind in PoolFormat:
        with pytest.raises(NoSpace, match="making the pool"):
            Pool(host / "file", host / "pool", kind).open()
        assert not (host / "file").exists()

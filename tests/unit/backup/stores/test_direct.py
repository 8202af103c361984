"""Objects written past the page cache: any size, the same bytes, nothing left in memory."""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path

import pytest

from lazarette.backup.stores import direct

MIB = 1 << 20


@pytest.mark.parametrize(
    "size", [0, 1, MIB - 1, MIB, MIB + 1, 4 * MIB, 4 * MIB + 4095, 9 * MIB + 4097]
)
def test_every_size_is_written_whole(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    with open(tmp_path / "object", "xb", buffering=0) as file:
        direct.write(file.fileno(), data)
    assert (tmp_path / "object").read_bytes() == data


def test_large_objects_do_not_stay_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "object"
    with open(path, "xb", buffering=0) as file:
        direct.write(file.fileno(), bytes(9 * MIB))
        os.fsync(file.fileno())
    shown = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)],
        check=True,
        capture_output=True,
    )
    assert int(shown.stdout) < MIB


def test_a_filesystem_without_direct_io_takes_them_too() -> None:
    """A memfd has none: its pages are the page cache itself."""
    data = os.urandom(3 * MIB + 5)
    file = os.memfd_create("object")
    try:
        direct.write(file, data)
        assert os.pread(file, len(data) + 1, 0) == data
    finally:
        os.close(file)


@pytest.mark.parametrize("size", [MIB, 5 * MIB + 1])
def test_what_begins_at_a_page_of_memory_is_not_copied(tmp_path: Path, size: int) -> None:
    data = mmap.mmap(-1, size)
    data[:] = os.urandom(size)
    with open(tmp_path / "object", "xb", buffering=0) as file:
        direct.write(file.fileno(), memoryview(data))
    assert (tmp_path / "object").read_bytes() == data[:]

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from blake3 import blake3

from lazarette.backup import native
from lazarette.backup.chunker import MAX_SIZE, MIN_SIZE, Chunker

BOTH = [pytest.param(True, id="python"), pytest.param(False, id="c")]


def test_the_c_module_is_built() -> None:
    assert native.cuts is not None, "run scripts/setup"


def test_both_list_the_same(tmp_path: Path) -> None:
    for name in (b"a", b"\xff", b"z" * 255, b".hidden", b"..x"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.utime(tmp_path / "a", ns=(0, -1))
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        listed = native.scan(directory)
        assert listed == native.scan_plain(directory)
        assert [row[0] for row in listed] == sorted(row[0] or b"" for row in listed)
        assert native.scan(directory) == listed
    finally:
        os.close(directory)
    with pytest.raises(OSError, match="descriptor"):
        native.scan(-1)


@pytest.mark.parametrize("plain", BOTH)
def test_reading_small_files(tmp_path: Path, plain: bool) -> None:
    read = native.read_files_plain if plain else native.read_files
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    os.setxattr(tmp_path / "a", "user.x", b"1")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "grown").write_bytes(b"longer than said")
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        rows = read(
            [
                (directory, b"a", 3),
                (directory, b"b", 0),
                (directory, b"absent", 1),
                (directory, b"link", 1),
                (directory, b"grown", 3),
            ]
        )
    finally:
        os.close(directory)
    assert [row[0] for row in rows] == [0, 0, 2, 40, 0]
    assert [row[2] for row in rows] == [b"abc", b"", None, None, None]
    assert rows[0][4] == len(b"user.x\0") and rows[1][4] == 0
    inode = rows[0][1]
    assert inode is not None and inode == native.inode_of(None, (tmp_path / "a").stat())


@pytest.mark.parametrize("plain", BOTH)
def test_writing_small_files(tmp_path: Path, plain: bool) -> None:
    write = native.write_files_plain if plain else native.write_files
    (tmp_path / "there").write_bytes(b"")
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        done = write(
            [
                (directory, b"new", memoryview(b"content"), 0o4711, 5, 6, 12, 345),
                (directory, b"there", b"x", 0o600, -1, -1, 0, 0),
            ]
        )
    finally:
        os.close(directory)
    assert done == [(0, 0), (native.STAGE_OPEN, 17)]
    status = (tmp_path / "new").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o4711, 5, 6)
    assert status.st_mtime_ns == 12_000_000_345
    assert (tmp_path / "new").read_bytes() == b"content"


def _contents() -> list[bytes]:
    chance = random.Random(11)
    text = b" ".join(b"%d" % chance.randrange(1000) for _ in range(900_000))
    return [b"", b"x", chance.randbytes(5 << 20), text, bytes(5 << 20), chance.randbytes(MIN_SIZE)]


@pytest.mark.parametrize("final", [True, False])
def test_both_cut_the_same(final: bool) -> None:
    chunker = Chunker(bytes(range(32)))
    for content in _contents():
        lengths = chunker.cuts(content, final)
        assert lengths == chunker.cuts_plain(content, final)
        assert all(MIN_SIZE < length <= MAX_SIZE for length in lengths[:-1])
        assert not final or sum(lengths) == len(content)
        assert final or len(content) - sum(lengths) <= MAX_SIZE


def test_cuts_follow_the_content() -> None:
    chunker = Chunker(bytes(32))
    content = random.Random(12).randbytes(12 << 20)
    moved = b"inserted" + content
    assert _chunks(chunker, content) & _chunks(chunker, moved)
    assert len(_chunks(chunker, moved) - _chunks(chunker, content)) <= 2


def test_cuts_depend_on_the_key() -> None:
    content = random.Random(13).randbytes(6 << 20)
    assert Chunker(bytes(32)).cuts(content, True) != Chunker(bytes([1] * 32)).cuts(content, True)


def _chunks(chunker: Chunker, content: bytes) -> set[bytes]:
    found = set()
    at = 0
    for length in chunker.cuts(content, True):
        found.add(content[at : at + length])
        at += length
    return found


@pytest.mark.parametrize("plain", BOTH)
@pytest.mark.parametrize("pages", [0, 1, 2, 15, 16, 17, 33])
def test_hashes_of_pages(plain: bool, pages: int) -> None:
    hashed = native.page_hashes_plain if plain else native.page_hashes
    key, data = os.urandom(32), os.urandom(8192 * pages)
    wanted = [blake3(data[at : at + 8192], key=key).digest(16) for at in range(0, len(data), 8192)]
    assert hashed(data, key) == b"".join(wanted)
    with pytest.raises(ValueError, match="pages"):
        hashed(data + b"x", key)


@pytest.mark.parametrize("plain", BOTH)
def test_hashes_of_several_pieces(plain: bool) -> None:
    hashes = native.hashes_plain if plain else native.hashes
    key = bytes(range(32))
    chance = random.Random(4)
    sizes = [0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 2049, 3072, 8192, 8193, 31 * 1024 + 1]
    every = [chance.randbytes(size) for size in (*sizes, *chance.choices(range(1 << 18), k=40))]
    wanted = [blake3(one, key=key).digest(16) for one in every]
    pieces = [memoryview(bytearray(b"x" + one))[1:] for one in every]
    assert hashes([*every, *pieces], key) == b"".join(wanted * 2)
    for one, name in zip(every, wanted, strict=True):
        assert hashes([one], key) == name
    assert hashes([], key) == b""
    with pytest.raises(ValueError, match="32"):
        hashes([b"a"], b"short")


@pytest.mark.parametrize("plain", BOTH)
def test_reading_pages_of_a_file(tmp_path: Path, plain: bool) -> None:
    read = native.read_pages_plain if plain else native.read_pages
    page, key = 8192, bytes(range(32))
    data = random.Random(8).randbytes(40 * page)
    (tmp_path / "file").write_bytes(data + b"tail")
    ranges = [(3 * page, page), (5 * page, 20 * page), (5 * page + 100, page), (0, 0)]
    wanted = b"".join(data[offset : offset + length] for offset, length in ranges)
    into = memoryview(bytearray(30 * page))
    with open(tmp_path / "file", "rb") as file:
        found = read(file.fileno(), ranges, into, key)
        assert into[: len(wanted)] == wanted
        assert found == native.page_hashes_plain(wanted, key)
        assert read(file.fileno(), [], into, key) == b""
        assert read(file.fileno(), [(0, page), (40 * page, page)], into, key) is None
        for refused in ([(0, page + 1)], [(0, 31 * page)]):
            with pytest.raises(ValueError, match="whole pages"):
                read(file.fileno(), refused, into, key)
    with pytest.raises(OSError, match="descriptor"):
        read(-1, [(0, page)], into, key)

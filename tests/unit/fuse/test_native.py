"""The C module does what its Python versions do."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from lazarette.fuse import native

FIELDS = (
    *("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size"),
    *("st_blocks", "st_blksize", "st_atime_ns", "st_mtime_ns", "st_ctime_ns"),
)


def test_the_c_module_is_built() -> None:
    assert native.status is not native.status_plain, "run scripts/setup"


def values(st: native.Status | None) -> list[int]:
    assert st is not None
    return [getattr(st, name) for name in FIELDS]


def test_attributes_are_those_of_stat(tmp_path: Path) -> None:
    path = tmp_path / "\udcff odd"
    path.write_bytes(b"x" * 5000)
    (tmp_path / "link").symlink_to(path.name)
    os.utime(path, ns=(-1, 20_000_000_000 * 10**9 + 7))
    name, wanted = os.fsencode(path.name), os.stat(path)
    fd = os.open(tmp_path, os.O_PATH)
    try:
        assert values(native.seek(fd, name)) == values(wanted)
        assert values(native.status(fd, b"link", True)) == values(wanted)
        assert stat.S_ISLNK(native.status(fd, b"link", False).st_mode)
        assert values(native.status(None, os.fsencode(path), False)) == values(wanted)
        assert values(native.opened(fd)) == values(os.stat(tmp_path))
        assert native.seek(fd, b"nothing") is None
        with pytest.raises(FileNotFoundError, match="nothing"):
            native.status(fd, b"nothing", False)
        with pytest.raises(NotADirectoryError):
            native.seek(fd, name + b"/below")
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.opened(-7)


@pytest.mark.parametrize("times", [(1, 2), (-1, -1_500_000_000), (2**40, 5)])
def test_replies_are_the_same_bytes(tmp_path: Path, times: tuple[int, int]) -> None:
    path = tmp_path / "file"
    path.touch(0o640)
    os.utime(path, ns=times)
    ours, plain = native.status(None, os.fsencode(path), False), os.stat(path)
    wanted = native.entry_reply_plain(2**63, 2**62 + 1, plain, 3, 86400, 1)
    for st in (ours, plain, native.Shown(*values(plain))):
        assert native.entry_reply(2**63, 2**62 + 1, st, 3, 86400, 1) == wanted
        assert native.attr_reply(7, st, 1, 0) == native.attr_reply_plain(7, plain, 1, 0)
    device = os.stat("/dev/null")
    assert native.attr_reply(7, device, 1, 0) == native.attr_reply_plain(7, device, 1, 0)


@pytest.mark.parametrize("set_times", [native.set_times, native.set_times_plain])
def test_times_are_set_each_by_itself(tmp_path: Path, set_times: Callable[..., None]) -> None:
    path = tmp_path / "file"
    path.touch()
    os.utime(path, ns=(5, 6))
    fd = os.open(tmp_path, os.O_PATH)
    try:
        set_times(fd, b"file", False, 0, native.UTIME_OMIT, -3, 250)
        st = path.stat()
        assert (st.st_atime_ns, st.st_mtime_ns) == (5, -3 * 10**9 + 250)
        set_times(fd, b"file", False, 0, native.UTIME_NOW, 0, native.UTIME_OMIT)
        assert path.stat().st_atime_ns > 10**18
        assert path.stat().st_mtime_ns == st.st_mtime_ns
        with pytest.raises(FileNotFoundError):
            set_times(fd, b"nothing", False, 0, 0, 0, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("body", [b"", b"body"])
def test_an_answer_is_one_message(body: bytes) -> None:
    receive, send = os.pipe()
    try:
        native.answer(send, 9, body)
        assert os.read(receive, 100) == struct.pack("=IiQ", 16 + len(body), 0, 9) + body
    finally:
        os.close(receive)
        os.close(send)

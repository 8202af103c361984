"""Layouts of messages: sizes as in the kernel's header, and round trips."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from lazarette.fuse import protocol, replies, requests
from lazarette.fuse.protocol import InitFlag


def test_reply_sizes_are_the_kernels(tmp_path: Path) -> None:
    st = os.stat(tmp_path)
    assert len(replies.entry_reply(2, 3, st, 1, 1, 1)) == 128
    assert len(replies.NEGATIVE_REPLY) == 128
    assert len(replies.attr_reply(3, st, 1, 1)) == 104
    assert len(replies.init_reply(45, 0, InitFlag(0), 1 << 20, 1)) == 64
    assert len(replies.open_reply(1, 0)) == 16
    assert len(replies.statfs_reply(os.statvfs(tmp_path))) == 80
    assert len(replies.write_reply(1)) == 8


def test_requests_are_parsed_by_field() -> None:
    header = struct.pack("=IIQQIIIHH", 56, 4, 7, 9, 1000, 100, 42, 0, 0)
    request = requests.parse_header(bytearray(header))
    assert (request.opcode, request.unique, request.node) == (4, 7, 9)
    assert (request.uid, request.gid, request.pid) == (1000, 100, 42)
    body = struct.pack(
        "=IIQQQQQQIIIIIIII", 0x3F, 0, 5, 11, 0, 21, 22, 23, 1, 2, 3, 0o644, 0, 8, 9, 0
    )
    setattr_ = requests.parse_setattr(body)
    assert (setattr_.fh, setattr_.size, setattr_.atime, setattr_.mtime) == (5, 11, 21, 22)
    assert (setattr_.mode, setattr_.uid, setattr_.gid) == (0o644, 8, 9)
    assert len(body) == 88


def test_names_keep_odd_bytes() -> None:
    assert requests.parse_name(b"\xff\n\x01\0") == b"\xff\n\x01"
    assert requests.parse_two_names(b"a\xfe\0\x80b\0") == (b"a\xfe", b"\x80b")
    rename, old, new = requests.parse_rename2(struct.pack("=QII", 5, 2, 0) + b"o\0n\0")
    assert (rename.newdir, rename.flags, old, new) == (5, 2, b"o", b"n")


def test_second_flag_word_counts_only_when_announced() -> None:
    words = [7, 45, 0, int(InitFlag.INIT_EXT), int(InitFlag.PASSTHROUGH) >> 32, 0]
    assert requests.parse_init(struct.pack("=6I", *words)).flags & InitFlag.PASSTHROUGH
    words[3] = 0
    assert not requests.parse_init(struct.pack("=6I", *words)).flags & InitFlag.PASSTHROUGH


@pytest.mark.parametrize("device", [(1, 3), (8, 255), (259, 70000), (0, 0)])
def test_device_numbers_survive(device: tuple[int, int]) -> None:
    number = os.makedev(*device)
    assert protocol.decode_device(protocol.encode_device(number)) == number


def test_times_before_the_epoch_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.touch()
    os.utime(path, ns=(-1, -1_500_000_000))
    packed = replies.attr_reply(1, os.stat(path), 1, 0)
    seconds = struct.unpack_from("=q", packed, 16 + 32)[0]
    assert seconds == -2

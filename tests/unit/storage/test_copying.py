"""Copying what changes meanwhile."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from lazarette.storage import beneath, copying


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


@pytest.mark.parametrize(
    "replace",
    [
        lambda path: None,
        Path.mkdir,
        lambda path: path.symlink_to("/etc/passwd"),
        os.mkfifo,
        _socket,
    ],
    ids=["gone", "folder", "link", "fifo", "socket"],
)
def test_a_file_that_is_replaced_has_vanished(
    tmp_path: Path, replace: Callable[[Path], None]
) -> None:
    file = tmp_path / "f"
    file.touch()
    status = file.lstat()
    file.unlink()
    replace(file)
    (tmp_path / "to").mkdir()
    with (
        beneath.opened(tmp_path) as source,
        beneath.opened(tmp_path / "to") as target,
        pytest.raises(FileNotFoundError),
    ):
        copying.copy_entry(source, b"f", status, target, b"f")


def test_a_link_that_is_replaced_has_vanished(tmp_path: Path) -> None:
    link = tmp_path / "l"
    link.symlink_to("x")
    status = link.lstat()
    link.unlink()
    link.touch()
    with beneath.opened(tmp_path) as folder, pytest.raises(FileNotFoundError):
        copying.copy_entry(folder, b"l", status, folder, b"copy")

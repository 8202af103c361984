"""The control socket over the change from one server to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazarette.fuse.control import Arguments, ControlSocket, call


def _named(path: Path, name: str, listener: int = -1) -> ControlSocket:
    def say(arguments: Arguments) -> str:
        return name

    made = ControlSocket(str(path), {"name": say}, listener)
    made.start()
    return made


def test_a_server_that_ends_late_leaves_the_socket_of_the_next(tmp_path: Path) -> None:
    path = tmp_path / "control"
    old = _named(path, "old")
    new = _named(path, "new")
    old.close()
    assert bytes(call(str(path), "name", 5)) == b'"new"'
    new.close()
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        call(str(path), "name", 5)

"""Contexts: hostile and broken ones."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from lazarette.runtime.builds import context
from lazarette.runtime.builds.errors import ContextError
from lazarette.runtime.images.compression import UnpackLimits
from lazarette.storage.errors import LazaretteError


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def _file(name: str, data: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), data


def _link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("needs root to give files their owners")
    made = tmp_path / "context"
    made.mkdir()
    return made


def test_a_bomb_is_cut_off(folder: Path) -> None:
    bomb = gzip.compress(_tar(_file("zeros", bytes(4 << 20))))
    with pytest.raises(LazaretteError, match="unpacks to more than"):
        context.unpack(io.BytesIO(bomb), folder, UnpackLimits(size=1 << 20))


def test_a_cut_stream_is_refused(folder: Path) -> None:
    cut = gzip.compress(_tar(_file("a", os.urandom(100_000))))[:-5000]
    with pytest.raises(LazaretteError):
        context.unpack(io.BytesIO(cut), folder)


@pytest.mark.parametrize("name", ["../out", "a/../../out"])
def test_names_cannot_leave(folder: Path, name: str) -> None:
    with pytest.raises(ContextError):
        context.unpack(io.BytesIO(_tar(_file(name))), folder)
    assert not (folder.parent / "out").exists()


def test_links_cannot_lead_out(folder: Path) -> None:
    tar = _tar(_link("l", "../.."), _file("l/out"), _link("m", "/"), _file("m/tmp/laz-out"))
    context.unpack(io.BytesIO(tar), folder)
    assert not (folder.parent.parent / "out").exists()
    assert not Path("/tmp/laz-out").exists()


def test_hard_links_cannot_lead_out(folder: Path) -> None:
    with pytest.raises(LazaretteError):
        context.unpack(io.BytesIO(_tar(_link("p", "../../etc/passwd", tarfile.LNKTYPE))), folder)


def test_deep_folders_are_walked(folder: Path) -> None:
    deep = "/".join(["d"] * 400)
    tar = _tar(_file(f"{deep}/f"), _file("Dockerfile"), _file(".dockerignore", b"*.log\n"))
    context.unpack(io.BytesIO(tar), folder)
    out = io.BytesIO()
    context.pack(folder, out, context.locate(folder))
    out.seek(0)
    with tarfile.open(fileobj=out) as packed:
        assert f"{deep}/f" in packed.getnames()

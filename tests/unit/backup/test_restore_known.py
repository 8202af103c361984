"""A restore over a folder that is exactly an earlier snapshot touches only the difference."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from tests.support import repositories

from lazarette.backup import restore
from lazarette.backup.repository.chunks import ChunkReader

_BIG = 4 << 20


def _shown(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(root))
        content: object = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        links = status.st_nlink if path.is_file() else 0
        found[name] = (status.st_mode, status.st_mtime_ns, links, content)
    return found


def _tree(root: Path) -> None:
    chance = random.Random(7)
    for number in range(20):
        folder = root / f"d{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}").write_bytes(chance.randbytes(3000 + number))
    (root / "big").write_bytes(chance.randbytes(_BIG))
    (root / "a").write_bytes(b"linked")
    os.link(root / "a", root / "d1" / "b")
    (root / "soft").symlink_to("big")


def _change(root: Path) -> None:
    with open(root / "big", "r+b") as big:
        big.seek(1 << 20)
        big.write(b"changed")
    (root / "d0" / "f0").unlink()
    (root / "d2" / "new").write_bytes(b"new")
    os.link(root / "d1" / "b", root / "c")
    shutil.rmtree(root / "d3")
    (root / "d3").write_bytes(b"a file now")
    os.utime(root / "d1" / "f1", ns=(5, 5))


def test_only_the_difference_is_written(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    _tree(source)
    with repositories.local(tmp_path) as repo:
        first = repositories.backup(repo, source).snapshot
        repositories.bring_back(repo, first, target)
        _change(source)
        second = repositories.backup(repo, source, first).snapshot
        done = repositories.bring_back(repo, second, target, mode=restore.Mode.DELTA, known=first)
        assert not done.damaged
        assert _shown(target) == _shown(source)
        assert done.bytes_written < _BIG // 4
        assert done.files == second.stats.files


def test_what_did_not_change_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    _tree(source)
    with repositories.local(tmp_path) as repo:
        first = repositories.backup(repo, source).snapshot
        repositories.bring_back(repo, first, target)
        stamp = (source / "big").stat().st_mtime_ns
        with open(source / "big", "r+b") as big:
            big.write(b"other")
        os.utime(source / "big", ns=(stamp, stamp))  # the time tells nothing
        second = repositories.backup(repo, source, first).snapshot
        again = repositories.reopen(repo)
        fetched = 0
        get = ChunkReader.get

        def counted(self: ChunkReader, chunk: bytes):  # type: ignore[no-untyped-def]
            nonlocal fetched
            data = get(self, chunk)
            fetched += len(data)
            return data

        monkeypatch.setattr(ChunkReader, "get", counted)
        done = restore.run(
            again, second, target, restore.RestoreOptions(mode=restore.Mode.DELTA, known=first)
        )
        assert (target / "big").read_bytes() == (source / "big").read_bytes()
        assert done.bytes_written > 0
        assert fetched < _BIG // 2

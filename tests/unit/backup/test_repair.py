from __future__ import annotations

import io
import os
import random
import tarfile
import time
from pathlib import Path

import pytest
from tests.support.repositories import backup, bring_back, local, reopen
from tests.support.trees import describe, every_kind

from lazarette.backup import copying, tarstream
from lazarette.backup.archive import Outcome
from lazarette.backup.repository import prune, repair
from lazarette.backup.repository.keys import CannotRead
from lazarette.backup.repository.repository import Repository
from lazarette.storage import process
from lazarette.storage.clock import SystemClock


def _packs(repo: Repository) -> list[Path]:
    root = Path(repo.store.url.removeprefix("file://")) / "packs"
    found = [path for path in root.rglob("*") if path.is_file()]
    return sorted(found, key=lambda path: path.stat().st_size)


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def test_next_backup_heals_what_is_still_there(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    chance = random.Random(1)
    for number in range(6):
        (source / f"f{number}").write_bytes(chance.randbytes(3 << 20))
    before = describe(source)
    time.sleep(2.2)  # or every file is too young to be trusted by its times
    with local(tmp_path, cache=False) as repo:
        first = backup(repo, source).snapshot
        largest = _packs(repo)[-1]
        _flip(largest, 5 << 20)
        done = repair.run(reopen(repo))
        assert done.packs_rewritten == 1 and done.chunks_lost and done.chunks_saved
        assert not repo.check(1.0).clean
        again = backup(reopen(repo), source, first)
        assert 0 < again.stats.bytes_read < 8 << 20
        healed = reopen(repo)
        assert healed.check(1.0).clean
        for number, snapshot in enumerate((first, again.snapshot)):
            assert bring_back(healed, snapshot, tmp_path / f"t{number}").outcome is Outcome.OK
            assert describe(tmp_path / f"t{number}") == before
        prune.run(healed)
        assert not largest.exists() and healed.check(1.0).clean
        assert list(healed.store.list("lost/")) != []
        backup(healed, source, again.snapshot)
        assert list(healed.store.list("lost/")) == []


def test_index_is_made_again_from_packs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(os.urandom(5 << 20))
    with local(tmp_path, cache=False) as repo:
        record = backup(repo, source).snapshot
        (name,) = [info.name for info in repo.store.list("index/")]
        _flip(Path(repo.store.url.removeprefix("file://")) / name, 40)
        done = repair.run(repo)
        assert (done.indexes_rebuilt, done.packs_adopted) == (1, 2)
        healed = reopen(repo)
        assert healed.check(1.0).clean
        assert bring_back(healed, record, tmp_path / "t").outcome is Outcome.OK


def test_copy_to_another_repository(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    every_kind(source)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with local(tmp_path / "one") as here, local(tmp_path / "two") as there:
        first = backup(here, source).snapshot
        (source / "more").write_bytes(b"more")
        second = backup(here, source, first).snapshot
        report = copying.run(here, there, here.snapshots())
        assert [one.time_ns for one in report.copied] == [first.time_ns, second.time_ns]
        again = copying.run(here, there, here.snapshots())
        assert again.passed_over == [first.id, second.id] and again.bytes_sent == 0
        assert there.check(1.0).clean
        bring_back(reopen(there), report.copied[1], tmp_path / "t")
    assert describe(tmp_path / "t") == describe(source)


def test_tar_stream_holds_the_tree(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    every_kind(source)
    with local(tmp_path) as repo:
        record = backup(repo, source).snapshot
        out = io.BytesIO()
        assert tarstream.write(repo, record, out) == [b"socket"]
        part = io.BytesIO()
        tarstream.write(repo, record, part, b"dir")
    with tarfile.open(fileobj=io.BytesIO(part.getvalue())) as archive:
        assert archive.getnames()[0] == "dir"
    (tmp_path / "out.tar").write_bytes(out.getvalue())
    target = tmp_path / "t"
    target.mkdir()
    process.run(
        ["tar", "-xpf", str(tmp_path / "out.tar"), "--xattrs", "--xattrs-include=*",
         "-C", str(target)]
    )  # fmt: skip
    before, after = describe(source), describe(target)
    before.pop(b"socket")
    late = b"empty"  # a time before 1970 with a fraction is not told apart by tar
    assert {path: node for path, node in after.items() if path != late} == {
        path: node for path, node in before.items() if path != late
    }


def test_writer_adds_and_cannot_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    every_kind(source)
    with local(tmp_path) as repo:
        host = Repository.open(repo.store, repo.keys.for_writer(), SystemClock(), tmp_path / "host")
        report = backup(host, source)
        assert report.outcome is Outcome.OK
        again = backup(host, source)
        assert again.stats.bytes_sent < 20_000
        with pytest.raises(CannotRead):
            bring_back(host, report.snapshot, tmp_path / "no")
        bring_back(reopen(repo), report.snapshot, tmp_path / "t")
        assert repo.check(1.0).clean
    assert describe(tmp_path / "t") == describe(source)

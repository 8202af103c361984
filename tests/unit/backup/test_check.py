from __future__ import annotations

import os
import random
from pathlib import Path

from tests.support.repositories import backup, bring_back, local, reopen
from tests.support.trees import describe

from lazarette.backup.archive import Outcome
from lazarette.backup.repository import check, prune, scrub, statistics
from lazarette.backup.repository.repository import Repository


def _fill(folder: Path, seed: int = 1, files: int = 40) -> None:
    chance = random.Random(seed)
    folder.mkdir(exist_ok=True)
    for number in range(files):
        below = folder / f"d{number % 5}"
        below.mkdir(exist_ok=True)
        (below / f"f{number}").write_bytes(chance.randbytes(chance.choice((100, 5000, 900_000))))
    (folder / "big").write_bytes(chance.randbytes(40 << 20))


def _packs(repo: Repository) -> list[Path]:
    root = Path(repo.store.url.removeprefix("file://")) / "packs"
    return sorted(
        (path for path in root.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def test_whole_repository_is_clean(tmp_path: Path) -> None:
    _fill(tmp_path / "source")
    with local(tmp_path) as repo:
        record = backup(repo, tmp_path / "source").snapshot
        report = check.run(repo.store, repo.crypt, 1.0)
        assert report.clean and report.snapshots == 1
        assert report.packs_read == report.packs >= 3
        assert report.unused_packs == []
        assert scrub.run(repo.store).clean
        stats = statistics.run(reopen(repo))
        (one,) = stats.snapshots
        assert one.snapshot == record.id
        assert stats.used <= stats.stored
        assert one.exclusive == one.referenced == stats.volumes["v"]


def test_damage_is_found_named_and_kept_out_of_restores(tmp_path: Path) -> None:
    """Case A16: cut, emptied, flipped and deleted packs."""
    source = tmp_path / "source"
    _fill(source)
    with local(tmp_path, cache=False) as repo:
        record = backup(repo, source).snapshot
        cut, emptied, flipped, deleted = _packs(repo)[-4:]
        os.truncate(cut, cut.stat().st_size // 2)
        os.truncate(emptied, 0)
        data = bytearray(flipped.read_bytes())
        data[len(data) // 2] ^= 1
        flipped.write_bytes(data)
        deleted.unlink()
        fresh = reopen(repo)
        report = check.run(fresh.store, fresh.crypt, 1.0)
        named = {problem.object.rpartition("/")[2] for problem in report.problems}
        assert named == {path.name for path in (cut, emptied, flipped, deleted)}
        assert report.affected_snapshots == [record.id]
        keyless = {name.rpartition("/")[2] for name, _ in scrub.run(fresh.store).damaged}
        assert keyless == {path.name for path in (cut, emptied, flipped)}
        done = bring_back(fresh, record, tmp_path / "target")
        assert done.outcome is Outcome.WARNINGS
        lost = {entry.path for entry in done.damaged}
        assert lost == {entry.path for entry in report.affected}
        before, after = describe(source), describe(tmp_path / "target")
        assert before.keys() - after.keys() == lost
        assert all(after[path] == before[path] for path in after)


def test_structure_check_finds_a_missing_pack_without_reading(tmp_path: Path) -> None:
    _fill(tmp_path / "source")
    with local(tmp_path, cache=False) as repo:
        record = backup(repo, tmp_path / "source").snapshot
        _packs(repo)[-1].unlink()
        report = check.run(repo.store, repo.crypt)
        assert not report.clean and report.packs_read == 0
        assert report.affected_snapshots == [record.id] and report.affected


def test_prune_frees_what_is_forgotten_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    _fill(source)
    with local(tmp_path) as repo:
        first = backup(repo, source).snapshot
        (source / "big").write_bytes(random.Random(9).randbytes(20 << 20))
        (source / "d1" / "f1").unlink()
        second = backup(repo, source, first).snapshot
        before = sum(path.stat().st_size for path in _packs(repo))
        repo.forget([first.id])
        planned = prune.run(repo, prune.PruneOptions(dry_run=True))
        assert sum(path.stat().st_size for path in _packs(repo)) == before
        done = prune.run(repo)
        assert done.bytes_freed == planned.bytes_freed > 30 << 20
        after = sum(path.stat().st_size for path in _packs(repo))
        assert before - after >= done.bytes_freed * 0.95
        assert check.run(repo.store, repo.crypt, 1.0).clean
        again = prune.run(reopen(repo))
        assert (again.packs_deleted, again.packs_rewritten) == (0, 0)
        report = bring_back(repo, second, tmp_path / "target")
        assert report.outcome is Outcome.OK
        assert describe(tmp_path / "target") == describe(source)
        third = backup(repo, source, second).snapshot
        assert third.stats.bytes_sent == 0


def test_prune_deletes_what_a_killed_run_left(tmp_path: Path) -> None:
    source = tmp_path / "source"
    _fill(source)
    with local(tmp_path, cache=False) as repo:
        backup(repo, source)
        packs = len(_packs(repo))
        for info in list(repo.store.list("index/")):
            repo.store.delete(info.name)
        for snapshot in repo.snapshots():
            repo.forget([snapshot.id])
        done = prune.run(reopen(repo))
        assert done.packs_orphaned == done.packs_deleted == packs
        assert _packs(repo) == []

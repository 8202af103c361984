"""What the store does to a backup ends in one clear error or in a retry, and loses nothing."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from tests.support.repositories import backup, bring_back, create
from tests.support.trees import describe

from lazarette.backup.archive import ArchiveReport
from lazarette.backup.repository.repository import Repository
from lazarette.backup.stores.faults import Fault, FaultKind, FaultStore
from lazarette.backup.stores.local import LocalStore
from lazarette.backup.stores.retry import RetryStore
from lazarette.storage.clock import SystemClock
from lazarette.storage.errors import LazaretteError, NoSpace, Unauthenticated

POINTS = int(os.environ.get("LAZ_TEST_FAULT_POINTS", "10"))


def _source(tmp_path: Path, chance: random.Random) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(4):
        (source / f"f{number}").write_bytes(chance.randbytes(12 << 20))
    return source


def _with(repo: Repository, faults: FaultStore, retry: bool) -> Repository:
    store = RetryStore(faults, repo.clock) if retry else faults
    return Repository.open(store, repo.keys, repo.clock)


def _verify(repo: Repository, source: Path, report: ArchiveReport, target: Path) -> None:
    fresh = Repository.open(repo.store, repo.keys, repo.clock)
    assert fresh.check(1.0).clean
    assert bring_back(fresh, report.snapshot, target).damaged == ()
    assert describe(target) == describe(source)


@pytest.mark.parametrize("kind", [FaultKind.NO_SPACE, FaultKind.EXPIRED])
@pytest.mark.timeout(max(300, 20 * POINTS))
def test_final_faults_end_the_run_and_the_next_goes_on(tmp_path: Path, kind: FaultKind) -> None:
    chance = random.Random(kind.value)
    source = _source(tmp_path, chance)
    (tmp_path / "store").mkdir()
    store = LocalStore(str(tmp_path / "store"))
    repo = create(store)
    failed = 0
    for point in range(POINTS):
        faults = FaultStore(store, [Fault(kind, ("put", "replace"), skip=point, times=10**6)])
        try:
            backup(_with(repo, faults, False), source)
        except (NoSpace, Unauthenticated):
            failed += 1
        except LazaretteError as other:
            raise AssertionError(f"point {point}: {other!r}") from other
        assert Repository.open(store, repo.keys, repo.clock).check(0.0).problems == []
    assert failed >= min(POINTS, 5)
    _verify(repo, source, backup(repo, source), tmp_path / "target")
    store.close()


@pytest.mark.parametrize(
    "kind",
    [FaultKind.UNAVAILABLE, FaultKind.SLOW_DOWN, FaultKind.LOST_REPLY, FaultKind.HALF_STORED],
)
def test_passing_faults_are_retried(tmp_path: Path, kind: FaultKind) -> None:
    chance = random.Random(kind.value)
    source = _source(tmp_path, chance)
    (tmp_path / "store").mkdir()
    store = LocalStore(str(tmp_path / "store"))
    repo = create(store)
    faults = FaultStore(store, [Fault(kind, ("put",), "packs/", skip=skip) for skip in (0, 1, 2)])
    report = backup(_with(repo, faults, True), source)
    faults.check_fired()
    _verify(repo, source, report, tmp_path / "target")
    store.close()


@pytest.mark.parametrize("kind", [FaultKind.TRUNCATED, FaultKind.FLIPPED])
def test_wrong_bytes_never_reach_a_file(tmp_path: Path, kind: FaultKind) -> None:
    chance = random.Random(kind.value)
    source = _source(tmp_path, chance)
    (tmp_path / "store").mkdir()
    store = LocalStore(str(tmp_path / "store"))
    repo = create(store)
    report = backup(repo, source)
    faults = FaultStore(store, [Fault(kind, ("get",), "packs/", skip=3, times=2)])
    done = bring_back(
        Repository.open(faults, repo.keys, SystemClock()), report.snapshot, tmp_path / "t"
    )
    faults.check_fired()
    before, after = describe(source), describe(tmp_path / "t")
    lost = {entry.path for entry in done.damaged}
    assert before.keys() - after.keys() == lost
    assert all(after[path] == before[path] for path in after)
    store.close()

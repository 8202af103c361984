"""Chunks named by the hashes of their pages: what a record of changes then saves, and when not."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.repositories import backup, bring_back, create, local, reopen
from tests.support.trees import describe

from lazarette.backup import copying
from lazarette.backup.repository import keys, repair
from lazarette.backup.repository.entries import Extra
from lazarette.backup.repository.format import PAGE, PAGED_VERSION, VERSION
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.stores.local import LocalStore
from lazarette.backup.tree import TreeReader
from lazarette.storage.changes import ByteRange, Change, ChangeKind
from lazarette.storage.clock import SystemClock

SIZE = 8 << 20


def _write(table: Path, chance: random.Random, pages: list[int]) -> Iterator[Change]:
    """Write into pages of a file; the record of it."""
    with open(table, "r+b") as file:
        for page in pages:
            file.seek(page * PAGE + chance.randrange(PAGE - 50))
            file.write(chance.randbytes(50))
    ranges = tuple(ByteRange(page * PAGE, PAGE) for page in pages)
    return iter([Change(ChangeKind.MODIFIED, table.name.encode(), None, ranges)])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "16384"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def _extra(repo: Repository, snapshot: SnapshotRecord) -> Extra:
    repo.refresh()
    extra = TreeReader(repo.reader, snapshot).lookup(b"16384").extra
    assert extra is not None
    return extra


def _same(repo: Repository, snapshot: SnapshotRecord, source: Path, target: Path) -> None:
    bring_back(reopen(repo), snapshot, target)
    assert describe(target) == describe(source)


def test_scattered_pages_are_all_that_is_read(tmp_path: Path, table: Path) -> None:
    chance = random.Random(2)
    with local(tmp_path) as repo:
        last = backup(repo, table.parent).snapshot
        for round_ in range(3):
            pages = sorted(chance.sample(range(SIZE // PAGE), 60))
            repo = reopen(repo)
            report = backup(repo, table.parent, last, changes=_write(table, chance, pages))
            assert report.by_changes
            # Where more than half the pages of a block are new, the block is read.
            assert report.stats.bytes_read <= 1.2 * 60 * PAGE
            assert report.stats.bytes_sent <= 1.2 * 60 * PAGE + 20_000
            last = report.snapshot
            _same(repo, last, table.parent, tmp_path / f"t{round_}")
        whole = backup(reopen(repo), table.parent)
        assert whole.stats.bytes_read == SIZE
        assert whole.stats.bytes_new < 10_000, "a full compare names the blocks alike"
        assert repo.check(1.0).clean


def test_a_file_that_grows_or_shrinks_beside_the_pages_written(tmp_path: Path, table: Path) -> None:
    chance = random.Random(3)
    with local(tmp_path) as repo:
        last = backup(repo, table.parent).snapshot
        for number, size in enumerate(
            (SIZE + 5 * PAGE, SIZE + 20 * PAGE, SIZE - 3 * PAGE, 300_000)
        ):
            with open(table, "r+b") as file:
                file.truncate(size)
            pages = sorted(chance.sample(range(size // PAGE), 10))
            changes = list(_write(table, chance, pages))
            # A record names what a file grew by; what it shrank to is in the inode.
            grown = ByteRange(SIZE, size - SIZE) if size > SIZE else ByteRange(size, 0)
            (change,) = changes
            assert change.ranges is not None
            ranges = tuple(sorted((*change.ranges, grown), key=lambda one: one.offset))
            changes = [Change(ChangeKind.MODIFIED, b"16384", None, ranges)]
            last = backup(reopen(repo), table.parent, last, changes=iter(changes)).snapshot
            _same(repo, last, table.parent, tmp_path / f"t{number}")
        assert repo.check(1.0).clean


def test_without_the_hashes_whole_blocks_are_read(tmp_path: Path, table: Path) -> None:
    chance = random.Random(4)
    with local(tmp_path) as repo:
        first = backup(repo, table.parent).snapshot
        assert repo.cache_dir is not None
        (repo.cache_dir / "pages.sqlite").unlink()
        changes = _write(table, chance, [8, 80])
        report = backup(reopen(repo), table.parent, first, changes=changes)
        assert report.stats.bytes_read == 2 * (64 << 10)
        _same(repo, report.snapshot, table.parent, tmp_path / "target")


def test_hashes_of_another_block_are_not_believed(tmp_path: Path, table: Path) -> None:
    """The map proves itself against the id of the block it is of."""
    chance = random.Random(5)
    with local(tmp_path) as repo:
        first = backup(repo, table.parent).snapshot
        assert repo.cache_dir is not None
        with sqlite3.connect(repo.cache_dir / "pages.sqlite") as db:
            rows = db.execute("SELECT chunk, map FROM maps").fetchall()
            turned = rows[1:] + rows[:1]
            db.executemany(
                "UPDATE maps SET map = ? WHERE chunk = ?",
                [(other[1], row[0]) for row, other in zip(rows, turned, strict=True)],
            )
        db.close()
        changes = _write(table, chance, [8, 80])
        report = backup(reopen(repo), table.parent, first, changes=changes)
        assert report.stats.bytes_read == 2 * (64 << 10)
        _same(repo, report.snapshot, table.parent, tmp_path / "target")
        assert repo.check(1.0).clean


def test_a_record_that_lacks_something_is_made_good_by_a_compare(
    tmp_path: Path, table: Path
) -> None:
    chance = random.Random(6)
    with local(tmp_path) as repo:
        first = backup(repo, table.parent).snapshot
        _write(table, chance, [11])
        # The same block, but the record names another page of it.
        second = backup(repo, table.parent, first, changes=_write(table, chance, [12])).snapshot
        bring_back(repo, second, tmp_path / "stale")
        assert describe(tmp_path / "stale") != describe(table.parent)
        whole = backup(reopen(repo), table.parent)
        assert whole.stats.bytes_read == SIZE
        assert whole.stats.bytes_new <= (64 << 10) + 10_000, "one block is another"
        _same(repo, whole.snapshot, table.parent, tmp_path / "target")


def test_a_repository_of_version_1_stays_one_until_it_is_migrated(
    tmp_path: Path, table: Path
) -> None:
    chance = random.Random(7)
    (tmp_path / "store").mkdir()
    store = LocalStore(str(tmp_path / "store"))
    material = keys.create(store, [keys.KeyFile.generate()])
    repo = Repository.create(
        store, material, SystemClock(), tmp_path / "cache", version=PAGED_VERSION - 1
    )
    last = backup(reopen(repo), table.parent).snapshot
    assert not _extra(repo, last).paged
    report = backup(reopen(repo), table.parent, last, changes=_write(table, chance, [3]))
    assert report.stats.bytes_read == 64 << 10 and report.stats.bytes_sent < 20_000
    last = report.snapshot
    assert reopen(repo).config.version == 1
    assert repo.migrate() and not repo.migrate()
    repo = reopen(repo)
    assert repo.config.version == VERSION
    # The names of what is stored stay, or all of it would be stored again.
    report = backup(reopen(repo), table.parent, last, changes=_write(table, chance, [9, 100]))
    assert report.stats.bytes_sent < 40_000
    assert not _extra(repo, report.snapshot).paged
    _same(repo, report.snapshot, table.parent, tmp_path / "target")
    table.rename(table.with_name("old"))
    table.write_bytes(chance.randbytes(SIZE))
    newer = backup(reopen(repo), table.parent, report.snapshot).snapshot
    assert _extra(repo, newer).paged
    _same(repo, newer, table.parent, tmp_path / "both")
    assert repo.check(1.0).clean
    store.close()


@pytest.mark.parametrize("version", [1, 2])
def test_copies_take_the_names_their_repository_knows(
    tmp_path: Path, table: Path, version: int
) -> None:
    (tmp_path / "other").mkdir()
    other_store = LocalStore(str(tmp_path / "other"))
    material = keys.create(other_store, [keys.KeyFile.generate()])
    other = Repository.create(
        other_store, material, SystemClock(), tmp_path / "cache2", version=version
    )
    with local(tmp_path) as repo:
        first = backup(repo, table.parent).snapshot
        changes = _write(table, random.Random(8), [7, 77])
        second = backup(repo, table.parent, first, changes=changes).snapshot
        done = copying.run(repo, other, [first, second])
    assert _extra(other, done.copied[1]).paged is (version == VERSION)
    _same(other, done.copied[1], table.parent, tmp_path / "target")
    assert other.check(1.0).clean
    other_store.close()


def test_a_damaged_page_is_found_and_sent_again(tmp_path: Path, table: Path) -> None:
    with local(tmp_path) as repo:
        first = backup(repo, table.parent).snapshot
        pack = max((tmp_path / "store" / "packs").rglob("*"), key=lambda path: path.stat().st_size)
        damaged = bytearray(pack.read_bytes())
        damaged[2_000_000] ^= 1
        pack.chmod(0o600)
        pack.write_bytes(damaged)
        assert repo.check(1.0).lost_chunks
        done = repair.run(repo)
        assert done.chunks_lost and done.chunks_saved
        backup(reopen(repo), table.parent, first)
        assert repo.check(1.0).clean
        _same(repo, first, table.parent, tmp_path / "target")


def test_the_version_of_new_repositories(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    store = LocalStore(str(tmp_path / "store"))
    assert create(store).config.version == VERSION
    store.close()

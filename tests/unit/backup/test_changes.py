from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.support.edits import Editor
from tests.support.repositories import backup, bring_back, local, reopen
from tests.support.trees import describe

from lazarette.backup.archive import Outcome
from lazarette.backup.restore import Mode
from lazarette.backup.tree import TreeReader
from lazarette.storage import beneath
from lazarette.storage.changes import ByteRange, Change, ChangeKind, ChangesUnknown
from lazarette.storage.compare import everything, tree_changes
from lazarette.storage.refresh import copy_tree

random_edits = settings(
    max_examples=int(os.environ.get("LAZ_TEST_EXAMPLES", "4")),
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.timeout(1800)
@random_edits
@given(seed=st.integers(0, 2**32), steps=st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_any_edits_come_back_by_record_and_by_walk(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: list[int]
) -> None:
    tmp_path = tmp_path_factory.mktemp("edits")
    source = tmp_path / "source"
    source.mkdir()
    editor = Editor(source, random.Random(seed))
    for _ in range(15):
        editor.step()
    editor.take()
    with local(tmp_path) as repo:
        by_record = by_walk = backup(repo, source).snapshot
        for number, count in enumerate(steps):
            for _ in range(count):
                editor.step()
            report = backup(repo, source, by_record, changes=iter(editor.take()))
            assert report.by_changes
            by_record = report.snapshot
            again = backup(reopen(repo), source, by_walk)
            by_walk = again.snapshot
            assert report.stats.files == again.stats.files
            assert report.stats.entries == again.stats.entries
            assert report.stats.bytes_total == again.stats.bytes_total
            wanted = describe(source)
            for name, record in (("record", by_record), ("walk", by_walk)):
                target = tmp_path / f"{name}{number}"
                done = bring_back(reopen(repo), record, target)
                assert done.outcome is Outcome.OK
                assert describe(target) == wanted
            bring_back(repo, by_walk, tmp_path / "delta", mode=Mode.DELTA)
            assert describe(tmp_path / "delta") == wanted
        assert repo.check(1.0).clean
    shutil.rmtree(tmp_path)


@contextmanager
def _record(base: Path, target: Path) -> Iterator[Iterator[Change]]:
    """What a driver reports whose snapshots are copies."""
    with beneath.opened(base) as was, beneath.opened(target) as now:
        yield tree_changes(was, now, everything)


@pytest.mark.timeout(1800)
@random_edits
@given(seed=st.integers(0, 2**32), steps=st.lists(st.integers(1, 12), min_size=2, max_size=5))
def test_any_edits_come_back_from_snapshots_that_are_copies(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: list[int]
) -> None:
    tmp_path = tmp_path_factory.mktemp("copies")
    source = tmp_path / "source"
    source.mkdir()
    editor = Editor(source, random.Random(seed))
    for _ in range(15):
        editor.step()

    def snapshot(number: int) -> Path:
        target = tmp_path / f"copy{number}"
        target.mkdir()
        with beneath.opened(source) as reading, beneath.opened(target) as writing:
            copy_tree(reading, writing)
        return target

    with local(tmp_path) as repo:
        base = snapshot(0)
        known = backup(repo, base).snapshot
        for number, count in enumerate(steps, 1):
            for _ in range(count):
                editor.step()
            target = snapshot(number)
            wanted = describe(target)
            with _record(base, target) as changes:
                report = backup(repo, target, known, changes=changes, inodes_kept=False)
            assert report.by_changes
            known = report.snapshot
            assert report.stats.entries == len(wanted) - 1  # without the root
            bring_back(reopen(repo), known, tmp_path / f"back{number}")
            assert describe(tmp_path / f"back{number}") == wanted
            shutil.rmtree(base)  # so that the next copy gets the same inode numbers
            base = target
        assert repo.check(1.0).clean
    shutil.rmtree(tmp_path)


def test_names_that_two_like_files_exchanged_are_in_the_record(tmp_path: Path) -> None:
    trees = {"base": (("a", "b"), ("c", "d")), "target": (("a", "c"), ("b", "d"))}
    for name, pairs in trees.items():
        folder = tmp_path / name
        folder.mkdir()
        for one, other in pairs:
            (folder / one).write_bytes(b"same")
            (folder / other).hardlink_to(folder / one)
            os.utime(folder / one, ns=(1, 1))
        os.utime(folder, ns=(1, 1))
    with _record(tmp_path / "base", tmp_path / "target") as changes:
        assert {change.path for change in changes} == {b"a", b"b", b"c", b"d"}


def test_copies_read_only_what_changed(tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    (base / "folder").mkdir(parents=True)
    (base / "folder/table").write_bytes(random.Random(1).randbytes(64 << 20))
    shutil.copytree(base, target)
    with open(target / "folder/table", "r+b") as file:
        file.seek(33 << 20)
        file.write(b"changed")
    with local(tmp_path) as repo:
        known = backup(repo, base).snapshot
        with _record(base, target) as changes:
            report = backup(repo, target, known, changes=changes, inodes_kept=False)
        assert report.stats.bytes_read <= 4 << 20
        assert report.stats.bytes_total == 64 << 20
        bring_back(reopen(repo), report.snapshot, tmp_path / "back")
        assert describe(tmp_path / "back") == describe(target)


def _changes(*changes: Change) -> Iterator[Change]:
    return iter(changes)


def test_record_reads_only_what_changed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "table").write_bytes(random.Random(1).randbytes(64 << 20))
    for number in range(300):
        (source / f"f{number}").write_bytes(b"%d" % number)
    with local(tmp_path) as repo:
        first = backup(repo, source).snapshot
        with open(source / "table", "r+b") as file:
            for at in (1 << 20, 33 << 20):
                file.seek(at)
                file.write(b"y" * 8192)
        ranges = (ByteRange(1 << 20, 8192), ByteRange(33 << 20, 8192))
        report = backup(
            repo,
            source,
            first,
            changes=_changes(Change(ChangeKind.MODIFIED, b"table", None, ranges)),
        )
        assert report.by_changes and report.stats.files == 301
        assert report.stats.bytes_read == 2 * 8192
        bring_back(repo, report.snapshot, tmp_path / "target")
    assert describe(tmp_path / "target") == describe(source)


def test_lost_record_leads_to_a_full_compare(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"a")

    def broken() -> Iterator[Change]:
        yield Change(ChangeKind.MODIFIED, b"a", None, ())
        raise ChangesUnknown("generation 7 is gone")

    with local(tmp_path) as repo:
        first = backup(repo, source).snapshot
        (source / "b").write_bytes(b"b")
        report = backup(repo, source, first, changes=broken())
        assert not report.by_changes
        assert "generation 7" in report.warnings[0].text
        tree = TreeReader(repo.reader, report.snapshot)
        assert [entry.name for entry in tree.listing(tree.root)] == [b"a", b"b"]


def test_changed_inode_is_changed_under_all_its_names(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "d").mkdir(parents=True)
    (source / "one").write_bytes(b"before")
    os.link(source / "one", source / "d" / "two")
    with local(tmp_path) as repo:
        first = backup(repo, source).snapshot
        (source / "one").write_bytes(b"after!")
        change = Change(ChangeKind.MODIFIED, b"one", None, (ByteRange(0, 6),))
        report = backup(repo, source, first, changes=_changes(change))
        bring_back(repo, report.snapshot, tmp_path / "target")
    assert describe(tmp_path / "target") == describe(source)


def test_a_second_name_makes_the_first_one_a_link(tmp_path: Path) -> None:
    """The record has the new name only; the old one, alone so far, must join it."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "one").write_bytes(b"before")
    with local(tmp_path) as repo:
        first = backup(repo, source).snapshot
        os.link(source / "one", source / "two")
        (source / "two").write_bytes(b"after, and longer")
        added = Change(ChangeKind.ADDED, b"two")
        report = backup(repo, source, first, changes=_changes(added))
        bring_back(repo, report.snapshot, tmp_path / "target")
    after, wanted = describe(tmp_path / "target"), describe(source)
    assert {path: after[path] for path in (b"one", b"two")} == {
        path: wanted[path] for path in (b"one", b"two")
    }


def test_young_file_is_not_trusted(tmp_path: Path) -> None:
    """A write in the same tick as the snapshot leaves inode, size and times as they were."""
    source = tmp_path / "source"
    source.mkdir()
    path = source / "f"
    path.write_bytes(b"one")
    with local(tmp_path) as repo:
        first = backup(repo, source).snapshot
        status = path.stat()
        with open(path, "r+b") as file:
            file.write(b"two")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        again = backup(repo, source, first)
        assert again.stats.bytes_read == 3
        bring_back(repo, again.snapshot, tmp_path / "target")
    assert (tmp_path / "target" / "f").read_bytes() == b"two"


def test_gone_base_is_not_relied_on(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(random.Random(1).randbytes(1 << 20))
    with local(tmp_path) as repo:
        first = backup(repo, source).snapshot
        repo.forget([first.id])
        again = backup(repo, source, first, changes=_changes())
        assert not again.by_changes and again.stats.bytes_read == 1 << 20
        assert again.outcome is Outcome.WARNINGS

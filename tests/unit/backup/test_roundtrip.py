from __future__ import annotations

from pathlib import Path

from tests.support.repositories import backup, bring_back, local, reopen
from tests.support.trees import describe, every_kind

from lazarette.backup.archive import Outcome


def test_every_kind_comes_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    every_kind(source)
    before = describe(source)
    with local(tmp_path) as repo:
        report = backup(repo, source)
        assert report.warnings == ()
        again = backup(reopen(repo), source, report.snapshot)
        assert again.stats.bytes_read == 0 or again.stats.bytes_new == 0
        assert again.snapshot.root.content == report.snapshot.root.content
        done = bring_back(reopen(repo), again.snapshot, tmp_path / "target")
        assert (done.warnings, done.damaged, done.outcome) == ((), (), Outcome.OK)
    assert describe(tmp_path / "target") == before
    assert (tmp_path / "target" / "sparse").stat().st_blocks <= 2 * (
        source / "sparse"
    ).stat().st_blocks

"""The engine on a real S3 server: backup, incremental, check, prune, restore."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.repositories import backup, bring_back, create
from tests.support.s3 import S3Server, s3_bucket, s3_server  # noqa: F401
from tests.support.trees import describe, every_kind

from lazarette.backup.repository import prune, scrub
from lazarette.backup.repository.repository import Repository
from lazarette.backup.stores.open import open_store
from lazarette.storage.clock import SystemClock


def test_whole_life_on_s3(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:  # noqa: F811
    source = tmp_path / "source"
    source.mkdir()
    every_kind(source)
    (source / "table").write_bytes(random.Random(1).randbytes(20 << 20))
    store = open_store(s3_server.url(s3_bucket, "repo"), s3_server.credentials)
    repo = create(store, cache_dir=tmp_path / "cache")
    first = backup(repo, source).snapshot
    with open(source / "table", "r+b") as file:
        file.seek(5 << 20)
        file.write(b"changed")
    fresh = Repository.open(store, repo.keys, SystemClock(), tmp_path / "cache")
    second = backup(fresh, source, first)
    assert second.stats.bytes_sent < 100_000
    assert repo.check(1.0).clean and scrub.run(store).clean
    repo.forget([first.id])
    prune.run(repo, prune.PruneOptions(max_unused=0.0))
    assert repo.check(1.0).clean
    bare = Repository.open(store, repo.keys, SystemClock())
    assert bring_back(bare, second.snapshot, tmp_path / "t").damaged == ()
    assert describe(tmp_path / "t") == describe(source)
    store.close()

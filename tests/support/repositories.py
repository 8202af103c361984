"""Repositories for tests, with keys that cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazarette.backup import archive, restore
from lazarette.backup.repository import keys
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.stores.contract import BlobStore
from lazarette.backup.stores.local import LocalStore
from lazarette.storage.clock import Clock, SystemClock


def create(
    store: BlobStore, clock: Clock | None = None, cache_dir: Path | None = None
) -> Repository:
    """A new repository in a store."""
    clock = clock or SystemClock()
    material = keys.create(store, [keys.KeyFile.generate()], clock=clock)
    return Repository.create(store, material, clock, cache_dir)


def reopen(repo: Repository, store: BlobStore | None = None) -> Repository:
    """The same repository with an empty memory."""
    cache_dir = None if repo.cache_dir is None else repo.cache_dir.parent
    return Repository.open(store or repo.store, repo.keys, repo.clock, cache_dir)


@contextmanager
def local(folder: Path, cache: bool = True) -> Iterator[Repository]:
    """A new repository in a folder."""
    (folder / "store").mkdir()
    store = LocalStore(str(folder / "store"))
    try:
        yield create(store, cache_dir=folder / "cache" if cache else None)
    finally:
        store.close()


def backup(
    repo: Repository, root: Path, base: SnapshotRecord | None = None, **more: object
) -> archive.ArchiveReport:
    """A backup of a folder as volume ``v``."""
    source = archive.Source(root, "v", base, **more)  # type: ignore[arg-type]
    return archive.run(repo, source)


def bring_back(
    repo: Repository, snapshot: SnapshotRecord, target: Path, **options: object
) -> restore.RestoreReport:
    """A restore into a folder."""
    return restore.run(repo, snapshot, target, restore.RestoreOptions(**options))  # type: ignore[arg-type]

from __future__ import annotations

import os
from pathlib import Path

from tests.support.repositories import backup, local

from lazarette.backup.repository import retention
from lazarette.backup.stores.wrapper import StoreWrapper


class Locks(StoreWrapper):
    """Remembers locks as a bucket with object lock does."""

    def __init__(self, inner: StoreWrapper) -> None:
        super().__init__(inner)
        self.until: dict[str, int] = {}

    def lock(self, name: str, until_ns: int) -> None:
        """See LockingStore."""
        self.until[name] = until_ns

    def locked_until(self, name: str) -> int:
        """See LockingStore."""
        return self.until.get(name, 0)


def test_locks_follow_what_is_needed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "old").write_bytes(os.urandom(20 << 20))
    with local(tmp_path) as repo:
        first = backup(repo, source).snapshot
        (source / "old").unlink()
        (source / "new").write_bytes(os.urandom(1 << 20))
        second = backup(repo, source, first).snapshot
        locks = Locks(repo.store)  # type: ignore[arg-type]
        done = retention.extend(repo, locks, 100, [second])
        assert done.kept == 0 and done.locked == len(locks.until)
        packs = [name for name in locks.until if name.startswith("packs/")]
        every = [info.name for info in repo.store.list("packs/")]
        assert len(packs) == 2 < len(every)
        assert {"config", f"snapshots/{second.id}"} <= locks.until.keys()
        assert f"snapshots/{first.id}" not in locks.until
        again = retention.extend(repo, locks, 100)
        assert again.kept == done.locked and again.locked == len(every) - 2 + 1

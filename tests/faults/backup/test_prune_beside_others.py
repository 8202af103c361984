"""Case A17 with the real code: backups, restores and prunes at once on one slow store."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.repositories import backup, bring_back, create
from tests.support.trees import describe

from lazarette.backup.archive import Source, run
from lazarette.backup.repository import prune
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.stores.contract import BlobInfo, BlobStore, Buffer
from lazarette.backup.stores.local import LocalStore
from lazarette.backup.stores.wrapper import StoreWrapper
from lazarette.storage.errors import InUse

ROUNDS = int(os.environ.get("LAZ_TEST_RACES", "8"))


class Sluggish(StoreWrapper):
    """Lets others go first, at random."""

    def __init__(self, inner: BlobStore, chance: random.Random) -> None:
        super().__init__(inner)
        self._chance = chance

    def _wait(self) -> None:
        time.sleep(self._chance.choice((0, 0, 0.001, 0.01)))

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        """See StoreWrapper."""
        self._wait()
        return super().put(name, data, if_absent=if_absent)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See StoreWrapper."""
        self._wait()
        return super().get(name, offset, length)

    def list(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See StoreWrapper."""
        self._wait()
        yield from super().list(prefix)

    def delete(self, name: str) -> None:
        """See StoreWrapper."""
        self._wait()
        super().delete(name)


@pytest.mark.timeout(max(300, 30 * ROUNDS))
def test_nothing_is_lost_whoever_goes_first(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        _round(folder, random.Random(seed + number))


def _round(folder: Path, chance: random.Random) -> None:
    source = folder / "source"
    source.mkdir()
    for number in range(30):
        (source / f"f{number}").write_bytes(chance.randbytes(chance.randrange(1, 200_000)))
    (folder / "store").mkdir()
    store = LocalStore(str(folder / "store"))
    repo = create(store)
    first = backup(repo, source).snapshot
    (source / "f3").write_bytes(b"other")
    second = backup(repo, source, first).snapshot
    state = describe(source)
    errors: list[BaseException] = []
    made: list[SnapshotRecord] = []

    def opened() -> Repository:
        return Repository.open(Sluggish(store, chance), repo.keys, repo.clock)

    def save() -> None:
        base = chance.choice((None, first, second))
        made.append(run(opened(), Source(source, "v", base)).snapshot)

    def forget_and_prune() -> None:
        mine = opened()
        mine.forget([first.id])
        for _ in range(2):
            try:
                prune.run(mine, prune.PruneOptions(max_unused=0.0))
            except InUse:
                time.sleep(0.01)

    def look() -> None:
        report = bring_back(opened(), second, folder / "restored")
        assert report.damaged == () and describe(folder / "restored") == state

    def guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as failed:  # noqa: BLE001 - shown by the test's own thread
            errors.append(failed)

    actions = [save, save, forget_and_prune, forget_and_prune, look]
    chance.shuffle(actions)
    threads = [threading.Thread(target=guarded, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
        time.sleep(chance.choice((0, 0.01, 0.05)))
    for thread in threads:
        thread.join()
    assert errors == []
    fresh = Repository.open(store, repo.keys, repo.clock)
    prune.run(fresh)
    assert fresh.check(1.0).problems == []
    assert not list(store.list("condemned/"))
    for number, record in enumerate(made):
        bring_back(fresh, record, folder / f"t{number}")
        assert describe(folder / f"t{number}") == state
    store.close()

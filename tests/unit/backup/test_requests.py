"""How often a far store is asked: each time costs a person's waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
from tests.support.repositories import backup

from lazarette.backup.repository import keys
from lazarette.backup.repository.repository import Repository
from lazarette.backup.stores.contract import BlobInfo, Buffer, StoreCapabilities
from lazarette.backup.stores.local import LocalStore
from lazarette.backup.stores.wrapper import StoreWrapper
from lazarette.storage.clock import SystemClock


class Counted(StoreWrapper):
    """A far store that notes what it is asked, and whether by the thread that made it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(LocalStore(str(folder)))
        self.asked: list[tuple[str, str, bool]] = []
        self._thread = threading.current_thread()

    @property
    def capabilities(self) -> StoreCapabilities:
        return msgspec.structs.replace(self.inner.capabilities, distant=True)

    def _note(self, what: str, name: str) -> None:
        self.asked.append((what, name, threading.current_thread() is self._thread))

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        self._note("put", name)
        return super().put(name, data, if_absent=if_absent)

    def replace(self, name: str, data: Buffer, tag: str) -> str:
        self._note("replace", name)
        return super().replace(name, data, tag)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self._note("get", name)
        return super().get(name, offset, length)

    def stat(self, name: str) -> BlobInfo:
        self._note("stat", name)
        return super().stat(name)

    def list(self, prefix: str = "") -> Iterator[BlobInfo]:
        self._note("list", prefix)
        return super().list(prefix)

    def delete(self, name: str) -> None:
        self._note("delete", name)
        super().delete(name)


def test_a_backup_that_finds_nothing_new_asks_little(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "store"
    source.mkdir()
    folder.mkdir()
    (source / "file").write_bytes(b"x" * 100_000)
    key = keys.KeyFile.generate()
    clock = SystemClock()
    bare = LocalStore(str(folder))
    made = Repository.create(bare, keys.create(bare, [key], clock=clock), clock, tmp_path / "cache")
    first = backup(made, source).snapshot
    store = Counted(folder)
    repo = Repository.unlock(store, key, clock, tmp_path / "cache")
    [known] = repo.snapshots()
    assert known.id == first.id
    backup(repo, source, known)
    repo.close()
    assert len(store.asked) <= 19, store.asked
    assert sum(first for _, _, first in store.asked) <= 14, "the others beside them"
    read = [name for what, name, _ in store.asked if what == "get"]
    assert not any(name.startswith(("index/", "snapshots/", "packs/")) for name in read)

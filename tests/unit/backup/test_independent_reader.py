from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from tests.support.repositories import backup
from tests.support.trees import describe, every_kind

from lazarette.backup.repository import keys
from lazarette.backup.repository.repository import Repository
from lazarette.backup.stores.local import LocalStore
from lazarette.storage import process
from lazarette.storage.clock import SystemClock

READER = Path(__file__).parents[3] / "tools" / "laz_reader.py"


def test_reader_without_the_engine_restores_everything(tmp_path: Path) -> None:
    """Packs, pages of parts, patches, holes and links, by key file and by passphrase."""
    source = tmp_path / "source"
    source.mkdir()
    every_kind(source)
    table = source / "table"
    table.write_bytes(random.Random(1).randbytes(70 << 20))
    (tmp_path / "store").mkdir()
    store = LocalStore(str(tmp_path / "store"))
    key = keys.KeyFile.generate()
    key.write(str(tmp_path / "key"))
    phrase = keys.Passphrase("correct horse")
    cheap = keys.PassphraseCost(memory_kib=64, passes=1, lanes=1)
    material = keys.create(store, [key, phrase], cost=cheap)
    repo = Repository.create(store, material, SystemClock(), tmp_path / "cache")
    first = backup(repo, source).snapshot
    for number in (3, 4000):
        with open(table, "r+b") as file:
            file.seek(number * 8192)
            file.write(b"changed")
    second = backup(repo, source, first)
    assert second.stats.bytes_sent < 1 << 20
    reader = [sys.executable, "-I", str(READER), str(tmp_path / "store")]
    listed = process.run([*reader, "--key-file", str(tmp_path / "key"), "list"]).stdout.decode()
    assert [line.split()[0] for line in listed.splitlines()] == [first.id, second.snapshot.id]
    target = tmp_path / "target"
    process.run(
        [*reader, "restore", second.snapshot.id[:8], str(target)],
        env={**os.environ, "LAZ_PASSPHRASE": "correct horse"},
    )
    assert describe(target) == describe(source)
    store.close()


def test_reader_shares_no_code() -> None:
    assert "lazarette." not in READER.read_text().replace("lazarette.py", "")

"""A backup in a process of its own, to be killed: ``worker.py STORE CACHE KEYFILE SOURCE``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lazarette.backup import archive
from lazarette.backup.repository import keys
from lazarette.backup.repository.repository import Repository
from lazarette.backup.stores.local import LocalStore
from lazarette.storage.clock import SystemClock


def main() -> None:
    store_folder, cache, key_file, source = sys.argv[1:]
    store = LocalStore(store_folder)
    repo = Repository.open(
        store, keys.unlock(store, keys.KeyFile.read(key_file)), SystemClock(), Path(cache)
    )
    known = repo.snapshots("v")
    base = known[-1] if known else None
    os.write(1, b"begin\n")
    report = archive.run(repo, archive.Source(Path(source), "v", base))
    os.write(1, b"%d" % report.stats.bytes_sent)


main()

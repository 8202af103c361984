"""One command of ours as a process of its own, as a person would run it.

``backup_run.py init|backup|record|restore|check REPO [SOURCE|TARGET] [RANGES]``
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from lazarette.storage.garbage import collect_seldom

collect_seldom()

from lazarette.backup.repository import keys  # noqa: E402
from lazarette.backup.repository.repository import Repository  # noqa: E402
from lazarette.backup.stores.open import open_store  # noqa: E402
from lazarette.storage.changes import ByteRange, Change, ChangeKind  # noqa: E402
from lazarette.storage.clock import SystemClock  # noqa: E402

KEY = keys.KeyFile(bytes(range(32)))


def _record(file: str) -> list[Change]:
    """Change record from JSON: ``[[path, kind, [[offset, length], …] or null], …]``."""
    return [
        Change(
            ChangeKind[kind.upper()],
            os.fsencode(path),
            None,
            None if ranges is None else tuple(ByteRange(*one) for one in ranges),
        )
        for path, kind, ranges in json.loads(Path(file).read_text())
    ]


def main() -> None:
    command, url, *rest = sys.argv[1:]
    clock = SystemClock()
    store = open_store(url)
    if command == "init":
        Repository.create(store, keys.create(store, [KEY], clock=clock), clock)
        return
    cache = Path(os.environ.get("LAZ_BENCH_CACHE", "/tmp/laz-bench-cache"))
    repo = Repository.unlock(store, KEY, clock, cache)
    known = repo.snapshots("bench")
    # What one command does not need it does not import, as in the command line itself.
    if command in ("backup", "record"):
        from lazarette.backup import archive

        changes = iter(_record(rest[1])) if command == "record" else None
        source = archive.Source(Path(rest[0]), "bench", known[-1] if known else None, changes)
        report = archive.run(repo, source)
        print(report.stats.bytes_read, report.stats.bytes_sent)
    elif command == "restore":
        from lazarette.backup import restore

        done = restore.run(repo, known[-1], Path(rest[0]))
        assert not done.damaged and not done.warnings
    else:
        assert repo.check(1.0).clean


if __name__ == "__main__":
    main()

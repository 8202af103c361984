"""Backing up: a folder becomes a snapshot.

Example::

    repo = Repository.open(store, keys, clock, cache_dir)
    report = archive.run(repo, Source(Path("/srv/data"), "data"), ArchiveOptions())
    report.snapshot.id
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from lazarette.backup import scan
from lazarette.backup.archive_changes import ChangedWalk, plan
from lazarette.backup.archive_run import Notice, Progress, Run, default_threads
from lazarette.backup.archive_walk import Walk
from lazarette.backup.repository.entries import Entry
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord, SnapshotStats, new_snapshot_id
from lazarette.backup.tree import TreeReader
from lazarette.storage.changes import Change, ChangesUnknown
from lazarette.storage.errors import SourceMissing

YOUNG_NS = 2_000_000_000
"""An inode changed less than this before the base snapshot is not trusted by its times:
timestamps move in ticks, on some filesystems of two seconds."""

__all__ = [
    "ArchiveOptions",
    "ArchiveReport",
    "Outcome",
    "Progress",
    "Source",
    "run",
]


@dataclass(frozen=True)
class Source:
    """What to back up.

    Attributes:
        root: the folder; for a volume with snapshots, the view of one.
        volume: name under which snapshots are filed.
        base_snapshot: what to compare with; None reads everything.
        changes: what differs from ``base_snapshot``; None compares inode, size and times.
        instant_ns: the instant ``root`` shows, wall clock; 0 stands for now, for a tree in use.
        consistency: how it was held still, recorded in the snapshot.
        meta: definitions to keep with the data, JSON.
    """

    root: Path
    volume: str
    base_snapshot: SnapshotRecord | None = None
    changes: Iterator[Change] | None = None
    instant_ns: int = 0
    consistency: str = "not consistent"
    meta: bytes = b""


@dataclass(frozen=True)
class ArchiveOptions:
    """How to back up.

    Attributes:
        host: recorded; this machine's name when empty.
        tags: labels recorded.
        threads: workers; 0 for as many as CPUs.
        allow_empty: an empty folder may follow a snapshot with files in it (case A36).
        shrink_warning: warn when less than this share of the base's bytes or files is left.
        delete_after_ns: recorded: not to be forgotten before.
    """

    host: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    threads: int = 0
    allow_empty: bool = False
    shrink_warning: float = 0.5
    delete_after_ns: int = 0


class Outcome(Enum):
    """How a backup or restore ended."""

    OK = "ok"
    WARNINGS = "warnings"


@dataclass(frozen=True)
class ArchiveReport:
    """What a backup did.

    Attributes:
        snapshot: the new snapshot.
        outcome: whether all was saved as it should.
        warnings: what was not.
        by_changes: the record of changes was used.
    """

    snapshot: SnapshotRecord
    outcome: Outcome
    warnings: tuple[Notice, ...]
    by_changes: bool

    @property
    def stats(self) -> SnapshotStats:
        """Sizes; see :class:`SnapshotStats`."""
        return self.snapshot.stats


def _ignore(progress: Progress) -> None:
    del progress


def _never() -> bool:
    return False


def run(
    repo: Repository,
    source: Source,
    options: ArchiveOptions | None = None,
    progress: Callable[[Progress], None] = _ignore,
    cancelled: Callable[[], bool] = _never,
) -> ArchiveReport:
    """Make a snapshot of a folder.

    Args:
        repo: where to.
        source: what.
        options: how.
        progress: called up to ten times a second.
        cancelled: asked as often; what was sent by then serves the next run.

    Raises:
        SourceMissing: the folder is absent, or empty though it was not before (case A36).
        Cancelled: as asked.
        StoreUnavailable, NoSpace, …: the store failed; no snapshot was written.
    """
    _allow_many_files()
    started = repo.clock.now_ns()
    steady = repo.clock.monotonic_ns()
    root = scan.open_root(source.root)
    base = source.base_snapshot
    work = Run(
        repo,
        (options or ArchiveOptions()).threads or default_threads(),
        _trusted_before(base),
        progress,
        cancelled,
    )
    try:
        _refuse_empty(root, source, options or ArchiveOptions())
        entry, by_changes = _save(repo, work, source, root)
        work.stop()
        ingested = work.ingest.finish()
    except BaseException:
        work.stop()
        work.ingest.abort()
        raise
    finally:
        os.close(root)
    _warn_shrunk(work, source, options or ArchiveOptions())
    record = SnapshotRecord(
        id=new_snapshot_id(),
        time_ns=source.instant_ns or started,
        started_ns=started,
        host=(options or ArchiveOptions()).host or socket.gethostname(),
        volume=source.volume,
        root=entry,
        tags=dict((options or ArchiveOptions()).tags),
        consistency=source.consistency,
        stats=SnapshotStats(
            files=work.files,
            entries=work.entries,
            bytes_total=work.bytes_total,
            bytes_read=work.bytes_read,
            bytes_new=ingested.bytes_new,
            bytes_sent=ingested.bytes_sent,
            warnings=len(work.warnings),
            duration_ns=repo.clock.monotonic_ns() - steady,
        ),
        meta=source.meta,
        parent=None if base is None else base.id,
        program="lazarette",
        delete_after_ns=(options or ArchiveOptions()).delete_after_ns,
    )
    repo.commit(record)
    outcome = Outcome.WARNINGS if work.warnings else Outcome.OK
    return ArchiveReport(record, outcome, tuple(work.warnings), by_changes)


def _trusted_before(base: SnapshotRecord | None) -> int:
    if base is None:
        return 0
    return min(base.time_ns, base.started_ns) - YOUNG_NS


def _save(repo: Repository, work: Run, source: Source, root: int) -> tuple[Entry, bool]:
    mounts = scan.mounts_beneath(source.root)
    base = source.base_snapshot
    reader = None if base is None else TreeReader(repo.reader, base)
    if base is not None and reader is not None and source.changes is not None:
        try:
            changed = plan(source.changes, root, reader)
        except ChangesUnknown as lost:
            work.warn(b"", f"the record of changes is lost, all files are compared: {lost}")
        else:
            with closing(ChangedWalk(work, reader, mounts)) as walk:
                return walk.apply(os.dup(root), base, changed), True
    with closing(Walk(work, reader, mounts)) as whole:
        return whole.whole(os.dup(root), None if base is None else base.root), False


def _refuse_empty(root: int, source: Source, options: ArchiveOptions) -> None:
    base = source.base_snapshot
    if base is None or options.allow_empty or not base.root.content:
        return
    with os.scandir(root) as listing:
        if next(listing, None) is None:
            raise SourceMissing(
                f"source {source.root} is empty, but was not in snapshot {base.id[:12]}",
                hint="check that it is mounted; allow an empty source if it is meant",
            )


def _warn_shrunk(work: Run, source: Source, options: ArchiveOptions) -> None:
    base = source.base_snapshot
    if base is None:
        return
    for what, now, before in (
        ("files", work.files, base.stats.files),
        ("bytes", work.bytes_total, base.stats.bytes_total),
    ):
        if now < before * options.shrink_warning:
            work.warn(b"", f"only {now} of {before} {what} of the snapshot before are left")


def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

"""Backing up: a folder becomes a snapshot.

Example::

    repo = Repository.open(store, keys, clock, cache_dir)
    report = archive.run(repo, Source(Path("/srv/data"), "data"), ArchiveOptions())
    report.snapshot.id
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import closing
from enum import Enum
from pathlib import Path

import msgspec

from lazarette.backup import native, scan
from lazarette.backup.archive_changes import ChangedWalk, plan
from lazarette.backup.archive_run import Notice, Progress, Run, default_threads
from lazarette.backup.archive_walk import Walk
from lazarette.backup.repository import lost, marks, snapshots
from lazarette.backup.repository.chunks import ChunkReader
from lazarette.backup.repository.entries import Entry
from lazarette.backup.repository.format import RepositoryDamaged
from lazarette.backup.repository.guard import Guard, Kind, LeaseLost
from lazarette.backup.repository.ingest import IngestStats
from lazarette.backup.repository.references import References
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord, SnapshotStats, new_snapshot_id
from lazarette.backup.stores.ahead import ahead
from lazarette.backup.stores.contract import BlobNotFound
from lazarette.backup.stores.limit import Bucket, Rate, unlimited
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


class Source(msgspec.Struct, frozen=True):
    """What to back up.

    Attributes:
        root: the folder; for a volume with snapshots, the view of one.
        volume: name under which snapshots are filed.
        base_snapshot: what to compare with; None reads everything.
        changes: what differs from ``base_snapshot``; None compares inode, size and times.
        inodes_kept: inodes have the numbers they had in ``base_snapshot`` (rule C6 of
            :mod:`lazarette.storage.changes`).
        instant_ns: the instant ``root`` shows, wall clock; 0 stands for now, for a tree in use.
        consistency: how it was held still, recorded in the snapshot.
        meta: definitions to keep with the data, JSON.
    """

    root: Path
    volume: str
    base_snapshot: SnapshotRecord | None = None
    changes: Iterator[Change] | None = None
    inodes_kept: bool = True
    instant_ns: int = 0
    consistency: str = "not consistent"
    meta: bytes = b""


class ArchiveOptions(msgspec.Struct, frozen=True):
    """How to back up.

    Attributes:
        host: recorded; this machine's name when empty.
        tags: labels recorded.
        threads: workers; 0 for as many as CPUs.
        allow_empty: an empty folder may follow a snapshot with files in it (case A36).
        shrink_warning: warn when less than this share of the base's bytes or files is left.
        delete_after_ns: recorded: not to be forgotten before.
        read: bytes a second read from the source, at each moment.
    """

    host: str = ""
    tags: dict[str, str] = {}
    threads: int = 0
    allow_empty: bool = False
    shrink_warning: float = 0.5
    delete_after_ns: int = 0
    read: Rate = unlimited


class Outcome(Enum):
    """How a backup or restore ended."""

    OK = "ok"
    WARNINGS = "warnings"


class ArchiveReport(msgspec.Struct, frozen=True):
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
    options = options or ArchiveOptions()
    _allow_many_files()
    native.keep_memory()
    with repo.guard.hold(Kind.ADD, f"backup of {source.volume}") as guard:
        return _Backup(repo, source, options, guard, progress, cancelled).run()


class _Backup:
    """One backup under its lease.

    The order of the first steps matters, see :mod:`lazarette.backup.repository.prune`: lease,
    marks of condemned packs, index, and only then whether the base is still there.
    """

    def __init__(
        self,
        repo: Repository,
        source: Source,
        options: ArchiveOptions,
        guard: Guard,
        progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._repo = repo
        self._source = source
        self._options = options
        self._guard = guard
        self._started = repo.clock.now_ns()
        self._steady = repo.clock.monotonic_ns()
        self._root = scan.open_root(source.root)
        noted = ahead(repo.store, lambda: lost.load(repo.store, repo.crypt))
        self._condemned = marks.packs(repo.store, repo.crypt)
        self._ingest = repo.ingest(self._condemned, guard=guard)
        self._base = self._usable_base()
        self._lost = lost.still(repo.store, noted(), self._ingest.index)
        self._work = Run(
            repo,
            self._ingest,
            options.threads or default_threads(),
            _trusted_before(self._base),
            self._lost,
            progress,
            cancelled,
        )
        if options.read is not unlimited:
            self._work.paced(Bucket(repo.clock, options.read).take)

    def run(self) -> ArchiveReport:
        """Read, store, commit."""
        work = self._work
        try:
            self._refuse_empty()
            if self._base is not self._source.base_snapshot:
                work.warn(b"", "the snapshot to compare with is gone, everything is read")
            entry, by_changes = self._save()
            work.stop()
            ingested = self._ingest.finish()
        except BaseException:
            work.stop()
            self._ingest.abort()
            raise
        finally:
            os.close(self._root)
            work.close()
        self._warn_shrunk()
        record = self._record(entry, ingested)
        self._commit(record)
        outcome = Outcome.WARNINGS if work.warnings else Outcome.OK
        return ArchiveReport(record, outcome, tuple(work.warnings), by_changes)

    def _usable_base(self) -> SnapshotRecord | None:
        """The base, if all it refers to will stay (see the prune protocol)."""
        base = self._source.base_snapshot
        if base is None:
            return None
        try:
            self._repo.store.stat(snapshots.name_of(base.id))
            if not self._condemned:
                return base
            for _, ids in References(self._repo.reader).of(base.root):
                if not all(self._ingest.index.known(ids)):
                    return None
        except (BlobNotFound, RepositoryDamaged):
            return None
        return base

    def _record(self, entry: Entry, ingested: IngestStats) -> SnapshotRecord:
        work, source, options = self._work, self._source, self._options
        return SnapshotRecord(
            id=new_snapshot_id(),
            time_ns=source.instant_ns or self._started,
            started_ns=self._started,
            host=options.host or os.uname().nodename,
            volume=source.volume,
            root=entry,
            tags=dict(options.tags),
            consistency=source.consistency,
            stats=SnapshotStats(
                files=work.files,
                entries=work.entries,
                bytes_total=work.bytes_total,
                bytes_read=work.bytes_read,
                bytes_new=ingested.bytes_new,
                bytes_sent=ingested.bytes_sent,
                warnings=len(work.warnings),
                duration_ns=self._repo.clock.monotonic_ns() - self._steady,
            ),
            meta=source.meta,
            parent=None if self._base is None else self._base.id,
            program="lazarette",
            delete_after_ns=options.delete_after_ns,
        )

    def _commit(self, record: SnapshotRecord) -> None:
        """Write the snapshot; take it back if the lease ran out and something is gone."""
        self._guard.confirm()
        self._repo.commit(record)
        try:
            self._guard.check()
        except LeaseLost:
            if not self._holds(record):
                self._repo.forget([record.id])
                raise

    def _holds(self, record: SnapshotRecord) -> bool:
        """Whether index objects list all the snapshot refers to; marks do not count."""
        listed = self._repo.listed()
        reader = ChunkReader(self._repo.store, self._repo.crypt, listed)
        try:
            return all(all(listed.known(ids)) for _, ids in References(reader).of(record.root))
        except RepositoryDamaged:
            return False

    def _save(self) -> tuple[Entry, bool]:
        source, work, base = self._source, self._work, self._base
        mounts = scan.mounts_beneath(source.root)
        reader = None if base is None else TreeReader(self._repo.reader, base)
        whole_record = source.changes is not None and not self._lost
        if base is not None and reader is not None and whole_record:
            assert source.changes is not None
            try:
                changed = plan(source.changes, self._root, reader, source.inodes_kept)
            except ChangesUnknown as unknown:
                work.warn(b"", f"the record of changes is lost, all files are compared: {unknown}")
            else:
                following = ChangedWalk(work, reader, mounts, source.inodes_kept)
                with closing(following) as walk:
                    return walk.apply(os.dup(self._root), base, changed), True
        with closing(Walk(work, reader, mounts)) as whole:
            return whole.whole(os.dup(self._root), None if base is None else base.root), False

    def _refuse_empty(self) -> None:
        base = self._source.base_snapshot
        if base is None or self._options.allow_empty or not base.root.content:
            return
        with os.scandir(self._root) as listing:
            if next(listing, None) is None:
                raise SourceMissing(
                    f"source {self._source.root} is empty, but was not in snapshot {base.id[:12]}",
                    hint="check that it is mounted; allow an empty source if it is meant",
                )

    def _warn_shrunk(self) -> None:
        base, work = self._base, self._work
        if base is None:
            return
        for what, now, before in (
            ("files", work.files, base.stats.files),
            ("bytes", work.bytes_total, base.stats.bytes_total),
        ):
            if now < before * self._options.shrink_warning:
                work.warn(b"", f"only {now} of {before} {what} of the snapshot before are left")


def _trusted_before(base: SnapshotRecord | None) -> int:
    if base is None:
        return 0
    return min(base.time_ns, base.started_ns) - YOUNG_NS


def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

"""Restoring: a snapshot becomes files.

Example::

    report = restore.run(repo, repo.snapshot("latest"), Path("/srv/data"))
    report.outcome, report.damaged
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import msgspec

from lazarette.backup import native
from lazarette.backup.archive import Outcome
from lazarette.backup.archive_run import Notice, default_threads
from lazarette.backup.repository.entries import Kind as InodeKind
from lazarette.backup.repository.guard import Kind
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.restore_content import Writer
from lazarette.backup.restore_metadata import Metadata, OwnerMap, loosen
from lazarette.backup.restore_selection import Selection
from lazarette.backup.restore_walk import RestoreWalk
from lazarette.backup.stores.ahead import ahead
from lazarette.backup.tree import PathNotFound, TreeReader
from lazarette.storage.errors import Cancelled, Conflict

__all__ = [
    "Damaged",
    "Mode",
    "OwnerMap",
    "RestoreOptions",
    "RestoreProgress",
    "RestoreReport",
    "run",
]

_REPORT_EVERY_NS = 100_000_000


class TargetNotEmpty(Conflict):
    """A fresh restore was asked for into a folder that holds something."""

    number = 224
    exit_code = 34


class Mode(Enum):
    """What may be in the target already.

    ``FRESH``: nothing.  ``MERGE``: what is recorded is written over, the rest stays.
    ``DELTA``: the target becomes what was recorded; what is the same already is not written.
    ``MERGE`` and ``DELTA`` also finish a restore that was interrupted.
    """

    FRESH = "fresh"
    MERGE = "merge"
    DELTA = "delta"


class RestoreOptions(msgspec.Struct, frozen=True):
    """How to restore.

    Attributes:
        include: paths relative to the volume's root, with all beneath them; empty for all.
        strip: folder in the snapshot whose content goes straight into the target.
        mode: what may be in the target.
        owners: other owners.
        keep_damaged: keep files with lost chunks, with holes in their place; else they are left
            out.  They are listed either way.
        root_metadata: the target gets the metadata of the volume's root.
        threads: workers; 0 for as many as CPUs.
        known: with ``DELTA``, a snapshot the target is exactly like: what both have in common is
            neither fetched nor looked at.
    """

    include: tuple[bytes, ...] = ()
    strip: bytes = b""
    mode: Mode = Mode.FRESH
    owners: OwnerMap = msgspec.field(default_factory=OwnerMap)
    keep_damaged: bool = False
    root_metadata: bool = True
    threads: int = 0
    known: SnapshotRecord | None = None


class RestoreProgress(msgspec.Struct, frozen=True):
    """How far a restore is."""

    files: int
    bytes_total: int
    bytes_written: int
    path: bytes


class Damaged(msgspec.Struct, frozen=True):
    """A file or directory the repository could not give back whole."""

    path: bytes
    text: str


class RestoreReport(msgspec.Struct, frozen=True):
    """What a restore did.

    Attributes:
        outcome: whether all came back as recorded.
        warnings: what the target refused.
        damaged: what the repository could not give back.
        files: files gone through.
        bytes_total: their bytes.
        bytes_written: bytes written; fewer where the target had them already.
        duration_ns: of the run.
    """

    outcome: Outcome
    warnings: tuple[Notice, ...]
    damaged: tuple[Damaged, ...]
    files: int
    bytes_total: int
    bytes_written: int
    duration_ns: int


def _ignore(progress: RestoreProgress) -> None:
    del progress


def _never() -> bool:
    return False


def run(
    repo: Repository,
    snapshot: SnapshotRecord,
    target: Path,
    options: RestoreOptions | None = None,
    progress: Callable[[RestoreProgress], None] = _ignore,
    cancelled: Callable[[], bool] = _never,
) -> RestoreReport:
    """Write a snapshot, or part of it, into a folder, which is made if absent.

    Args:
        repo: where from.
        snapshot: which.
        target: the folder.
        options: how.
        progress: called up to ten times a second.
        cancelled: asked as often.

    Raises:
        TargetNotEmpty: a fresh restore into a folder that holds something.
        SnapshotNotFound: it was forgotten meanwhile.
        PathNotFound: a path to include is not in the snapshot.
        NoSpace: the target is full; a restore with ``Mode.DELTA`` goes on where this stopped.
        Cancelled: as asked.
        StoreUnavailable: the store does not answer.
    """
    native.keep_memory()
    with repo.guard.hold(Kind.READ, f"restore of {snapshot.id[:12]}"):
        # It may have been forgotten, and pruned, before the lease was there.
        there = ahead(repo.store, lambda: repo.snapshot(snapshot.id, fresh=True))
        repo.refresh()
        there()
        return _restore(repo, snapshot, target, options or RestoreOptions(), progress, cancelled)


def _restore(
    repo: Repository,
    snapshot: SnapshotRecord,
    target: Path,
    options: RestoreOptions,
    progress: Callable[[RestoreProgress], None],
    cancelled: Callable[[], bool],
) -> RestoreReport:
    steady = repo.clock.monotonic_ns()
    tree = TreeReader(repo.reader, snapshot)
    top = tree.lookup(options.strip)
    if top.kind != InodeKind.DIRECTORY:
        raise PathNotFound(f"{options.strip!r} is no directory in the snapshot")
    include = tuple(path.strip(b"/") for path in options.include)
    for path in include:
        tree.lookup(path)
    target.mkdir(parents=True, exist_ok=True)
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    warnings: list[Notice] = []

    def warn(path: bytes, text: str) -> None:
        warnings.append(Notice(path, text))

    reported = 0

    def breathe() -> None:
        nonlocal reported
        now = repo.clock.monotonic_ns()
        if now - reported < _REPORT_EVERY_NS:
            return
        reported = now
        if cancelled():
            raise Cancelled("restore was cancelled")
        progress(RestoreProgress(walk.files, walk.bytes_total, walk.bytes_written, walk.path))

    metadata = Metadata(options.owners, options.mode is Mode.DELTA, warn)
    walk = RestoreWalk(
        tree,
        lambda finished: Writer(
            repo.reader,
            metadata,
            options.keep_damaged,
            options.threads or default_threads(),
            finished,
        ),
        metadata,
        Selection(include),
        options.mode is not Mode.FRESH,
        options.mode is Mode.DELTA,
        options.keep_damaged,
        warn,
        breathe,
        None if options.known is None else TreeReader(repo.reader, options.known),
    )
    try:
        if options.mode is Mode.FRESH:
            _refuse_full(root, target)
        else:
            loosen(root)
        walk.run(root, top, options.strip.strip(b"/"), options.root_metadata and not options.strip)
    finally:
        walk.close()
        os.close(root)
    outcome = Outcome.WARNINGS if warnings or walk.damaged else Outcome.OK
    return RestoreReport(
        outcome,
        tuple(warnings),
        tuple(Damaged(path, text) for path, text in walk.damaged),
        walk.files,
        walk.bytes_total,
        walk.bytes_written,
        repo.clock.monotonic_ns() - steady,
    )


def _refuse_full(root: int, target: Path) -> None:
    with os.scandir(root) as listing:
        for item in listing:
            if item.name != "lost+found":
                raise TargetNotEmpty(
                    f"restore into {target}: the folder is not empty",
                    hint="choose another folder, or restore by delta or merge",
                )

"""What the job process does.

It imports what its own kind of work needs, when it knows which: of a short job the imports are
the longest part.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from lazarette.backup.jobs.access import open_repository
from lazarette.backup.jobs.changelog import read_changes
from lazarette.backup.jobs.model import (
    DAMAGED,
    PROGRESS_FILE,
    RESULT_FILE,
    BackupJob,
    CheckJob,
    CopyJob,
    Failure,
    ForgetJob,
    Progress,
    Request,
    RestoreJob,
    Result,
)
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.stores.limit import Rate, unlimited
from lazarette.fuse import jsontext
from lazarette.storage.changes import Change
from lazarette.storage.clock import Clock, SystemClock
from lazarette.storage.errors import Cancelled, DamagedData, LazaretteError, SnapshotNotFound
from lazarette.storage.files import write_atomic

Show = Callable[[Progress], None]
Stop = Callable[[], bool]
LATEST = "latest"


def execute(request: Request, show: Show, stop: Stop) -> Result:
    """Do a job in this process; every error of ours becomes a failed result.

    Args:
        request: what to do, where.
        show: told how far it is, a few times a second.
        stop: asked as often; True ends the job at its next safe point.
    """
    clock = SystemClock()
    started = clock.monotonic_ns()
    try:
        cache = Path(request.cache) if request.cache else None
        rate = rate_of(request.upload, request.zone, clock)
        repository = open_repository(request.access, clock, cache, rate)
        try:
            result = _perform(repository, request, show, stop)
        finally:
            repository.close()
    except Cancelled as error:
        result = Result("cancelled", failure=Failure.of(error))
    except LazaretteError as error:
        result = Result("failed", failure=Failure.of(error))
    result.duration_ns = clock.monotonic_ns() - started
    return result


def rate_of(text: str, zone: str, clock: Clock) -> Rate:
    """The rate in force at each moment, also when a window begins while a job goes on.

    Raises:
        InvalidArgument: the limit or the zone cannot be understood.
    """
    if not text:
        return unlimited
    from lazarette.backup.policy.schedule import zone_of
    from lazarette.backup.policy.windows import parse_rate

    limit, place = parse_rate(text), zone_of(zone)
    return lambda: limit.at(clock.now_ns(), place)


def _perform(repository: Repository, request: Request, show: Show, stop: Stop) -> Result:
    job = request.job
    if isinstance(job, BackupJob):
        read = rate_of(request.read, request.zone, repository.clock)
        return _back_up(repository, job, read, show, stop)
    if isinstance(job, RestoreJob):
        return _restore(repository, job, show, stop)
    if isinstance(job, CheckJob):
        return _check(repository, job)
    if isinstance(job, CopyJob):
        return _copy(repository, job, request, stop)
    return _forget(repository, job, stop)


def _back_up(repository: Repository, job: BackupJob, read: Rate, show: Show, stop: Stop) -> Result:
    from lazarette.backup import archive

    base = _base(repository, job)
    changes: Iterator[Change] | None = None
    if job.changes and base is not None:
        changes = read_changes(Path(job.changes))
    source = archive.Source(
        root=Path(job.root),
        volume=job.volume,
        base_snapshot=base,
        changes=changes,
        inodes_kept=job.inodes_kept,
        instant_ns=job.instant_ns,
        consistency=job.consistency,
        meta=job.meta.encode(),
    )
    expected = base.stats.bytes_total if base is not None else 0
    report = archive.run(
        repository,
        source,
        archive.ArchiveOptions(host=job.host, tags=dict(job.labels), read=read),
        lambda seen: show(Progress("backup", seen.bytes_total, expected, seen.files)),
        stop,
    )
    stats = report.stats
    return Result(
        report.outcome.value,
        snapshot=report.snapshot.id,
        bytes_total=stats.bytes_total,
        bytes_read=stats.bytes_read,
        bytes_sent=stats.bytes_sent,
        bytes_new=stats.bytes_new,
        files=stats.files,
        warnings=[_line(one.path, one.text) for one in report.warnings],
    )


def _base(repository: Repository, job: BackupJob) -> SnapshotRecord | None:
    """What to compare with; a base that is gone makes a full backup, not a failure."""
    if not job.base:
        return None
    if job.base != LATEST:
        try:
            return repository.snapshot(job.base)
        except SnapshotNotFound:
            return None
    records = [one for one in repository.snapshots(job.volume) if one.host == job.host]
    return records[-1] if records else None


def _restore(repository: Repository, job: RestoreJob, show: Show, stop: Stop) -> Result:
    from lazarette.backup import restore

    record = repository.snapshot(job.snapshot)
    known: SnapshotRecord | None = None
    if job.known:
        with suppress(SnapshotNotFound):  # without it everything is compared
            known = repository.snapshot(job.known)
    options = restore.RestoreOptions(
        include=tuple(path.encode("utf-8", "surrogateescape") for path in job.paths),
        mode=restore.Mode.DELTA if job.in_place else restore.Mode.FRESH,
        known=known,
    )
    expected = record.stats.bytes_total
    report = restore.run(
        repository,
        record,
        Path(job.target),
        options,
        lambda seen: show(Progress("restore", seen.bytes_total, expected, seen.files)),
        stop,
    )
    notes = []
    if job.replay is not None:
        from lazarette.backup.recovery import wal

        wal.lay_out(repository, job.replay, Path(job.target), stop)
        notes = [job.replay.warning] if job.replay.warning else []
    lost = [DAMAGED + _line(one.path, one.text) for one in report.damaged]
    return Result(
        "warnings" if notes else report.outcome.value,
        snapshot=record.id,
        bytes_total=report.bytes_total,
        bytes_read=report.bytes_written,
        files=report.files,
        warnings=notes + lost + [_line(one.path, one.text) for one in report.warnings],
    )


def _line(path: bytes, text: str) -> str:
    """A notice on a path as text; bytes that are no text are escaped."""
    return f"{path.decode('utf-8', 'backslashreplace')}: {text}"


def _check(repository: Repository, job: CheckJob) -> Result:
    report = repository.check(job.read_data)
    lines = [f"{one.object}: {one.text}" for one in report.problems]
    lines += [_line(one.path, f"not whole in snapshot {one.snapshot}") for one in report.affected]
    if report.clean:
        return Result("ok", files=report.packs, bytes_read=report.bytes_read, warnings=lines)
    damage = DamagedData(
        f"{len(report.problems)} problems in {repository.store.url}",
        hint="laz repo repair keeps what is whole",
    )
    return Result(
        "failed", bytes_read=report.bytes_read, warnings=lines, failure=Failure.of(damage)
    )


def _copy(repository: Repository, job: CopyJob, request: Request, stop: Stop) -> Result:
    from lazarette.backup import copying

    cache = Path(request.cache) if request.cache else None
    rate = rate_of(request.upload, request.zone, repository.clock)
    target = open_repository(job.target, repository.clock, cache, rate)
    try:
        chosen = [repository.snapshot(one) for one in job.snapshots]
        done = copying.run(repository, target, chosen, stop)
    finally:
        target.close()
    newest = done.copied[-1].id if done.copied else ""
    return Result("ok", snapshot=newest, bytes_sent=done.bytes_sent, files=len(done.copied))


def _forget(repository: Repository, job: ForgetJob, stop: Stop) -> Result:
    repository.forget(job.snapshots)
    if not job.prune:
        return Result("ok")
    from lazarette.backup.repository import prune

    freed = prune.run(repository, cancelled=stop)
    return Result("ok", files=freed.packs_deleted, bytes_new=freed.bytes_freed)


def main() -> None:
    """Read a request, do it, leave the result in the folder."""
    folder = Path(sys.argv[1])
    request = jsontext.decode(sys.stdin.buffer.read(), type=Request)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def show(progress: Progress) -> None:
        beside = folder / f".{PROGRESS_FILE}"
        beside.write_bytes(msgspec.json.encode(progress))
        beside.rename(folder / PROGRESS_FILE)

    result = execute(request, show, stop.is_set)
    write_atomic(folder / RESULT_FILE, msgspec.json.encode(result))

"""Backups of volumes: snapshot at one instant, then a job that ships what changed.

A run goes through these steps, each recorded before the next, so that a daemon killed in
between knows at its next start what to undo or to wait for::

    begin ──▶ snapshot (writers held for an instant) ──▶ job ──▶ end
                                                          │
               the snapshot of a good run is kept as the base of the next one, so that
               only what changed since is read; the one before it is deleted
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec

from lazarette.backup.jobs.changelog import write_changes
from lazarette.backup.jobs.model import BackupJob, Failure, Progress, Request, Result
from lazarette.backup.policy.hold import Held
from lazarette.backup.policy.journal import Journal, Reason
from lazarette.backup.policy.model import ConsistencyRule
from lazarette.backup.policy.outcome import Consistency, Kind, Outcome, failed
from lazarette.backup.policy.outcome import Result as JournalResult
from lazarette.runtime.events import EventBus
from lazarette.runtime.protection.definitions import Definitions
from lazarette.runtime.protection.fills import FillService
from lazarette.runtime.protection.jobs import JobRunner
from lazarette.runtime.protection.repositories import RepositoryBook
from lazarette.runtime.protection.runs import Run, RunBook
from lazarette.storage.changes import ChangesUnknown
from lazarette.storage.clock import Clock
from lazarette.storage.errors import Conflict, InternalError, LazaretteError
from lazarette.storage.volumes.contract import SnapshotInfo, SnapshotKind, WriteGate
from lazarette.storage.volumes.manager import VolumeManager

log = logging.getLogger(__name__)

LOCAL_PREFIX = "backup-"
MANUAL = "manual"
_DONE = ("ok", "warnings")
Show = Callable[[str, Progress], None]
FollowUp = Callable[[Run], Awaitable[None]]


class BackupRunning(Conflict):
    """A backup of the volume is under way."""

    number = 371
    exit_code = 51


@dataclass(frozen=True, slots=True)
class Limits:
    """How fast a backup may send and read, as policies say it; times of day in ``zone``."""

    upload: str = ""
    read: str = ""
    zone: str = "UTC"


NO_LIMITS = Limits()


class Writers(Protocol):
    """Who writes volumes: the containers."""

    def gate_for(self, volumes: Sequence[str]) -> WriteGate:
        """A gate that holds every container using one of the volumes."""
        ...


class Describes(Protocol):
    """Knows what belongs to a volume."""

    def of_volume(self, name: str) -> Definitions:
        """Definitions of the volume, its containers and networks."""
        ...


class KeepsImages(Protocol):
    """Stores images beside the volumes."""

    async def keep(self, image_id: str, names: list[str], repository: str) -> None:
        """Store an image unless the repository has it."""
        ...


class HoldsStill(Protocol):
    """Holds the users of volumes still, as a policy says."""

    def still(
        self, run: int, volumes: Sequence[str], rule: ConsistencyRule | None
    ) -> AbstractAsyncContextManager[Held]:
        """Hold them while the block runs."""
        ...


class Tells(Protocol):
    """Judges runs and tells people of them."""

    def judge(self, run: Run, files: int, size: int) -> list[str]:
        """Why a backup is suspicious; nothing when it is not."""
        ...

    def began(self, volume: str) -> None:
        """A backup of a volume begins."""
        ...

    def ended(self, volume: str, kind: Kind, outcome: Outcome) -> None:
        """A run ended."""
        ...


class Owns(Protocol):
    """Knows whether this host may continue a volume's history."""

    def require(self, volume: str, repository: str) -> None:
        """Make sure that it may.

        Raises:
            Fenced: another host took it over.
            InUse: the volume here only follows another host's.
        """
        ...

    def withdraw(self, volume: str, repository: str, snapshot: str) -> LazaretteError | None:
        """Take a snapshot back if another host took over while it was written; why."""
        ...


class BackupService:
    """Runs backups.

    Args:
        volumes: the volumes.
        writers: holds those who write them, for the instant of a snapshot.
        stillness: holds them as a policy says.
        teller: judges runs and tells people of them.
        repositories: where to.
        fills: volumes that are not all here cannot be backed up.
        owns: whether this host may continue a history.
        runs: the record of what is under way.
        journal: the history.
        jobs: starts the processes.
        describer: definitions to keep with a volume's data.
        keep: stores the images its containers are made of.
        scratch: folder for change records.
        events: told about every run.
        clock: time.
    """

    def __init__(
        self,
        volumes: VolumeManager,
        writers: Writers,
        stillness: HoldsStill,
        teller: Tells,
        repositories: RepositoryBook,
        fills: FillService,
        owns: Owns,
        runs: RunBook,
        journal: Journal,
        jobs: JobRunner,
        describer: Describes,
        keep: KeepsImages,
        scratch: Path,
        events: EventBus,
        clock: Clock,
    ) -> None:
        self._volumes = volumes
        self._writers = writers
        self._stillness = stillness
        self._teller = teller
        self._repositories = repositories
        self._fills = fills
        self._owns = owns
        self.runs = runs
        self._journal = journal
        self._jobs = jobs
        self._describer = describer
        self._keep = keep
        self._scratch = scratch
        self._events = events
        self._clock = clock
        self._busy: set[str] = set()
        self._warnings: dict[str, list[str]] = {}
        self._adopted: set[asyncio.Task[None]] = set()
        self._follow_up: FollowUp | None = None
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def run(
        self,
        volumes: Sequence[str],
        *,
        repository: str = "",
        policy: str = "",
        reason: Reason = Reason.ASKED,
        rule: ConsistencyRule | None = None,
        labels: dict[str, str] | None = None,
        limits: Limits = NO_LIMITS,
        show: Show = lambda volume, progress: None,
    ) -> list[Run]:
        """Back up volumes as they are at one instant; returns when all jobs have ended.

        ``limits`` say how fast it may read and send, by times of day.

        Raises:
            HookFailed, ProfileFailed: they could not be held as ``rule`` says.
            VolumeNotFound: one of them does not exist.
            RepositoryUnknown: no such repository.
            BackupRunning: one of them is being backed up.
            Fenced: another host took one of them over.
        """
        known = self._repositories.get(repository)
        places = {volume: self._volumes.get(volume).mountpoint for volume in volumes}
        for volume in volumes:
            self._volumes.require_free(volume)
        with self._claim(volumes):
            group = secrets.token_hex(8)
            local = LOCAL_PREFIX + group
            ids = {volume: secrets.token_hex(16) for volume in volumes}
            numbers = []
            for volume, run_id in ids.items():
                number = self._journal.begin(policy, volume, Kind.BACKUP, reason)
                numbers.append(number)
                self._teller.began(volume)
                trigger = policy or MANUAL
                self.runs.begin(run_id, volume, known.name, trigger, local, number)
                self._events.publish("backup", "start", volume, {"trigger": trigger})
            try:
                for volume, place in places.items():
                    self._fills.content(volume, place)
                    await asyncio.to_thread(self._owns.require, volume, known.name)
                async with self._stillness.still(numbers[0], volumes, rule) as held:
                    taken = await asyncio.to_thread(self._snapshot, volumes, local)
            except Exception as error:
                told = _told(error, f"the backup of {', '.join(volumes)}")
                for run_id in ids.values():
                    await self._finish(run_id, _failed(told))
                raise told from error
            for volume, info in taken.items():
                self.runs.snapshot_taken(
                    ids[volume],
                    max(info.pause_ns, held.held_ns),
                    info.created_ns,
                    held.consistency(atomic=info.kind is not SnapshotKind.UNSAFE).value,
                )
                self._warnings[ids[volume]] = list(held.warnings)
            await asyncio.gather(
                *(self._ship(ids[volume], labels or {}, limits, show) for volume in volumes)
            )
        return [run for run_id in ids.values() if (run := self.runs.get(run_id)) is not None]

    def refuse(
        self, volumes: Sequence[str], policy: str, reason: Reason, why: LazaretteError
    ) -> None:
        """Write down, and tell of, runs that could not even begin."""
        for volume in volumes:
            number = self._journal.begin(policy, volume, Kind.BACKUP, reason)
            outcome = failed(why.message)
            self._journal.end(number, outcome)
            self._teller.ended(volume, Kind.BACKUP, outcome)

    def on_adopted(self, follow_up: FollowUp) -> None:
        """What is to happen after a run of an earlier daemon that this one saw to its end."""
        self._follow_up = follow_up

    async def recover(self) -> None:
        """Take up the runs an earlier daemon left: wait for living jobs, undo the rest."""
        for run in self.runs.unfinished():
            job = self._jobs.find(run.id)
            if job is None:
                gone = Failure(111, "the daemon ended before the backup's job began")
                await self._finish(run.id, Result("failed", failure=gone))
            else:
                self._busy.add(run.volume)
                task = asyncio.create_task(self._take_up(run))
                self._adopted.add(task)
                task.add_done_callback(self._adopted.discard)

    async def _take_up(self, run: Run) -> None:
        job = self._jobs.find(run.id)
        assert job is not None
        try:
            result = await self._jobs.watch(job, lambda progress: None)
            await self._finish(run.id, await self._judged(run, result))
        finally:
            self._busy.discard(run.volume)
        ended = self.runs.get(run.id)
        if ended is not None and self._follow_up is not None:
            await self._follow_up(ended)

    def _claim(self, volumes: Sequence[str]) -> ExitStack:
        held = ExitStack()
        for volume in volumes:
            if volume in self._busy:
                held.close()
                raise BackupRunning(
                    f"a backup of {volume} is running", hint="wait for it: laz backup ls"
                )
            self._busy.add(volume)
            held.callback(self._busy.discard, volume)
        return held

    def _snapshot(self, volumes: Sequence[str], local: str) -> dict[str, SnapshotInfo]:
        gate = self._writers.gate_for(volumes)
        return self._volumes.snapshot(volumes, gate, local)

    async def _ship(self, run_id: str, labels: dict[str, str], limits: Limits, show: Show) -> None:
        run = self.runs.get(run_id)
        assert run is not None
        try:
            definitions = self._describer.of_volume(run.volume)
            for container in [*definitions.containers, *definitions.project]:
                await self._keep.keep(container.image_id, [container.image], run.repository)
            request = await asyncio.to_thread(self._request, run, labels, definitions)
            request = msgspec.structs.replace(
                request, upload=limits.upload, read=limits.read, zone=limits.zone
            )
            job = self._jobs.start(run.id, request)
            watched = await self._jobs.watch(job, lambda progress: show(run.volume, progress))
            result = await self._judged(run, watched)
        except Exception as error:  # noqa: BLE001 - logged; a run always ends
            result = _failed(_told(error, f"the backup of {run.volume}"))
        await self._finish(run.id, result)

    async def _judged(self, run: Run, result: Result) -> Result:
        """A job's result, unless another host took the history over meanwhile."""
        if result.outcome not in _DONE:
            return result
        try:
            fenced = await asyncio.to_thread(
                self._owns.withdraw, run.volume, run.repository, result.snapshot
            )
        except LazaretteError as away:
            result.warnings.append(f"whether another host took over is not known: {away.message}")
            return result
        return result if fenced is None else _failed(fenced)

    def _request(self, run: Run, labels: dict[str, str], definitions: Definitions) -> Request:
        view = self._fills.content(run.volume, self._volumes.view(run.volume, run.local))
        ordinary = self._fills.of(run.volume) is None
        base, changes = self._changes(run) if ordinary else ("", "")
        job = BackupJob(
            root=str(view),
            volume=run.volume,
            host=socket.gethostname(),
            base=base,
            changes=changes,
            inodes_kept=self._volumes.capabilities(run.volume).inodes_kept,
            instant_ns=run.instant_ns,
            consistency=run.consistency,
            labels=labels,
            meta=definitions.text(),
        )
        access = self._repositories.get(run.repository).access
        return Request(job, access, str(self._repositories.cache))

    def _changes(self, run: Run) -> tuple[str, str]:
        """The newest held base, and a file of what changed since; empty when unknown."""
        for base in self.runs.bases(run.volume, run.repository):
            path = self._scratch / f"{run.id}.changes"
            try:
                write_changes(path, self._volumes.changes(run.volume, base.local, run.local))
            except (ChangesUnknown, LazaretteError) as error:
                log.warning(
                    "changes of %s since %s: %s; comparing everything",
                    run.volume,
                    base.local,
                    error,
                )
                path.unlink(missing_ok=True)
                return base.snapshot, ""
            return base.snapshot, str(path)
        return "", ""

    async def _finish(self, run_id: str, result: Result) -> None:
        result.warnings = self._warnings.pop(run_id, []) + result.warnings
        begun = self.runs.get(run_id)
        assert begun is not None
        doubts: list[str] = []
        if result.outcome in _DONE:
            doubts = self._teller.judge(begun, result.files, result.bytes_total)
            result.warnings = [f"suspicious: {doubt}" for doubt in doubts] + result.warnings
        if result.outcome == "ok" and result.warnings:
            result.outcome = "warnings"
        self.runs.end(run_id, result)
        await asyncio.to_thread(self._tidy, run_id)
        run = self.runs.get(run_id)
        assert run is not None
        outcome = replace(outcome_of(run), suspicious=bool(doubts))
        self._journal.end(run.journal, outcome)
        self._teller.ended(run.volume, Kind.BACKUP, outcome)
        self._events.publish(
            "backup",
            run.outcome,
            run.volume,
            {"repository": run.repository, "snapshot": run.snapshot, "trigger": run.trigger},
        )

    def _tidy(self, run_id: str) -> None:
        """Let go of what a finished run no longer needs; repeatable."""
        run = self.runs.get(run_id)
        assert run is not None
        (self._scratch / f"{run.id}.changes").unlink(missing_ok=True)
        with suppress(LazaretteError):
            self._volumes.release_view(run.volume, run.local)
        held = self.runs.bases(run.volume, run.repository)
        stale = [old for old in held if old.id != run.id] if run.base_held else [run]
        for old in stale:
            try:
                self._volumes.delete_snapshot(old.volume, old.local)
            except LazaretteError as error:
                log.warning("snapshot %s@%s is left: %s", old.volume, old.local, error)
                continue
            self.runs.release_base(old.id)
        self._jobs.discard(run.id)


def outcome_of(run: Run) -> Outcome:
    """A finished run as the journal keeps it."""
    result = run.result
    return Outcome(
        result=JournalResult(run.outcome) if run.outcome in _DONE else JournalResult.FAILED,
        warnings=tuple(result.warnings),
        error=result.failure.message if result.failure else "",
        snapshot=run.snapshot,
        consistency=Consistency(run.consistency),
        pause_ns=run.pause_ns,
        bytes_read=result.bytes_read,
        bytes_sent=result.bytes_sent,
    )


def _failed(error: LazaretteError) -> Result:
    return Result("failed", failure=Failure.of(error))


def _told(error: Exception, what: str) -> LazaretteError:
    """An error as it may be shown: one that is not ours only says where to look."""
    if isinstance(error, LazaretteError):
        return error
    log.error("%s failed", what, exc_info=error)
    return InternalError(f"{what} failed by a fault of this program, see the daemon's log")


def encode_run(run: Run) -> dict[str, object]:
    """A run as the API shows it."""
    return dict(msgspec.to_builtins(run))

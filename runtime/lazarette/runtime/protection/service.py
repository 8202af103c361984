"""Protection as one object: what the API and the daemon talk to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

from lazarette.backup.jobs.model import LOG_PREFIX, CheckJob, Job, Progress, Request, Result
from lazarette.backup.policy.journal import Journal, Reason, Run
from lazarette.backup.policy.journal import Protection as VolumeState
from lazarette.backup.policy.outcome import Kind, Outcome
from lazarette.backup.policy.outcome import Result as JournalResult
from lazarette.backup.policy.status import Level, status_line, unprotected
from lazarette.runtime.protection.backups import BackupService
from lazarette.runtime.protection.branches import BranchService
from lazarette.runtime.protection.drills import Drills
from lazarette.runtime.protection.fencing import Fencing
from lazarette.runtime.protection.fills import FillService
from lazarette.runtime.protection.follower import PolicyFollower
from lazarette.runtime.protection.holding import Stillness
from lazarette.runtime.protection.jobs import Job as Process
from lazarette.runtime.protection.jobs import JobRunner
from lazarette.runtime.protection.recovery import HostRecovery
from lazarette.runtime.protection.repositories import RepositoryBook
from lazarette.runtime.protection.restores import RestoreService
from lazarette.runtime.protection.safeties import Safeties
from lazarette.runtime.protection.standby import StandbyService
from lazarette.runtime.protection.telling import Teller
from lazarette.runtime.protection.wal import WalService
from lazarette.storage.clock import rfc3339
from lazarette.storage.errors import LazaretteError
from lazarette.storage.volumes.manager import VolumeManager


class Protection:
    """Everything that keeps volumes safe.

    Attributes:
        repositories: where backups live.
        backups: makes them.
        restores: brings volumes back.
        policies: when, and what is kept.
        fills: volumes whose data are still arriving.
        recovery: brings hosts back.
        teller: judges, counts and tells.
        drills: proves that backups come back.
        fencing: stops what another host took over.
        standbys: follow another host's volumes.
        branches: makes writable volumes of points.
        wal: keeps the logs of databases.
    """

    def __init__(
        self,
        volumes: VolumeManager,
        repositories: RepositoryBook,
        backups: BackupService,
        restores: RestoreService,
        policies: PolicyFollower,
        fills: FillService,
        recovery: HostRecovery,
        journal: Journal,
        jobs: JobRunner,
        stillness: Stillness,
        teller: Teller,
        drills: Drills,
        fencing: Fencing,
        standbys: StandbyService,
        branches: BranchService,
        wal: WalService,
        safeties: Safeties,
    ) -> None:
        self._volumes = volumes
        self.repositories = repositories
        self.backups = backups
        self.restores = restores
        self.policies = policies
        self.fills = fills
        self.recovery = recovery
        self._journal = journal
        self._jobs = jobs
        self._stillness = stillness
        self.teller = teller
        self.drills = drills
        self._outliving: set[asyncio.Task[None]] = set()
        self.fencing = fencing
        self.standbys = standbys
        policies.passive = standbys.follows
        self.branches = branches
        self.wal = wal
        self._safeties = safeties
        wal.passive = standbys.follows
        restores.freshen = wal.freshen
        restores.in_place.changing = volumes.set_back = wal.set_back

    async def start(self) -> None:
        """Take up what an earlier daemon left, then follow the policies."""
        await self._stillness.start()
        self._sweep()
        await self.restores.recover()
        await self.backups.recover()
        self._close_abandoned()
        await self.drills.recover()
        await self.branches.start()
        await self.policies.start()
        self.teller.start()
        self.fencing.start()
        self.wal.start()
        self._safeties.start()
        await self.standbys.start()

    def _sweep(self) -> None:
        """Remove what jobs of an earlier daemon left that nobody takes up: copies, prunes."""
        known = {run.id for run in self.backups.runs.unfinished()} | self.restores.unfinished()
        known |= self.standbys.unfinished()
        for job in self._jobs.sweep(known):
            task = asyncio.create_task(self._outlive(job))
            self._outliving.add(task)
            task.add_done_callback(self._outliving.discard)

    async def _outlive(self, job: Process) -> None:
        await self._jobs.watch(job, lambda progress: None)
        self._jobs.discard(job.id)

    def _close_abandoned(self) -> None:
        """Fail what an earlier daemon began and nobody goes on with, and tell of it."""
        going_on = {run.journal for run in self.backups.runs.unfinished()}
        for run in self._journal.close_abandoned(going_on.__contains__):
            assert run.outcome is not None
            self.teller.ended(run.volume, run.kind, run.outcome)

    async def release(self) -> None:
        """Release what a dead daemon held, in its place; for the guardian."""
        await self._stillness.release_everything()

    async def stop(self) -> None:
        """Follow no policy any more; running jobs go on by themselves."""
        async with AsyncExitStack() as ending:
            ending.callback(self.repositories.close)
            ending.push_async_callback(self._end_outliving)
            ending.push_async_callback(self.teller.stop)
            ending.push_async_callback(self._stillness.stop)
            ending.push_async_callback(self.branches.stop)
            ending.push_async_callback(self.policies.stop)
            ending.push_async_callback(self.fencing.stop)
            ending.push_async_callback(self.standbys.stop)
            ending.push_async_callback(self.wal.stop)
            ending.push_async_callback(self._safeties.stop)

    async def _end_outliving(self) -> None:
        for task in self._outliving:
            task.cancel()
        await asyncio.gather(*self._outliving, return_exceptions=True)

    async def run_job(self, repository: str, job: Job, show: Callable[[Progress], None]) -> Result:
        """Run a job on a repository and wait for it."""
        access = self.repositories.get(repository).access
        return await self._jobs.run(Request(job, access, str(self.repositories.cache)), show)

    async def check(
        self, repository: str, read_data: float, show: Callable[[Progress], None]
    ) -> Result:
        """Verify a repository; when all data were read, its volumes are verified by that.

        Args:
            repository: its name.
            read_data: the share of stored data to read, 0 to 1.
            show: told how far it is.
        """
        began = {
            record.volume: self._journal.begin("", record.volume, Kind.VERIFY, Reason.ASKED)
            for record in (await self.restores.points(None, repository) if read_data >= 1 else ())
            if not record.volume.startswith(LOG_PREFIX)
        }
        result = await self.run_job(repository, CheckJob(read_data), show)
        wrong = result.failure.message if result.failure else ""
        kind = JournalResult.FAILED if wrong else JournalResult.OK
        for number in began.values():
            self._journal.end(number, Outcome(kind, error=wrong, bytes_read=result.bytes_read))
        return result

    def approve(self, volume: str) -> int:
        """Count a volume's suspicious backups as good from now on; how many there were.

        Raises:
            VolumeNotFound: there is no such volume.
        """
        self._volumes.get(volume)
        return self._journal.approve(volume)

    def history(self, volume: str = "", kind: Kind | None = None, limit: int = 100) -> list[Run]:
        """What was run, the newest first: backups, copies, drills, verifications."""
        return self._journal.runs(volume=volume, kind=kind, limit=limit)

    async def status(self) -> list[dict[str, object]]:
        """How safe each volume is, one object a volume."""
        return [self._volume_status(volume.name) for volume in self._volumes.list()]

    def _volume_status(self, volume: str) -> dict[str, object]:
        try:
            policy = self.policies.book.of(volume)
        except LazaretteError as bad:  # a label that cannot be understood protects nothing
            return self._unprotected(volume, bad.message)
        seen = self._journal.protection(
            volume, policy.rpo_ns if policy else 0, policy.rto_ns if policy else 0
        )
        good = seen.last_good.started_ns if seen.last_good else 0
        outcome = seen.last.outcome.result.value if seen.last and seen.last.outcome else ""
        next_run = self.policies.next_run(policy) if policy else ""
        line = status_line(seen, next_run) if policy else unprotected(volume)
        drill = seen.last_drill.outcome if seen.last_drill else None
        return {
            "volume": volume,
            "state": self._word(volume, seen, policy is not None),
            "last_backup": rfc3339(good) if good else "",
            "last_backup_ns": good,
            "last_outcome": outcome,
            "next_run": next_run,
            "policy": policy.name if policy else "",
            "level": line.level.value,
            "text": line.text,
            "overdue": policy is not None and seen.overdue,
            "error": seen.last.outcome.error if seen.last and seen.last.outcome else "",
            "suspicious": bool(seen.last and seen.last.outcome and seen.last.outcome.suspicious),
            "rpo_ns": seen.rpo_ns,
            "rpo_target_ns": seen.rpo_target_ns,
            "rto_ns": seen.rto_ns,
            "rto_target_ns": seen.rto_target_ns,
            "last_verified_ns": seen.last_verified.started_ns if seen.last_verified else 0,
            "last_drill_ns": seen.last_drill.started_ns if seen.last_drill else 0,
            "last_drill_outcome": drill.result.value if drill else "",
            "skipped": self._journal.skipped(policy.name, 0) if policy else 0,
        }

    def _unprotected(self, volume: str, why: str) -> dict[str, object]:
        seen = self._journal.protection(volume, 0, 0)
        return {
            "volume": volume,
            "state": "wrong policy",
            "level": Level.BAD.value,
            "text": f"not protected: {why}",
            "last_backup": rfc3339(seen.last_good.started_ns) if seen.last_good else "",
            "last_outcome": "",
            "next_run": "",
            "error": why,
            "overdue": True,
        }

    def _word(self, volume: str, seen: VolumeState, has_policy: bool) -> str:
        if self.standbys.follows(volume):
            return "standby"
        return "fenced" if self.fencing.fences(volume) else _state(seen, has_policy)


def _state(seen: VolumeState, has_policy: bool) -> str:
    """One word for a volume: the worst that is true of it."""
    last = seen.last.outcome if seen.last else None
    if last is not None and not last.good:
        return "suspicious" if last.suspicious else "failed"
    if not has_policy:
        return "manual" if seen.last_good else "unprotected"
    if seen.waiting:
        return "waiting"
    return "overdue" if seen.overdue else "protected"

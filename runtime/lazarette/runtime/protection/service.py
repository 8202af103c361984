"""Protection as one object: what the API and the daemon talk to."""

from __future__ import annotations

from collections.abc import Callable

from lazarette.backup.jobs.model import Job, Progress, Request, Result
from lazarette.backup.policy.journal import Journal, Run
from lazarette.backup.policy.journal import Protection as VolumeState
from lazarette.backup.policy.outcome import Kind
from lazarette.runtime.protection.backups import BackupService
from lazarette.runtime.protection.drills import Drills
from lazarette.runtime.protection.fills import FillService
from lazarette.runtime.protection.follower import PolicyFollower
from lazarette.runtime.protection.holding import Stillness
from lazarette.runtime.protection.jobs import JobRunner
from lazarette.runtime.protection.recovery import HostRecovery
from lazarette.runtime.protection.repositories import RepositoryBook
from lazarette.runtime.protection.restores import RestoreService
from lazarette.runtime.protection.telling import Teller
from lazarette.storage.clock import rfc3339
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

    async def start(self) -> None:
        """Take up what an earlier daemon left, then follow the policies."""
        await self._stillness.start()
        await self.restores.recover()
        await self.backups.recover()
        await self.drills.recover()
        await self.policies.start()
        self.teller.start()

    async def release(self) -> None:
        """Release what a dead daemon held, in its place; for the guardian."""
        await self._stillness.release_everything()

    async def stop(self) -> None:
        """Follow no policy any more; running jobs go on by themselves."""
        await self.policies.stop()
        await self._stillness.stop()
        await self.teller.stop()
        self.repositories.close()

    async def run_job(self, repository: str, job: Job, show: Callable[[Progress], None]) -> Result:
        """Run a job on a repository and wait for it."""
        access = self.repositories.get(repository).access
        return await self._jobs.run(Request(job, access, str(self.repositories.cache)), show)

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
        policy = self.policies.book.of(volume)
        seen = self._journal.protection(
            volume, policy.rpo_ns if policy else 0, policy.rto_ns if policy else 0
        )
        good = seen.last_good.started_ns if seen.last_good else 0
        outcome = seen.last.outcome.result.value if seen.last and seen.last.outcome else ""
        return {
            "volume": volume,
            "state": _state(seen, policy is not None),
            "last_backup": rfc3339(good) if good else "",
            "last_backup_ns": good,
            "last_outcome": outcome,
            "next_run": self.policies.next_run(policy) if policy else "",
            "rpo_ns": seen.rpo_ns,
            "rpo_target_ns": seen.rpo_target_ns,
            "rto_ns": seen.rto_ns,
            "last_drill_ns": seen.last_drill.started_ns if seen.last_drill else 0,
        }


def _state(seen: VolumeState, has_policy: bool) -> str:
    """One word for a volume: the worst that is true of it."""
    if seen.last and seen.last.outcome and not seen.last.outcome.good:
        return "failed"
    if not has_policy:
        return "manual" if seen.last_good else "unprotected"
    return "overdue" if seen.overdue else "protected"

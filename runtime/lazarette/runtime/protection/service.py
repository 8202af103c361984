"""Protection as one object: what the API and the daemon talk to."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from lazarette.backup.jobs.model import Job, Progress, Request, Result
from lazarette.runtime.protection.backups import BackupService
from lazarette.runtime.protection.jobs import JobRunner
from lazarette.runtime.protection.policies import PolicyBook
from lazarette.runtime.protection.recovery import HostRecovery
from lazarette.runtime.protection.repositories import RepositoryBook
from lazarette.runtime.protection.restores import RestoreService
from lazarette.storage.clock import rfc3339
from lazarette.storage.volumes.manager import VolumeManager

_GOOD = ("ok", "warnings")


class Protection:
    """Everything that keeps volumes safe.

    Attributes:
        repositories: where backups live.
        backups: makes them.
        restores: brings volumes back.
        policies: when, and what is kept.
        recovery: brings hosts back.
    """

    def __init__(
        self,
        volumes: VolumeManager,
        repositories: RepositoryBook,
        backups: BackupService,
        restores: RestoreService,
        policies: PolicyBook,
        recovery: HostRecovery,
        jobs: JobRunner,
    ) -> None:
        self._volumes = volumes
        self.repositories = repositories
        self.backups = backups
        self.restores = restores
        self.policies = policies
        self.recovery = recovery
        self._jobs = jobs

    async def start(self) -> None:
        """Take up what an earlier daemon left, then follow the policies."""
        await self.restores.recover()
        await self.backups.recover()
        await self.policies.start()

    async def stop(self) -> None:
        """Follow no policy any more; running jobs go on by themselves."""
        await self.policies.stop()
        self.repositories.close()

    async def run_job(self, repository: str, job: Job, show: Callable[[Progress], None]) -> Result:
        """Run a job on a repository and wait for it."""
        job_id = secrets.token_hex(16)
        access = self.repositories.get(repository).access
        started = self._jobs.start(job_id, Request(job, access, str(self.repositories.cache)))
        try:
            return await self._jobs.watch(started, show)
        finally:
            self._jobs.discard(job_id)

    async def status(self) -> list[dict[str, object]]:
        """How safe each volume is, one object a volume."""
        return [self._volume_status(volume.name) for volume in self._volumes.list()]

    def _volume_status(self, volume: str) -> dict[str, object]:
        runs = self.backups.runs.of_volume(volume)
        good = [run for run in runs if run.outcome in _GOOD]
        last = next((run for run in runs if run.outcome != "running"), None)
        next_run = self.policies.next_run(volume)
        state = "unprotected"
        if last is not None:
            state = "failed" if last.outcome == "failed" else "protected"
        elif next_run:
            state = "waiting"
        if self.policies.overdue(volume, good[0].instant_ns if good else 0):
            state = "overdue"
        return {
            "volume": volume,
            "state": state,
            "last_backup": rfc3339(good[0].instant_ns) if good else "",
            "last_backup_ns": good[0].instant_ns if good else 0,
            "last_outcome": last.outcome if last else "",
            "next_run": next_run,
            "runs": len(runs),
        }

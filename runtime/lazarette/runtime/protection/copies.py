"""Copies: a backup goes from its first repository into others, chunk by chunk."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lazarette.backup.jobs.model import CopyJob, Request
from lazarette.backup.policy.journal import Journal, Reason
from lazarette.backup.policy.outcome import Kind, Outcome, failed
from lazarette.backup.policy.outcome import Result as JournalResult
from lazarette.runtime.protection.jobs import JobRunner
from lazarette.runtime.protection.repositories import RepositoryBook

log = logging.getLogger(__name__)


class CopyService:
    """Copies snapshots between known repositories; the volume is not read again.

    Args:
        repositories: from and to.
        jobs: starts the processes.
        journal: remembers how each copy ended.
    """

    def __init__(self, repositories: RepositoryBook, jobs: JobRunner, journal: Journal) -> None:
        self._repositories = repositories
        self._jobs = jobs
        self._journal = journal

    async def run(
        self,
        volume: str,
        snapshots: Sequence[str],
        source: str,
        target: str,
        policy: str,
        upload: str = "",
        zone: str = "UTC",
    ) -> Outcome:
        """Copy snapshots; what failed is in the outcome and the journal.

        Args:
            volume: whose they are.
            snapshots: their ids in the source, the oldest first.
            source: name of the repository that has it.
            target: name of the one that gets it.
            policy: that asks for it.
            upload: limit of what is sent; empty for none.
            zone: of the times of day in it.

        Raises:
            RepositoryUnknown: one of the two is not known here.
        """
        job = CopyJob(list(snapshots), self._repositories.get(target).access)
        access = self._repositories.get(source).access
        number = self._journal.begin(policy, volume, Kind.COPY, Reason.SCHEDULE)
        result = await self._jobs.run(
            Request(job, access, str(self._repositories.cache), upload, zone=zone)
        )
        if result.failure is not None:
            log.error("copy of %s to %s: %s", volume, target, result.failure.message)
            outcome = failed(result.failure.message)
        else:
            outcome = Outcome(
                JournalResult.OK, snapshot=result.snapshot, bytes_sent=result.bytes_sent
            )
        self._journal.end(number, outcome)
        return outcome

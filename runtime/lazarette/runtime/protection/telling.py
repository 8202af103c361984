"""Judging, counting and telling what runs did: suspicion, metrics, messages, pings."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable

from lazarette.backup.policy.journal import Journal
from lazarette.backup.policy.metrics import Metrics, Watched
from lazarette.backup.policy.model import Policy
from lazarette.backup.policy.notify import Notifier
from lazarette.backup.policy.outcome import Kind, Outcome
from lazarette.backup.policy.suspicion import Extent, suspicions
from lazarette.runtime.protection.policies import PolicyBook
from lazarette.runtime.protection.runs import Run, RunBook
from lazarette.storage.clock import Clock
from lazarette.storage.errors import LazaretteError, NotFound
from lazarette.storage.state import State

log = logging.getLogger(__name__)

_LOOK_S = 60.0
_COMPARED = 20
_DONE = ("ok", "warnings")


class Teller:
    """One in a daemon.

    Args:
        book: whose policy says who is told.
        journal: the history of all runs.
        runs: the history of backups, with their sizes.
        state: where it is kept who was told what.
        clock: time.
    """

    def __init__(
        self, book: PolicyBook, journal: Journal, runs: RunBook, state: State, clock: Clock
    ) -> None:
        self._book = book
        self._journal = journal
        self._runs = runs
        self._notifier = Notifier(state, clock, socket.gethostname())
        self._metrics = Metrics(self._watched)
        self._tasks: set[asyncio.Task[None]] = set()
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look every minute whether a backup is overdue."""
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Tell nobody any more."""
        watching = [] if self._watcher is None else [self._watcher]
        for task in (*self._tasks, *watching):
            task.cancel()
        await asyncio.gather(*self._tasks, *watching, return_exceptions=True)

    def judge(self, run: Run, files: int, size: int) -> list[str]:
        """Why a backup is suspicious (case A36); nothing when it is not.

        Args:
            run: which; not ended yet.
            files: entries it holds.
            size: bytes of content it holds.
        """
        earlier = [
            Extent(one.result.files, one.result.bytes_total)
            for one in self._runs.of_volume(run.volume, _COMPARED)
            if one.id != run.id and one.outcome in _DONE and self._counts(one)
        ]
        return suspicions(earlier, Extent(files, size))

    def began(self, volume: str) -> None:
        """A backup of a volume begins."""
        policy = self._policy(volume)
        if policy is not None:
            self._later(self._notifier.began(policy))

    def ended(self, volume: str, kind: Kind, outcome: Outcome) -> None:
        """A run ended; messages go out in the background."""
        self._metrics.ended(volume, kind, outcome)
        policy = self._policy(volume)
        if policy is not None:
            self._later(self._notifier.ended(policy, volume, kind, outcome))

    def metrics(self) -> bytes:
        """Prometheus' text."""
        return self._metrics.render()

    def _counts(self, run: Run) -> bool:
        try:
            outcome = self._journal.run(run.journal).outcome
        except NotFound:
            return True
        return outcome is not None and outcome.good

    def _policy(self, volume: str) -> Policy | None:
        try:
            return self._book.of(volume)
        except LazaretteError:
            return None

    def _watched(self) -> list[Watched]:
        return [
            Watched(
                policy.name,
                self._journal.protection(volume, policy.rpo_ns, policy.rto_ns),
                self._journal.skipped(policy.name, 0),
            )
            for volume, policy in self._book.all().items()
        ]

    def _later(self, telling: Awaitable[list[str]]) -> None:
        async def tell() -> None:
            for problem in await telling:
                log.warning("%s", problem)

        task = asyncio.create_task(tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            for volume, policy in (await asyncio.to_thread(self._book.all)).items():
                seen = self._journal.protection(volume, policy.rpo_ns, policy.rto_ns)
                for problem in await self._notifier.looked_at(policy, seen):
                    log.warning("%s", problem)

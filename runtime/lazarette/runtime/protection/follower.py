"""Follows the policies: runs them when they are due, then applies what they keep."""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lazarette.backup.copying import ORIGIN_TAG
from lazarette.backup.jobs.model import LOG_PREFIX, ForgetJob, Request
from lazarette.backup.policy.durations import format_duration
from lazarette.backup.policy.journal import Journal, Reason
from lazarette.backup.policy.model import HoldMode, Hook, Policy
from lazarette.backup.policy.retention import Decision, Keep, plan
from lazarette.backup.policy.scheduler import Scheduler
from lazarette.backup.recovery import wal
from lazarette.runtime.events import Event, EventBus
from lazarette.runtime.protection import watching
from lazarette.runtime.protection.backups import MANUAL, BackupRunning, BackupService, Limits
from lazarette.runtime.protection.copies import CopyService
from lazarette.runtime.protection.drills import Drills
from lazarette.runtime.protection.jobs import JobRunner
from lazarette.runtime.protection.policies import PolicyBook
from lazarette.runtime.protection.repositories import (
    RepositoryBook,
    known_name,
    repository_of,
)
from lazarette.runtime.protection.restores import RestoreService
from lazarette.runtime.protection.runs import Run
from lazarette.storage.clock import Clock
from lazarette.storage.errors import LazaretteError, NotFound

log = logging.getLogger(__name__)

_PRUNE_AFTER = 20
_LOOK_S = 5.0
_GROUPS_AT_ONCE = 4
_DRILL = "drill of "
_DONE = ("ok", "warnings")


@dataclass(frozen=True)
class _Point:
    """A restore point as retention looks at it."""

    id: str
    time_ns: int
    tags: Sequence[str]
    good: bool


class PolicyFollower:
    """Runs policies.

    Args:
        book: which policy applies to which volume.
        backups: makes backups.
        restores: knows the points there are.
        repositories: where to.
        jobs: forgets and prunes.
        journal: remembers.
        database: the daemon's, for the schedule's jobs.
        events: volumes and containers that come and go change what applies.
        drills: proves that backups come back.
        clock: time.
        parallel: policies that run at once.
    """

    def __init__(
        self,
        book: PolicyBook,
        backups: BackupService,
        restores: RestoreService,
        repositories: RepositoryBook,
        jobs: JobRunner,
        journal: Journal,
        database: Path,
        events: EventBus,
        drills: Drills,
        clock: Clock,
        parallel: int = 2,
    ) -> None:
        self.book = book
        self._backups = backups
        self._restores = restores
        self._repositories = repositories
        self._jobs = jobs
        self._copies = CopyService(repositories, jobs, journal)
        self._clock = clock
        self._journal = journal
        self._drills = drills
        self._scheduler = Scheduler(database, self._carry_out, clock, journal, parallel=parallel)
        self._members: dict[str, list[str]] = {}
        self._forgotten: dict[str, int] = {}
        self._groups_at_once = asyncio.Semaphore(_GROUPS_AT_ONCE)
        self.passive: Callable[[str], bool] = lambda volume: False
        """Whether a volume follows another host's backups and makes none of its own."""
        self._changed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        backups.on_adopted(self._after_adopted)
        events.on_event(self._notice)

    async def start(self) -> None:
        """Begin to follow; what was missed meanwhile runs once."""
        self._scheduler.start(await asyncio.to_thread(self._collect))
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Begin nothing any more; running jobs go on by themselves."""
        await watching.end(self._watcher)
        await self._scheduler.stop()

    async def refresh(self) -> None:
        """Look again at what applies to which volume."""
        self._scheduler.replace(await asyncio.to_thread(self._collect))

    def describe(self, volume: str) -> dict[str, object]:
        """What applies to a volume, from where, and the next run with its zone.

        Raises:
            NotFound: no such volume, or nothing protects it.
        """
        policy = self.book.of(volume)
        if policy is None:
            raise NotFound(
                f"no policy applies to volume {volume}",
                hint=f"laz policy set {volume} --every 15m",
            )
        return _describe(volume, policy, self.next_run(policy))

    def describe_all(self) -> list[dict[str, object]]:
        """Every protected volume."""
        return [
            _describe(volume, policy, self.next_run(policy))
            for volume, policy in self.book.all().items()
        ]

    def next_run(self, policy: Policy) -> str:
        """When a policy runs next, in its zone; empty when it is not followed yet."""
        try:
            due = self._scheduler.next_run(policy.name)
        except NotFound:
            return ""
        return f"{due.isoformat(timespec='seconds')} {policy.zone.key}"

    async def decide(self, volume: str, policy: Policy) -> list[Decision]:
        """What retention would do with a volume's points now (a dry run).

        Raises:
            RemovesEverything: nothing would be left.
        """
        return await self._decide(volume, policy, self._repository(policy), policy.keep)

    async def _decide(self, volume: str, policy: Policy, name: str, keep: Keep) -> list[Decision]:
        doubtful = self._journal.suspicious_snapshots(volume)
        points = [
            _Point(one.id, one.time_ns, tuple(one.tags), one.id not in doubtful)
            for one in await self._restores.points(volume, name)
        ]
        return plan(points, keep, self._clock.now_ns(), policy.zone)

    # ---- what happens when

    def _notice(self, event: Event) -> None:
        if (event.type, event.action) in _TELLING:
            self._changed.set()

    async def _watch(self) -> None:
        """The policy file and labels are looked at when something changed, and now and then."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):  # wait_for may swallow a cancellation
                    await self._changed.wait()
            self._changed.clear()
            await self.refresh()

    def _collect(self) -> list[Policy]:
        """The policies that mean a volume that is there."""
        members: dict[str, list[str]] = {}
        found: dict[str, Policy] = {}
        for volume, policy in self.book.all().items():
            members.setdefault(policy.name, []).append(volume)
            found[policy.name] = policy
        self._members = members
        self._journal.watch([name for names in members.values() for name in names])
        drills = [_drill_of(policy) for policy in found.values() if policy.drill is not None]
        return [*found.values(), *(each for each in drills if each is not None)]

    async def _carry_out(self, policy: Policy, reason: Reason) -> None:
        if policy.name.startswith(_DRILL):
            await self._drill(policy, reason)
            return
        members = self._members.get(policy.name, [])
        volumes = [each for each in members if not self.passive(each)]
        if not volumes:
            return
        try:
            repository = self._repository(policy)
        except LazaretteError as error:
            self._backups.refuse(volumes, policy.name, reason, error)
            return
        await asyncio.gather(
            *(
                self._save(group, policy, repository, reason)
                for group in await asyncio.to_thread(self.book.groups, volumes)
            )
        )

    async def _save(
        self, volumes: Sequence[str], policy: Policy, repository: str, reason: Reason
    ) -> None:
        """Back up one group of volumes, at one instant, and what comes after it."""
        try:
            async with self._groups_at_once:
                runs = await self._backups.run(
                    volumes,
                    repository=repository,
                    policy=policy.name,
                    reason=reason,
                    rule=policy.consistency,
                    limits=Limits(str(policy.upload), str(policy.read), policy.zone.key),
                )
        except BackupRunning:
            self._journal.skipped(policy.name)
            return
        except LazaretteError as error:  # in the journal, and told
            log.error("policy %s: %s", policy.name, error)
            return
        for run in runs:
            await self._after(run, policy)

    async def _after(self, run: Run, policy: Policy) -> None:
        """Copy what was backed up, then forget what the policy does not keep."""
        if run.outcome not in _DONE:
            return
        try:
            await self._copy(run.volume, run.snapshot, run.repository, policy)
            await self._apply_retention(run.volume, policy, run.repository, policy.keep)
        except LazaretteError as error:
            log.error("after the backup of %s: %s", run.volume, error)

    async def _after_adopted(self, run: Run) -> None:
        """What the daemon that began a run did not live to do."""
        try:
            policy = self.book.of(run.volume)
        except LazaretteError:
            return
        if policy is not None and run.trigger != MANUAL:
            await self._after(run, policy)

    async def _copy(self, volume: str, snapshot: str, source: str, policy: Policy) -> None:
        for wanted in policy.copies:
            target = self._known(wanted, policy)
            missing = await self._missing(volume, snapshot, source, target)
            outcome = await self._copies.run(
                volume,
                missing,
                source,
                target,
                policy.name,
                str(policy.upload),
                policy.zone.key,
            )
            if outcome.good and policy.copy_keep is not None:
                await self._apply_retention(volume, policy, target, policy.copy_keep)

    async def _missing(self, volume: str, newest: str, source: str, target: str) -> list[str]:
        """What the other repository lacks: the newest, and what failed to get there before."""
        try:
            there = await self._restores.points(volume, target)
        except LazaretteError:
            return [newest]  # the copy will say what is wrong
        copied = {one.tags.get(ORIGIN_TAG) for one in there}
        last_ns = max((one.time_ns for one in there), default=None)
        doubtful = self._journal.suspicious_snapshots(volume)
        return [
            one.id
            for one in await self._restores.points(volume, source)
            if one.id == newest
            or (last_ns is not None and one.time_ns > last_ns and one.id not in copied | doubtful)
        ]

    async def _drill(self, policy: Policy, reason: Reason) -> None:
        for volume in self._members.get(policy.name.removeprefix(_DRILL), []):
            try:
                await self._drills.run(volume, self._repository(policy), reason)
            except LazaretteError as error:
                log.error("drill of %s: %s", volume, error)

    async def _apply_retention(self, volume: str, policy: Policy, name: str, keep: Keep) -> None:
        decisions = await self._decide(volume, policy, name, keep)
        gone = [one.snapshot.id for one in decisions if not one.keep]
        if not gone:
            return
        oldest_ns = min(one.snapshot.time_ns for one in decisions if one.keep)
        gone += wal.spent(await self._restores.points(LOG_PREFIX + volume, name), oldest_ns)
        count = self._forgotten.get(name, 0) + len(gone)
        prune = count >= _PRUNE_AFTER
        self._forgotten[name] = 0 if prune else count
        access = self._repositories.get(name).access
        result = await self._jobs.run(
            Request(ForgetJob(gone, prune), access, str(self._repositories.cache))
        )
        if result.failure is not None:
            log.error("forgetting in %s: %s", name, result.failure.message)

    def _repository(self, policy: Policy) -> str:
        """The name of a policy's repository; a policy may give its URL.

        Raises:
            RepositoryUnknown: this daemon does not know it.
        """
        return repository_of(self._repositories, policy)

    def _known(self, wanted: str, policy: Policy) -> str:
        return known_name(self._repositories, wanted, policy)


_TELLING = {
    ("volume", "create"),
    ("volume", "destroy"),
    ("container", "create"),
    ("container", "destroy"),
}


def _drill_of(policy: Policy) -> Policy | None:
    """A policy's drills as a policy of their own, for the scheduler."""
    if policy.drill is None:
        return None
    return replace(
        policy, name=_DRILL + policy.name, schedule=policy.drill.schedule, windows=(), jitter_ns=0
    )


def _describe(volume: str, policy: Policy, next_run: str) -> dict[str, object]:
    return {
        "volume": volume,
        "policy": policy.name,
        "schedule": str(policy.schedule),
        "zone": policy.zone.key,
        "keep": str(policy.keep),
        "repository": policy.repository,
        "consistency": policy.consistency.profile,
        "mode": policy.consistency.mode.value,
        "origin": f"{policy.origin.value}: {policy.source}",
        "next_run": next_run,
        "details": _details(policy),
    }


def _details(policy: Policy) -> dict[str, object]:
    """The rest of a policy, of what it says at all; URLs that may hold secrets are counted."""
    drill, tell, rule = policy.drill, policy.tell, policy.consistency
    said: dict[str, object] = {
        "saved_as": policy.name,
        "consistency": rule.profile if rule.mode is HoldMode.SNAPSHOT else rule.mode.value,
        "before": [_hook(hook) for hook in rule.before],
        "after": [_hook(hook) for hook in rule.after],
        "windows": [str(window) for window in policy.windows],
        "upload": str(policy.upload),
        "read": str(policy.read),
        "jitter": format_duration(policy.jitter_ns) if policy.jitter_ns else "",
        "copies": list(policy.copies),
        "copies_keep": str(policy.copy_keep) if policy.copy_keep else "",
        "rpo_target": format_duration(policy.rpo_ns),
        "rto_target": format_duration(policy.rto_ns) if policy.rto_ns else "",
        "drill": str(drill.schedule) if drill else "",
        "wal": "kept" if policy.wal else "",
        "drill_command": shlex.join(drill.command) if drill else "",
        "notifies": f"{len(tell.urls)} addresses" if tell.urls else "",
        "pings": [
            what
            for what, url in (
                ("start", tell.ping_start),
                ("success", tell.ping_success),
                ("failure", tell.ping_failure),
            )
            if url
        ],
    }
    return {name: value for name, value in said.items() if value}


def _hook(hook: Hook) -> str:
    return f"{hook.container or 'host'}: {shlex.join(hook.argv)}"

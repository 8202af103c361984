"""Runs policies when they are due.

Built on APScheduler, whose job store keeps the jobs in the daemon's database: each policy
is one job, its next run survives restarts, and what was missed meanwhile runs once.  When a
policy is due is decided by :mod:`.schedule` through :class:`PolicyTrigger`; APScheduler
wakes up and keeps.  Added to it here:

* a run that is due while the policy's last one still goes on is skipped and counted;
* at most ``parallel`` policies run at once; the others wait;
* a host's clock set forward or back is noticed within ``watch`` seconds, and every next
  run is found anew (rules S1 and S2 of :mod:`.schedule`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from itertools import count
from pathlib import Path
from zoneinfo import ZoneInfo

from apscheduler.executors.asyncio import AsyncIOExecutor
from apscheduler.jobstores.base import JobLookupError
from apscheduler.jobstores.memory import MemoryJobStore
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from lazarette.backup.policy.journal import Journal, Reason
from lazarette.backup.policy.model import Policy
from lazarette.backup.policy.schedule import (
    instant,
    local,
    missed,
    next_due,
    parse_schedule,
    zone_of,
)
from lazarette.backup.policy.windows import is_open, next_open, parse_window
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import Conflict, NotFound

RunPolicy = Callable[[Policy, Reason], Awaitable[object]]
"""Does what a policy says; its own errors are its own affair, it does not raise."""

_TABLE = "policy_jobs"
_STEP_NS = 2 * NANOSECONDS
_schedulers: dict[int, Scheduler] = {}
_numbers = count(1)


class PolicyTrigger(BaseTrigger):  # type: ignore[misc]
    """When a policy is due next; what APScheduler stores of it is text.

    Args:
        name: of the policy; decides its part of the jitter.
        schedule: text of the schedule.
        zone: name of the policy's zone.
        windows: texts of its windows.
        jitter_ns: how late a run may begin.
    """

    def __init__(
        self, name: str, schedule: str, zone: str, windows: tuple[str, ...], jitter_ns: int
    ) -> None:
        self._said = (name, schedule, zone, windows, jitter_ns)
        self._name = name
        self._schedule = parse_schedule(schedule, zone)
        self._zone = zone_of(zone)
        self._windows = tuple(parse_window(window) for window in windows)
        self._jitter_ns = jitter_ns

    @classmethod
    def of(cls, policy: Policy) -> PolicyTrigger:
        """The trigger of a policy."""
        windows = tuple(str(window) for window in policy.windows)
        schedule = str(policy.schedule)
        return cls(policy.name, schedule, policy.zone.key, windows, policy.jitter_ns)

    def __getstate__(self) -> tuple[str, str, str, tuple[str, ...], int]:
        return self._said

    def __setstate__(self, said: tuple[str, str, str, tuple[str, ...], int]) -> None:
        self.__init__(*said)  # type: ignore[misc]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PolicyTrigger) and self._said == other._said

    def __hash__(self) -> int:
        return hash(self._said)

    def next_ns(self, previous_ns: int | None, now_ns: int) -> int:
        """The next instant after now at which a run begins, jitter included."""
        first = next_due(self._schedule, previous_ns, now_ns - self._jitter_ns)
        due = next_open(self._schedule, self._windows, first - 1, self._zone)
        while due + self._delay(due) <= now_ns or self._has_run(due, previous_ns, now_ns):
            due = next_open(self._schedule, self._windows, due, self._zone)
        return due + self._delay(due)

    def _has_run(self, due_ns: int, previous_ns: int | None, now_ns: int) -> bool:
        """Whether the run just begun was this one: it may begin a moment before it is due.

        After the clock was set back the same time of day comes again, and is another run of a
        spaced schedule (S2).
        """
        return due_ns + self._delay(due_ns) == previous_ns and previous_ns - now_ns < _STEP_NS

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime:
        """See APScheduler's ``BaseTrigger``."""
        previous = None if previous_fire_time is None else instant(previous_fire_time)
        return local(self.next_ns(previous, instant(now)), self._zone)

    def _delay(self, due_ns: int) -> int:
        """Late by this much: the same for a policy and a due time, spread over policies."""
        if self._jitter_ns == 0:
            return 0
        digest = hashlib.blake2b(f"{self._name} {due_ns}".encode(), digest_size=8).digest()
        micros = int.from_bytes(digest, "big") % (self._jitter_ns // 1000 + 1)
        return micros * 1000


class AlreadyRunning(Conflict):
    """The policy's last run still goes on."""

    number = 262


class Scheduler:
    """Runs policies; one in a daemon.

    Args:
        database: the daemon's database file; None keeps jobs in memory, for tests.
        run: does what a policy says.
        clock: to notice that the host's clock was set.
        journal: where skipped runs are counted and the last due instants are kept.
        parallel: policies that run at once.
        watch: seconds between looks at the clock.
    """

    def __init__(
        self,
        database: Path | None,
        run: RunPolicy,
        clock: Clock,
        journal: Journal,
        *,
        parallel: int = 2,
        watch: float = 2.0,
    ) -> None:
        self._run = run
        self._clock = clock
        self._journal = journal
        self._gate = asyncio.Semaphore(parallel)
        self._watch_seconds = watch
        self._policies: dict[str, Policy] = {}
        self._running: set[str] = set()
        self._missed: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._number = next(_numbers)
        self._engine = (
            None
            if database is None
            else create_engine(
                f"sqlite:///{database}", poolclass=NullPool, connect_args={"timeout": 10}
            )
        )
        jobs = (
            MemoryJobStore()
            if self._engine is None
            else SQLAlchemyJobStore(engine=self._engine, tablename=_TABLE)
        )
        self._scheduler = AsyncIOScheduler(
            jobstores={"default": jobs},
            executors={"default": AsyncIOExecutor()},
            job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1000},
            timezone=ZoneInfo("UTC"),
        )

    @property
    def running(self) -> frozenset[str]:
        """Names of the policies that run or wait for their turn."""
        return frozenset(self._running)

    def start(self, policies: Iterable[Policy]) -> None:
        """Begin; what was missed since the daemon's last life runs once, soon."""
        _schedulers[self._number] = self
        self._scheduler.start(paused=True)
        known = list(policies)
        now = self._clock.now_ns()
        self._missed = {
            policy.name
            for policy in known
            if missed(policy.schedule, self._journal.last_fired(policy.name), now)
            or self._journal.is_pending(policy.name)
        }
        self.replace(known)
        self._scheduler.resume()
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """End: no run begins any more; those going on are cancelled and awaited."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        _schedulers.pop(self._number, None)
        if self._engine is not None:
            self._engine.dispose()

    def replace(self, policies: Iterable[Policy]) -> None:
        """Take these policies instead of those before; unchanged ones keep their next run."""
        self._policies = {policy.name: policy for policy in policies}
        for job in self._scheduler.get_jobs():
            if job.id not in self._policies:
                self._scheduler.remove_job(job.id)
        for policy in self._policies.values():
            self._schedule(policy)

    def next_run(self, name: str) -> datetime:
        """When a policy runs next, in its zone.

        Raises:
            NotFound: there is no such policy.
        """
        job = self._scheduler.get_job(name)
        if job is None or name not in self._policies:
            raise NotFound(f"no policy {name} is scheduled")
        due: datetime = job.next_run_time
        return due.astimezone(self._policies[name].zone)

    def run_now(self, name: str) -> None:
        """Begin a run at once, out of turn.

        Raises:
            NotFound: there is no such policy.
            AlreadyRunning: its last run still goes on.
        """
        if name not in self._policies:
            raise NotFound(f"no policy is called {name}")
        if name in self._running:
            raise AlreadyRunning(f"policy {name} is running already")
        self._begin(name, Reason.ASKED)

    def due(self, name: str) -> None:
        """A job fired: begin the run, or skip it."""
        policy = self._policies.get(name)
        if policy is None:
            return
        now = self._clock.now_ns()
        in_time = (now, now - policy.jitter_ns)
        allowed = any(is_open(policy.windows, moment, policy.zone) for moment in in_time)
        begins = allowed and name not in self._running
        self._journal.fired(name, now, pending=begins)
        if name in self._running:
            self._journal.skipped(name)
            return
        reason = Reason.MISSED if name in self._missed else Reason.SCHEDULE
        self._missed.discard(name)
        if begins:
            self._begin(name, reason)

    def _schedule(self, policy: Policy) -> None:
        trigger = PolicyTrigger.of(policy)
        job = self._scheduler.get_job(policy.name)
        if job is not None and job.trigger == trigger:
            if job.args != (self._number, policy.name):  # kept by another life of the daemon
                self._scheduler.modify_job(policy.name, args=(self._number, policy.name))
            return
        now, last = self._clock.now_ns(), self._journal.last_fired(policy.name)
        due = now if policy.name in self._missed else trigger.next_ns(last, now)
        self._scheduler.add_job(
            _fire,
            trigger,
            args=(self._number, policy.name),
            id=policy.name,
            next_run_time=local(due, policy.zone),
            replace_existing=True,
        )

    def _begin(self, name: str, reason: Reason) -> None:
        self._running.add(name)
        task = asyncio.get_running_loop().create_task(self._carry_out(name, reason))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, name: str, reason: Reason) -> None:
        try:
            async with self._gate:
                policy = self._policies.get(name)
                if policy is not None:
                    await self._run(policy, reason)
            self._journal.taken(name)
        finally:
            self._running.discard(name)

    async def _watch(self) -> None:
        """Notice a clock that was set: wall and steady time then disagree."""
        difference = self._clock.now_ns() - self._clock.monotonic_ns()
        while True:
            await asyncio.sleep(self._watch_seconds)
            now = self._clock.now_ns() - self._clock.monotonic_ns()
            if abs(now - difference) > _STEP_NS:
                self.clock_was_set(now - difference)
            difference = now

    def clock_was_set(self, by_ns: int) -> None:
        """Find every next run anew.

        Args:
            by_ns: forward, or back when negative.
        """
        for job in self._scheduler.get_jobs():
            policy = self._policies.get(job.id)
            if policy is None:
                continue
            now = self._clock.now_ns()
            if by_ns > 0 and instant(job.next_run_time) <= now:
                continue  # it is due, once; APScheduler wakes for it below
            trigger: PolicyTrigger = job.trigger
            due = trigger.next_ns(self._journal.last_fired(job.id), now)
            try:
                self._scheduler.modify_job(job.id, next_run_time=local(due, policy.zone))
            except JobLookupError:
                continue
        self._scheduler.wakeup()


async def _fire(number: int, name: str) -> None:
    """What the job store names: it finds the scheduler of this process."""
    scheduler = _schedulers.get(number)
    if scheduler is not None:
        scheduler.due(name)

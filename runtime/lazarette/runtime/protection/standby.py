"""Warm standby: volumes that follow another host's backups, ready to take over.

A followed volume always equals one whole snapshot of the repository.  Each newer one is
applied as a difference to the one before::

    applied A ──write down B──▶ applying ──job──▶ local snapshot of B ──▶ applied B
                                   │
              failure or crash: rolled back to the local snapshot of A

Nobody else can mount the volume meanwhile.  *Promoting* takes the history over (see
:mod:`lazarette.runtime.protection.fencing`), applies what is newest, and starts the
containers recorded with it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress

from lazarette.backup.jobs.model import DAMAGED, Progress, Request, RestoreJob, Result
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.runtime.protection.definitions import Definitions
from lazarette.runtime.protection.fencing import Fencing
from lazarette.runtime.protection.jobs import Job, JobRunner
from lazarette.runtime.protection.recovery import HostRecovery, Report
from lazarette.runtime.protection.repositories import RepositoryBook
from lazarette.runtime.protection.restores import LATEST, RestoreService, choose_point
from lazarette.runtime.protection.standbys import (
    FollowsAlready,
    NotFollowing,
    Standby,
    StandbyBook,
)
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import (
    Cancelled,
    InternalError,
    InUse,
    LazaretteError,
    NameTaken,
    SnapshotNotFound,
    Unsupported,
    VolumeNotFound,
)
from lazarette.storage.state import State
from lazarette.storage.volumes.contract import OpenGate
from lazarette.storage.volumes.manager import VolumeManager

log = logging.getLogger(__name__)

_PREFIX = "standby-"


class _Halted(Exception):
    """Following ends while a job is under way."""


class StandbyService:
    """Follows histories and takes them over.

    Args:
        volumes: the volumes.
        repositories: where histories are.
        restores: lists points and makes volumes.
        recovery: brings containers back.
        fencing: takes histories over.
        jobs: starts the processes.
        state: the daemon's database.
        clock: time.
    """

    def __init__(
        self,
        volumes: VolumeManager,
        repositories: RepositoryBook,
        restores: RestoreService,
        recovery: HostRecovery,
        fencing: Fencing,
        jobs: JobRunner,
        state: State,
        clock: Clock,
    ) -> None:
        self._volumes = volumes
        self._repositories = repositories
        self._restores = restores
        self._recovery = recovery
        self._fencing = fencing
        self._jobs = jobs
        self._clock = clock
        self.book = StandbyBook(state)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ending: dict[str, asyncio.Event] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._finishing: set[asyncio.Task[Report]] = set()
        fencing.passive = self.follows
        for one in self.book.all():
            if not one.promoted:
                self._reserve(one.volume, one.repository)

    def follows(self, volume: str) -> bool:
        """Whether a volume is a standby that was not taken over."""
        one = self.book.find(volume)
        return one is not None and not one.promoted

    def unfinished(self) -> set[str]:
        """Ids of jobs that apply a snapshot."""
        return {one.job for one in self.book.all() if one.job}

    async def start(self) -> None:
        """Go on following what an earlier daemon followed."""
        for one in self.book.all():
            if one.promoted:
                task = asyncio.create_task(self.promote(one.volume))
                self._finishing.add(task)
                task.add_done_callback(self._finishing.discard)
            else:
                self._begin(one.volume)

    async def stop(self) -> None:
        """Follow no more; a running job goes on and is taken up at the next start."""
        for volume in list(self._tasks):
            self._ending[volume].set()
        for volume in list(self._tasks):
            await self._halt(volume)

    def get(self, volume: str) -> Standby:
        """One standby.

        Raises:
            NotFollowing: it is none.
        """
        found = self.book.find(volume)
        if found is None:
            raise NotFollowing(
                f"volume {volume} follows nothing here",
                hint=f"laz standby follow {volume} --repo NAME",
            )
        return found

    async def follow(
        self,
        volume: str,
        repository: str = "",
        every_ns: int = 10 * NANOSECONDS,
        over: bool = False,
    ) -> Standby:
        """Let a volume follow its history in a repository; returns before the first apply.

        Args:
            volume: its name there, and here.
            repository: where; the only one, or ``default``, when empty.
            every_ns: how often to look for newer snapshots.
            over: a volume of that name here becomes the standby; what it was is kept in a
                snapshot of it.

        Raises:
            SnapshotNotFound: the repository has no snapshot of it.
            NameTaken: the volume exists and ``over`` was not asked for.
            InUse: containers use it.
            FollowsAlready: it does already.
            Unsupported: its driver cannot roll back.
        """
        known = self._repositories.get(repository)
        if self.book.find(volume) is not None:
            raise FollowsAlready(f"volume {volume} follows already", hint="laz standby ls")
        record = choose_point(await self._restores.points(volume, known.name), LATEST)
        try:
            existing = self._volumes.get(volume)
        except VolumeNotFound:
            existing = None
        if existing is None:
            await asyncio.to_thread(self._restores.make, volume, record)
        elif not over:
            raise NameTaken(
                f"volume {volume} exists", hint="--over makes it the standby, keeping a snapshot"
            )
        elif existing.users:
            raise InUse(
                f"volume {volume} is used by {', '.join(existing.users)}", hint="stop them first"
            )
        driver = self._volumes.driver(self._volumes.get(volume).driver)
        if not driver.capabilities.rollback:
            if existing is None:
                await asyncio.to_thread(self._volumes.remove, volume)
            raise Unsupported(
                f"a standby needs a driver that rolls back, {driver.capabilities.name} does not"
            )
        safety = ""
        if existing is not None:
            safety = f"before-standby-{secrets.token_hex(4)}"
            await asyncio.to_thread(self._volumes.snapshot, [volume], OpenGate(), safety)
        self.book.add(Standby(volume, known.name, every_ns, local=safety, fresh=existing is None))
        self._reserve(volume, known.name)
        self._begin(volume)
        return self.get(volume)

    async def end(self, volume: str) -> None:
        """Follow no more; the volume stays as the last whole snapshot.

        Raises:
            NotFollowing: it is no standby.
        """
        self.get(volume)
        await self._halt(volume)
        async with self._lock(volume):
            await self._repair(volume)
            one = self.get(volume)
            await asyncio.to_thread(self._free, volume)
            if one.fresh and not one.applied:  # nothing has arrived: it equals no snapshot
                await asyncio.to_thread(self._volumes.remove, volume)

    async def promote(
        self,
        volume: str,
        *,
        start: bool = True,
        show: Callable[[Progress], None] = lambda progress: None,
    ) -> Report:
        """Take a history over: fence its owner, apply what is newest, start the containers.

        Repeatable until it succeeds.

        Raises:
            NotFollowing: it is no standby.
            TakenMeanwhile, Fenced: another host does the same.
            StoreUnavailable: nobody could be fenced, and nothing changed.
        """
        one = self.get(volume)
        if not one.promoted:
            await self._halt(volume)
            try:
                await self._take_over(one, show)
            except BaseException:
                self._begin(volume)
                raise
        points = await self._restores.points(volume, one.repository)
        applied = choose_point(points, self.get(volume).applied)
        report = await self._recovery.bring(
            Definitions.parse(applied.meta), one.repository, start=start
        )
        self.book.remove(volume)
        return report

    async def _take_over(self, one: Standby, show: Callable[[Progress], None]) -> None:
        async with self._lock(one.volume):
            await asyncio.to_thread(self._fencing.claim, one.volume, one.repository)
            await self._repair(one.volume)
            await self._apply_newest(one.volume, show, asyncio.Event())
            await asyncio.to_thread(self._fencing.check, one.volume, one.repository)
            self.book.change(one.volume, promoted=1)
            await asyncio.to_thread(self._sweep, one.volume, "")
            self._volumes.release(one.volume)

    # ---- following

    def _begin(self, volume: str) -> None:
        self._ending[volume] = asyncio.Event()
        self._tasks[volume] = asyncio.create_task(self._follow(volume, self._ending[volume]))

    async def _halt(self, volume: str) -> None:
        task = self._tasks.pop(volume, None)
        if task is not None:
            self._ending[volume].set()
            await task

    def _lock(self, volume: str) -> asyncio.Lock:
        return self._locks.setdefault(volume, asyncio.Lock())

    async def _follow(self, volume: str, ending: asyncio.Event) -> None:
        while not ending.is_set():
            one = self.book.find(volume)
            if one is None:
                return
            try:
                async with self._lock(volume):
                    await self._repair(volume)
                    await self._apply_newest(volume, lambda progress: None, ending)
                self.book.change(volume, checked_ns=self._clock.now_ns(), error="")
            except _Halted:
                return
            except LazaretteError as error:
                log.warning("standby %s: %s", volume, error)
                self.book.change(volume, error=error.message)
            except Exception:
                log.exception("standby %s", volume)
                self.book.change(volume, error="internal error, see the daemon's log")
            with suppress(TimeoutError):
                async with asyncio.timeout(one.every_ns / NANOSECONDS):
                    await ending.wait()

    async def _apply_newest(
        self, volume: str, show: Callable[[Progress], None], ending: asyncio.Event
    ) -> None:
        one = self.get(volume)
        points = await self._restores.points(volume, one.repository)
        if not points:
            raise SnapshotNotFound(f"repository {one.repository} has no snapshot of {volume}")
        newest = points[-1]
        if newest.id != one.applied:
            await self._apply(one, newest, show, ending)

    async def _apply(
        self,
        one: Standby,
        record: SnapshotRecord,
        show: Callable[[Progress], None],
        ending: asyncio.Event,
    ) -> None:
        job_id = secrets.token_hex(16)
        self.book.change(one.volume, applying=record.id, job=job_id)
        folder = await asyncio.to_thread(self._volumes.mount, one.volume, _user(one.volume))
        access = self._repositories.get(one.repository).access
        job = RestoreJob(record.id, str(folder), in_place=True, known=one.applied)
        started = self._jobs.start(job_id, Request(job, access, str(self._repositories.cache)))
        result = await self._watch(started, show, ending)
        if result.outcome not in ("ok", "warnings") or _lost(result):
            await self._repair(one.volume)
            raise _failure(one.volume, record, result)
        await asyncio.to_thread(self._applied, self.get(one.volume), record, result)

    async def _watch(
        self, job: Job, show: Callable[[Progress], None], ending: asyncio.Event
    ) -> Result:
        """Follow a job to its end, unless following ends before; the job goes on then."""
        watching = asyncio.create_task(self._jobs.watch(job, show))
        waiting = asyncio.create_task(ending.wait())
        await asyncio.wait({watching, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if watching.done():
            return watching.result()
        watching.cancel()
        raise _Halted

    def _applied(self, one: Standby, record: SnapshotRecord, result: Result) -> None:
        """Keep the new state by a snapshot, then let go of the one before."""
        volume = one.volume
        self._volumes.unmount(volume, _user(volume))
        local = f"{_PREFIX}{record.id[:16]}-{secrets.token_hex(4)}"
        self._volumes.snapshot([volume], OpenGate(), local)
        self.book.change(
            volume,
            applied=record.id,
            applied_time_ns=record.time_ns,
            local=local,
            applying="",
            job="",
            bytes_written=result.bytes_read,
        )
        self._jobs.discard(one.job)
        self._sweep(volume, local)

    def _sweep(self, volume: str, keep: str) -> None:
        for info in self._volumes.snapshots(volume):
            if info.id.startswith(_PREFIX) and info.id != keep:
                self._volumes.delete_snapshot(volume, info.id)

    async def _repair(self, volume: str) -> None:
        """Undo an apply that did not end: the volume equals a whole snapshot afterwards."""
        one = self.get(volume)
        if not one.applying:
            return
        job = self._jobs.find(one.job)
        if job is not None and job.alive():
            self._jobs.cancel(job)
            await self._jobs.watch(job, lambda progress: None)
        await asyncio.to_thread(self._roll_back, one)

    def _roll_back(self, one: Standby) -> None:
        volume = one.volume
        self._volumes.unmount(volume, _user(volume))
        if one.local:
            safety = self._volumes.rollback(volume, one.local, _user(volume))
            self._volumes.delete_snapshot(volume, safety)
        self._sweep(volume, one.local)
        self.book.change(volume, applying="", job="")
        self._jobs.discard(one.job)

    def _reserve(self, volume: str, repository: str) -> None:
        self._volumes.reserve(
            volume,
            _user(volume),
            f"it follows repository {repository} (laz standby promote {volume}, or stop)",
        )

    def _free(self, volume: str) -> None:
        """Make an ordinary volume of a standby; repeatable."""
        self._sweep(volume, "")
        self.book.remove(volume)
        self._volumes.release(volume)


def _user(volume: str) -> str:
    return f"standby:{volume}"


def _lost(result: Result) -> list[str]:
    return [line for line in result.warnings if line.startswith(DAMAGED)]


def _failure(volume: str, record: SnapshotRecord, result: Result) -> LazaretteError:
    if result.failure is not None:
        return result.failure.error()
    if result.outcome == "cancelled":
        return Cancelled(f"applying {record.id[:12]} to {volume} was cancelled")
    told = "; ".join(_lost(result)[:3])
    return InternalError(f"snapshot {record.id[:12]} cannot be applied whole to {volume}: {told}")

"""Restores: a point of a volume's past as a volume again."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo

import msgspec

from lazarette.backup.jobs.model import LOG_PREFIX, Progress, Replay, Request, RestoreJob, Result
from lazarette.backup.recovery import wal
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.runtime.protection.definitions import Definitions, VolumeDefinition
from lazarette.runtime.protection.fills import FillService
from lazarette.runtime.protection.inplace import InPlace, Users, user_of
from lazarette.runtime.protection.jobs import JobRunner
from lazarette.runtime.protection.repositories import RepositoryBook
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import (
    InvalidArgument,
    NameTaken,
    SnapshotNotFound,
    VolumeNotFound,
)
from lazarette.storage.state import State
from lazarette.storage.volumes.manager import VolumeManager

LATEST = "latest"
_ID = re.compile(r"[0-9a-f]{4,32}")


@dataclass(frozen=True)
class Restored:
    """A finished restore: the volume, how the job ended, and the way back if there is one."""

    volume: str
    snapshot: str
    result: Result
    safety: str = ""


def choose_point(
    records: Sequence[SnapshotRecord], point: str, zone: tzinfo = UTC
) -> SnapshotRecord:
    """The snapshot a person means.

    Args:
        records: snapshots of one volume, oldest first.
        point: ``latest``, the beginning of an id, or a time (``2026-11-25 10:04:30``,
            with or without an offset): the newest snapshot at or before it.
        zone: of times without an offset.

    Raises:
        SnapshotNotFound: none fits.
        InvalidArgument: several ids begin so, or it is no time.
    """
    if not records:
        raise SnapshotNotFound("there is no backup of this volume", hint="laz backup ls")
    if point in ("", LATEST):
        return records[-1]
    if _ID.fullmatch(point):
        found = [record for record in records if record.id.startswith(point)]
        if len(found) > 1:
            raise InvalidArgument(f"{len(found)} snapshots begin with {point}")
        if found:
            return found[0]
    limit = moment_of(point, zone)
    before = [record for record in records if record.time_ns <= limit]
    if not before:
        raise SnapshotNotFound(f"no backup of this volume is as old as {point}")
    return before[-1]


def moment_of(text: str, zone: tzinfo = UTC) -> int:
    """A time as people write it, with or without an offset from UTC.

    Raises:
        SnapshotNotFound: it is none.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as bad:
        raise SnapshotNotFound(
            f"no snapshot {text} of this volume", hint="name an id, a time or latest"
        ) from bad
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zone)
    whole = moment.replace(microsecond=0).timestamp()
    return int(whole) * NANOSECONDS + moment.microsecond * 1000


_MIGRATIONS = (
    """
    CREATE TABLE restores (
        job TEXT PRIMARY KEY,
        volume TEXT NOT NULL,
        fresh INTEGER NOT NULL
    ) STRICT
    """,
)


class RestoreService:
    """Brings volumes back.

    A restore is written down before its volume is made; one that ended badly, with its
    daemon or by itself, takes the half-filled volume away again.

    Args:
        volumes: the volumes.
        repositories: where from.
        fills: shows volumes before their data are here.
        jobs: starts the processes.
        state: the daemon's database.
        users: the containers of volumes.

    Attributes:
        in_place: changes volumes that are there.
        freshen: stores what a volume's database has written in a repository, before its log is
            replayed; until which moment all is stored there then, 0 when that is not known.
    """

    def __init__(
        self,
        volumes: VolumeManager,
        repositories: RepositoryBook,
        fills: FillService,
        jobs: JobRunner,
        state: State,
        users: Users,
    ) -> None:
        self.in_place = InPlace(volumes, users, jobs, state)
        self.freshen: Callable[[str, str], Awaitable[int]] = _nothing_newer
        self._fills = fills
        self._volumes = volumes
        self._repositories = repositories
        self._jobs = jobs
        self._state = state
        self._adopted: set[asyncio.Task[None]] = set()
        state.migrate("restores", _MIGRATIONS)

    def unfinished(self) -> set[str]:
        """Jobs of restores that have not been settled."""
        return {str(row["job"]) for row in self._state.rows("SELECT job FROM restores")}

    async def recover(self) -> None:
        """Take up the restores an earlier daemon left: wait for living jobs, undo the rest."""
        changing = asyncio.create_task(self.in_place.recover())
        self._adopted.add(changing)
        changing.add_done_callback(self._adopted.discard)
        for row in self._state.rows("SELECT * FROM restores"):
            task = asyncio.create_task(
                self._take_up(str(row["job"]), str(row["volume"]), bool(row["fresh"]))
            )
            self._adopted.add(task)
            task.add_done_callback(self._adopted.discard)

    async def _take_up(self, job_id: str, volume: str, fresh: bool) -> None:
        job = self._jobs.find(job_id)
        result = Result("failed")
        if job is not None:
            result = await self._jobs.watch(job, lambda progress: None)
        await asyncio.to_thread(self._settle, job_id, volume, fresh, result)

    async def points(self, volume: str | None, repository: str = "") -> list[SnapshotRecord]:
        """The snapshots in a repository, oldest first."""
        opened = await asyncio.to_thread(self._repositories.open, repository)
        return await asyncio.to_thread(opened.snapshots, volume)

    async def restore(
        self,
        volume: str,
        point: str = LATEST,
        *,
        into: str = "",
        repository: str = "",
        instant: bool = False,
        rate: int = 0,
        stop_users: bool = False,
        to_time: str = "",
        show: Callable[[Progress], None] = lambda progress: None,
    ) -> Restored:
        """Restore a point of ``volume`` into a new volume, or over one that is there.

        Of an existing volume only what differs is changed, while its containers are stopped
        if ``stop_users`` says so; it keeps a safety snapshot of what it was.  A new one that
        could not be filled is removed again.  An ``instant`` one can be used when this
        returns, and is filled in the background, at most ``rate`` bytes a second if given.
        With ``to_time`` its database replays its log until that moment when it is started
        next; ``point`` is not looked at then.

        Raises:
            SnapshotNotFound: no such point.
            NotRecoverable: the log to that moment is not there or not whole.
            InUse: the target is used, and its users must not be stopped.
        """
        target = into or volume
        replay: Replay | None = None
        if to_time:
            if instant:
                raise InvalidArgument(
                    "an instant restore to a moment is not possible",
                    hint="without --instant, or a point of laz backup ls",
                )
            chosen = await self._plan(volume, moment_of(to_time), repository)
            record, replay = chosen.base, chosen.replay
        else:
            record = choose_point(await self.points(volume, repository), point)
        try:
            existing = self._volumes.get(target)
        except VolumeNotFound:
            existing = None
        if instant:
            if existing is not None:
                raise NameTaken(
                    f"volume {target} exists", hint="an instant restore needs --as NEWNAME"
                )
            return await asyncio.to_thread(self._show, target, record, repository, rate)
        job_id = secrets.token_hex(16)
        if existing is not None:
            self._fills.require_ordinary(target)
            result, safety = await self.in_place.change(
                target,
                job_id,
                lambda: self._fill(job_id, target, record, repository, True, show, replay),
                stop_users=stop_users,
            )
            return Restored(target, record.id, result, safety)
        self._begin(job_id, target)
        result = Result("failed")
        try:
            await asyncio.to_thread(self.make, target, record)
            result = await self._fill(job_id, target, record, repository, False, show, replay)
        finally:
            await asyncio.to_thread(self._settle, job_id, target, True, result)
        return Restored(target, record.id, result)

    async def _plan(self, volume: str, moment_ns: int, repository: str) -> wal.Plan:
        whole_ns = await self.freshen(volume, self._repositories.get(repository).name)
        bases = await self.points(volume, repository)
        archives = await self.points(LOG_PREFIX + volume, repository)
        return wal.plan(bases, archives, moment_ns, whole_ns)

    async def undo(self, volume: str, *, stop_users: bool = False) -> tuple[str, str]:
        """Take the last restore over a volume back; see :meth:`InPlace.undo`."""
        self._fills.require_ordinary(volume)
        return await self.in_place.undo(volume, stop_users=stop_users)

    def _begin(self, job_id: str, target: str) -> None:
        with self._state.write() as db:
            db.execute("INSERT INTO restores VALUES (?, ?, ?)", (job_id, target, 1))

    def _show(self, target: str, record: SnapshotRecord, repository: str, rate: int) -> Restored:
        self.show(target, record, repository, rate)
        return Restored(target, record.id, Result("ok", snapshot=record.id))

    def show(
        self,
        target: str,
        record: SnapshotRecord,
        repository: str,
        rate: int = 0,
        *,
        lazy: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Make a new volume that shows a snapshot at once; a failed one is removed again.

        Args:
            target: its name.
            record: the snapshot.
            repository: where it is.
            rate: limit of the fill, bytes a second; 0 for none.
            lazy: nothing is fetched that is not read.
            labels: other ones than the volume had.
        """
        job_id, result = secrets.token_hex(16), Result("failed")
        self._begin(job_id, target)
        try:
            self.make(target, record, labels)
            known = self._repositories.get(repository).name
            self._fills.begin(target, known, record, rate, lazy=lazy)
            result = Result("ok")
        finally:
            self._settle(job_id, target, True, result)

    def make(
        self, target: str, record: SnapshotRecord, labels: Mapping[str, str] | None = None
    ) -> None:
        """A new volume as the old one was; on a host without its driver, the default one."""
        known = Definitions.parse(record.meta).volume or VolumeDefinition(target)
        driver = known.driver if known.driver in self._volumes.drivers else ""
        options = known.options if driver else {}
        self._volumes.create(target, driver, options, known.labels if labels is None else labels)

    async def _fill(
        self,
        job_id: str,
        target: str,
        record: SnapshotRecord,
        repository: str,
        in_place: bool,
        show: Callable[[Progress], None],
        replay: Replay | None,
    ) -> Result:
        folder = await asyncio.to_thread(self._volumes.mount, target, user_of(job_id))
        access = self._repositories.get(repository).access
        job = RestoreJob(record.id, str(folder), in_place=in_place, replay=replay)
        started = self._jobs.start(job_id, Request(job, access, str(self._repositories.cache)))
        return await self._jobs.watch(started, show)

    def _settle(self, job_id: str, volume: str, fresh: bool, result: Result) -> None:
        """Let go of the volume; remove it if it was made for this and is not whole."""
        with suppress(VolumeNotFound):
            self._volumes.unmount(volume, user_of(job_id))
            shown = self._fills.of(volume) is not None  # the daemon ended just after it was
            if fresh and not shown and result.outcome not in ("ok", "warnings"):
                self._volumes.remove(volume, force=True)
        with self._state.write() as db:
            db.execute("DELETE FROM restores WHERE job = ?", (job_id,))
        self._jobs.discard(job_id)


async def _nothing_newer(volume: str, repository: str) -> int:
    del volume, repository
    return 0


def encode_point(record: SnapshotRecord) -> dict[str, object]:
    """A restore point as the API shows it."""
    return {
        "id": record.id,
        "volume": record.volume,
        "host": record.host,
        "time_ns": record.time_ns,
        "consistency": record.consistency,
        "labels": record.tags,
        "stats": msgspec.to_builtins(record.stats),
    }

"""Changing a volume that containers use: they stop, it changes, they start again.

Steps, each recorded before the next is begun::

    stopping ──▶ changing ──▶ starting
                    └── failed, or its job died with the daemon: back to the safety snapshot

While it lasts nobody else may mount the volume.  A daemon killed in between sets the volume
right at its next start before any container runs: what had not begun to change is left as it
is, a job that still runs is waited for, everything else goes back to the safety snapshot; then
the containers are started.  The safety snapshot of a change that succeeded stays, for undoing.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import msgspec

from lazarette.backup.jobs.model import Result
from lazarette.fuse import jsontext
from lazarette.runtime.protection.jobs import JobRunner
from lazarette.storage.errors import (
    InUse,
    LazaretteError,
    SnapshotNotFound,
    VolumeNotFound,
)
from lazarette.storage.state import State
from lazarette.storage.volumes.contract import OpenGate
from lazarette.storage.volumes.manager import VolumeManager

log = logging.getLogger(__name__)

BUSY = "it is being restored in place; wait until that has ended: laz status"
_GOOD = ("ok", "warnings")
_MIGRATIONS = (
    """
    CREATE TABLE overwrites (
        volume TEXT PRIMARY KEY,
        job TEXT NOT NULL,
        step TEXT NOT NULL,
        safety TEXT NOT NULL,
        stopped TEXT NOT NULL
    ) STRICT;
    CREATE TABLE safeties (
        volume TEXT PRIMARY KEY,
        safety TEXT NOT NULL
    ) STRICT
    """,
)


class Users(Protocol):
    """The containers that use volumes."""

    def running(self, volume: str) -> Sequence[str]:
        """Ids of those that run, each after those it depends on."""
        ...

    def name(self, container: str) -> str:
        """What people call one."""
        ...

    async def stop(self, container: str) -> int:
        """Stop it as its definition says; its exit code."""
        ...

    async def start(self, container: str) -> None:
        """Start it; nothing happens when it runs or is gone."""
        ...


class Step(Enum):
    """How far a change has come."""

    STOPPING = "stopping"
    CHANGING = "changing"
    UNDOING = "undoing"
    STARTING = "starting"


@dataclass(frozen=True)
class Change:
    """One change under way.

    Attributes:
        volume: what is changed.
        job: id of the job that does it, and of the volume's only user meanwhile.
        step: how far it is.
        safety: snapshot of what was; when undoing, of what shall be again.
        stopped: containers to start again, in that order.
    """

    volume: str
    job: str
    step: Step
    safety: str
    stopped: tuple[str, ...]

    @property
    def user(self) -> str:
        """Who has the volume mounted meanwhile."""
        return user_of(self.job)


def user_of(job: str) -> str:
    """As whom a restore's job mounts its volume."""
    return f"restore:{job}"


class InPlace:
    """Changes volumes in place.

    Args:
        volumes: the volumes.
        users: their containers.
        jobs: to wait for those of an earlier daemon.
        state: the daemon's database.
    """

    def __init__(self, volumes: VolumeManager, users: Users, jobs: JobRunner, state: State) -> None:
        self._volumes = volumes
        self._users = users
        self._jobs = jobs
        self._state = state
        self.changing: Callable[[str], None] = lambda volume: None
        """Told of a volume before its content becomes another state's."""
        state.migrate("changes in place", _MIGRATIONS)

    # ---- after a restart

    def prepare(self) -> None:
        """Set right what an earlier daemon was changing; call before containers are resumed."""
        for change in self.unfinished():
            try:
                self._volumes.reserve(change.volume, change.user, BUSY)
                self._repair(change)
            except VolumeNotFound:
                self._forget(change)
            except (OSError, LazaretteError) as bad:
                log.error("volume %s is not as it was: %s", change.volume, bad)

    def _repair(self, change: Change) -> None:
        if change.step is Step.STOPPING:
            self._volumes.delete_snapshot(change.volume, change.safety)
        elif change.step is Step.CHANGING:
            if self._jobs.find(change.job) is not None:
                return
            self._back(change)
        elif change.step is Step.UNDOING:
            self._back(change)
        if change.step is not Step.STARTING:
            self._record(change, Step.STARTING)

    async def recover(self) -> None:
        """Finish what an earlier daemon was changing; call once containers are known."""
        for change in self.unfinished():
            try:
                if change.step is Step.CHANGING:
                    job = self._jobs.find(change.job)
                    result = Result("failed")
                    if job is not None:
                        result = await self._jobs.watch(job, lambda progress: None)
                    await asyncio.to_thread(self._decide, change, result)
                await self._release(change)
            except LazaretteError as bad:
                log.error("volume %s stays reserved: %s", change.volume, bad)

    def unfinished(self) -> list[Change]:
        """What is under way."""
        return [
            Change(
                str(row["volume"]),
                str(row["job"]),
                Step(str(row["step"])),
                str(row["safety"]),
                tuple(jsontext.decode(str(row["stopped"]), type=list[str])),
            )
            for row in self._state.rows("SELECT * FROM overwrites")
        ]

    # ---- what can be done

    async def change(
        self, volume: str, job: str, work: Callable[[], Awaitable[Result]], *, stop_users: bool
    ) -> tuple[Result, str]:
        """Change a volume that is there; how it ended, and the safety snapshot of before.

        A change that does not end well leaves the volume as it was.

        Raises:
            InUse: containers run that use it and ``stop_users`` is not set, or somebody
                changes it already.
        """
        change = self._begin(volume, job, f"before-restore-{secrets.token_hex(4)}", stop_users)
        try:
            await self._stop(change)
            await asyncio.to_thread(self._volumes.snapshot, [volume], OpenGate(), change.safety)
        except LazaretteError:
            await asyncio.to_thread(self._volumes.delete_snapshot, volume, change.safety)
            await self._release(change)
            raise
        self._record(change, Step.CHANGING)
        try:
            result = await work()
        except LazaretteError:
            await asyncio.to_thread(self._decide, change, Result("failed"))
            await self._release(change)
            raise
        await asyncio.to_thread(self._decide, change, result)
        await self._release(change)
        return result, change.safety if result.outcome in _GOOD else ""

    async def undo(self, volume: str, *, stop_users: bool) -> tuple[str, str]:
        """Take the last change back: the snapshot it is at now, and one of what was undone.

        Undoing twice does it again.

        Raises:
            SnapshotNotFound: nothing was changed in place.
            InUse: as for :meth:`change`.
        """
        self._volumes.get(volume)
        row = self._state.row("SELECT safety FROM safeties WHERE volume = ?", (volume,))
        if row is None:
            raise SnapshotNotFound(
                f"no restore over volume {volume} is known", hint=f"laz volume snapshots {volume}"
            )
        wanted = str(row["safety"])
        if wanted not in {one.id for one in self._volumes.snapshots(volume)}:
            raise SnapshotNotFound(
                f"the snapshot {wanted} of {volume} was removed", hint="laz backup ls"
            )
        change = self._begin(volume, secrets.token_hex(16), wanted, stop_users, keep=True)
        try:
            await self._stop(change)
        except LazaretteError:
            await self._release(change)
            raise
        self._record(change, Step.UNDOING)
        try:
            undone = await asyncio.to_thread(self._volumes.rollback, volume, wanted, change.user)
        except LazaretteError:
            self._record(change, Step.STARTING)
            await self._release(change)
            raise
        with self._state.write():
            self._remember(volume, undone)
            self._record(change, Step.STARTING)
        await self._release(change)
        return wanted, undone

    def users(self, volume: str) -> list[str]:
        """Names of the containers that a change would stop, in the order they start."""
        return [self._users.name(one) for one in self._users.running(volume)]

    async def restart(self, volume: str) -> list[str]:
        """Start the running containers of a volume anew, in order; their names."""
        found = list(self._users.running(volume))
        for one in reversed(found):
            await self._users.stop(one)
        for one in found:
            await self._users.start(one)
        return [self._users.name(one) for one in found]

    # ---- how

    def _begin(
        self, volume: str, job: str, safety: str, stop_users: bool, *, keep: bool = False
    ) -> Change:
        stopped = tuple(self._users.running(volume))
        if stopped and not stop_users:
            names = ", ".join(self._users.name(one) for one in stopped)
            raise InUse(
                f"volume {volume} is used by {names}",
                hint="let them be stopped meanwhile with --yes, or restore with --as NAME",
            )
        self.changing(volume)
        change = Change(volume, job, Step.STARTING if keep else Step.STOPPING, safety, stopped)
        self._volumes.reserve(volume, change.user, BUSY)
        with self._state.write() as db:
            db.execute(
                "INSERT INTO overwrites VALUES (?, ?, ?, ?, ?)",
                (volume, job, change.step.value, safety, msgspec.json.encode(stopped).decode()),
            )
        return change

    async def _stop(self, change: Change) -> None:
        for container in reversed(change.stopped):
            await self._users.stop(container)
        others = [one for one in self._volumes.users(change.volume) if one != change.user]
        if others:
            raise InUse(
                f"volume {change.volume} is used by {', '.join(others)}",
                hint="stop them, or restore into a new volume with --as NAME",
            )

    def _decide(self, change: Change, result: Result) -> None:
        """Keep a change that ended well, take any other back."""
        good = result.outcome in _GOOD
        if not good:
            self._back(change)
        with self._state.write():
            if good:
                self._remember(change.volume, change.safety)
            self._record(change, Step.STARTING)

    def _back(self, change: Change) -> None:
        self._volumes.unmount(change.volume, change.user)
        spoiled = self._volumes.rollback(change.volume, change.safety, change.user)
        self._volumes.delete_snapshot(change.volume, spoiled)
        log.warning("volume %s is back at %s", change.volume, change.safety)

    async def _release(self, change: Change) -> None:
        await asyncio.to_thread(self._volumes.unmount, change.volume, change.user)
        self._volumes.release(change.volume)
        for container in change.stopped:
            try:
                await self._users.start(container)
            except LazaretteError as bad:
                log.error("container %s does not start again: %s", container[:12], bad)
        self._jobs.discard(change.job)
        self._forget(change)

    def _record(self, change: Change, step: Step) -> None:
        with self._state.write() as db:
            db.execute(
                "UPDATE overwrites SET step = ? WHERE volume = ?", (step.value, change.volume)
            )

    def _remember(self, volume: str, safety: str) -> None:
        with self._state.write() as db:
            db.execute("INSERT OR REPLACE INTO safeties VALUES (?, ?)", (volume, safety))

    def _forget(self, change: Change) -> None:
        with self._state.write() as db:
            db.execute("DELETE FROM overwrites WHERE volume = ?", (change.volume,))

"""Fencing: a host whose volume was taken over learns it, stops writing, and says so.

Who owns a history stands in the repository (:mod:`lazarette.backup.repository.ownership`).
It is asked before each backup and again after it; between backups a watcher looks for
volumes this host backed up and another took over, and stops the containers on them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

from lazarette.backup.repository import ownership
from lazarette.backup.repository.format import OWNERS
from lazarette.backup.repository.ownership import Fenced, Owner
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.events import EventBus
from lazarette.runtime.protection import watching
from lazarette.runtime.protection.repositories import RepositoryBook, RepositoryUnknown
from lazarette.runtime.protection.runs import RunBook
from lazarette.storage.clock import Clock
from lazarette.storage.errors import InUse, LazaretteError
from lazarette.storage.state import State
from lazarette.storage.volumes.manager import VolumeManager

log = logging.getLogger(__name__)

_LOOK_S = 10.0

_MIGRATIONS = (
    """
    CREATE TABLE fences (
        volume TEXT NOT NULL,
        repository TEXT NOT NULL,
        host TEXT NOT NULL,
        epoch INTEGER NOT NULL,
        noticed_ns INTEGER NOT NULL,
        PRIMARY KEY (volume, repository)
    ) STRICT
    """,
)


@dataclass(frozen=True, slots=True)
class Fence:
    """A volume of this host that another took over: which, where, by whom, noticed when."""

    volume: str
    repository: str
    host: str
    epoch: int
    noticed_ns: int


class Fencing:
    """Ownership of histories as this host sees it.

    Args:
        engine: id of this engine.
        repositories: where histories are.
        volumes: what is here.
        runs: what this host backed up.
        containers: who writes.
        state: the daemon's database.
        events: told when a volume is fenced.
        clock: time.
    """

    def __init__(
        self,
        engine: str,
        repositories: RepositoryBook,
        volumes: VolumeManager,
        runs: RunBook,
        containers: ContainerManager,
        state: State,
        events: EventBus,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._repositories = repositories
        self._volumes = volumes
        self._runs = runs
        self._containers = containers
        self._state = state
        self._events = events
        self._clock = clock
        self._watcher: asyncio.Task[None] | None = None
        self.passive: Callable[[str], bool] = lambda volume: False
        """Whether a volume follows another host's; such a one is nobody's to fence."""
        state.migrate("fences", _MIGRATIONS)

    def start(self) -> None:
        """Begin to watch."""
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Watch no more."""
        await watching.end(self._watcher)

    def require(self, volume: str, repository: str) -> None:
        """Make sure that this host may continue a history; blocks.

        Raises:
            Fenced: another host owns it.
            InUse: the volume here only follows another host's.
        """
        if self.passive(volume):
            raise InUse(
                f"volume {volume} follows another host's backups",
                hint=f"laz standby promote {volume} takes it over",
            )
        self.check(volume, repository)

    def check(self, volume: str, repository: str) -> None:
        """Make sure that no other host owns a history; blocks.

        Raises:
            Fenced: another host owns it.
        """
        ownership.require(self._repositories.open(repository), volume, self._engine)

    def withdraw(self, volume: str, repository: str, snapshot: str) -> Fenced | None:
        """Take a snapshot back that was written while another host took over; blocks."""
        try:
            self.check(volume, repository)
        except Fenced as fenced:
            self._repositories.open(repository).forget([snapshot])
            return fenced
        return None

    def claim(self, volume: str, repository: str) -> Owner:
        """Take a history over, which fences every other host; blocks.

        Raises:
            TakenMeanwhile: another host does the same.
            StoreUnavailable: nothing changed.
        """
        opened = self._repositories.open(repository)
        held = ownership.claim(opened, volume, self._engine, socket.gethostname())
        self._forget(volume, self._repositories.get(repository).name)
        return held

    def fences(self, volume: str = "") -> list[Fence]:
        """The fenced volumes of this host, or those of one name."""
        rows = self._state.rows(
            "SELECT * FROM fences WHERE ? IN ('', volume) ORDER BY volume, repository", (volume,)
        )
        return [Fence(**dict(row)) for row in rows]

    async def _watch(self) -> None:
        while True:
            for known in self._repositories.list():
                try:
                    await self._look(known.name)
                except LazaretteError as error:
                    log.warning("owners in repository %s: %s", known.name, error)
                except Exception:
                    log.exception("owners in repository %s", known.name)
            await asyncio.sleep(_LOOK_S)

    async def _look(self, repository: str) -> None:
        taken = await asyncio.to_thread(self._taken, repository)
        for owner in taken:
            fence = Fence(owner.volume, repository, owner.host, owner.epoch, self._clock.now_ns())
            if self._note(fence):
                log.error(
                    "volume %s was taken over by host %s: its containers are stopped",
                    fence.volume,
                    fence.host,
                )
                self._events.publish(
                    "volume", "fence", fence.volume, {"host": fence.host, "repository": repository}
                )
            await self._stop_users(owner.volume)

    def _taken(self, repository: str) -> list[Owner]:
        """Histories of this host's volumes that another host owns now."""
        try:
            opened = self._repositories.open(repository)
        except RepositoryUnknown:
            return []
        listed = {info.name for info in opened.store.list(OWNERS)}
        found = []
        for volume in self._volumes.list():
            if ownership.name_of(opened.crypt, volume.name) not in listed:
                continue
            held = ownership.read(opened.store, opened.crypt, volume.name)
            if held is None or held.owner == self._engine:
                self._forget(volume.name, repository)
            elif not self.passive(volume.name) and self._ours(volume.name, repository):
                found.append(held)
        return found

    def _ours(self, volume: str, repository: str) -> bool:
        """Whether this host ever wrote that history: else it is another's of the same name."""
        return any(run.repository == repository for run in self._runs.of_volume(volume))

    async def _stop_users(self, volume: str) -> None:
        for container in self._containers.using_volume(volume):
            if container.state.running:
                try:
                    await self._containers.lifecycle.stop(container)
                except LazaretteError as error:
                    log.error("container %s does not stop: %s", container.name, error)

    def _note(self, fence: Fence) -> bool:
        with self._state.write() as db:
            done = db.execute(
                "INSERT INTO fences VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE"
                " SET host = excluded.host, epoch = excluded.epoch,"
                " noticed_ns = excluded.noticed_ns WHERE epoch < excluded.epoch",
                (fence.volume, fence.repository, fence.host, fence.epoch, fence.noticed_ns),
            )
            return done.rowcount > 0

    def _forget(self, volume: str, repository: str) -> None:
        with self._state.write() as db:
            db.execute(
                "DELETE FROM fences WHERE volume = ? AND repository = ?", (volume, repository)
            )

"""Restore drills on this daemon: a scratch volume, the same image, no network, a check."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from lazarette.backup.policy.access import Ended, User
from lazarette.backup.policy.drill import PREFIX, drill, sweep
from lazarette.backup.policy.journal import Journal, Reason
from lazarette.backup.policy.outcome import Kind, Outcome
from lazarette.backup.policy.profiles import profile_for
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.containers.model import CreateRequest, HostConfig
from lazarette.runtime.events import EventBus
from lazarette.runtime.protection.holding import EngineAccess
from lazarette.runtime.protection.policies import PolicyBook
from lazarette.runtime.protection.restores import LATEST, RestoreService
from lazarette.runtime.protection.telling import Teller
from lazarette.storage.clock import Clock
from lazarette.storage.errors import InternalError, NotFound, VolumeNotFound
from lazarette.storage.volumes.manager import VolumeManager

_ALIVE = ("true",)


class NothingToDrill(NotFound):
    """No container uses the volume, so there is nothing to start on its backup."""

    number = 379


class DrillHands:
    """What a drill asks of this daemon; see the rules' ``DrillAccess``."""

    def __init__(
        self,
        containers: ContainerManager,
        volumes: VolumeManager,
        restores: RestoreService,
        repository: str,
    ) -> None:
        self._containers = containers
        self._volumes = volumes
        self._restores = restores
        self._repository = repository
        self._access = EngineAccess(containers)

    async def restore(self, volume: str, snapshot: str, into: str) -> str:
        """See ``DrillAccess.restore``."""
        done = await self._restores.restore(
            volume, snapshot or LATEST, into=into, repository=self._repository
        )
        if done.result.failure is not None:
            raise done.result.failure.error()
        if done.result.outcome not in ("ok", "warnings"):
            raise InternalError(f"the restore of {volume} ended {done.result.outcome}")
        return done.snapshot

    async def start(self, volume: str, scratch: str, name: str) -> str:
        """See ``DrillAccess.start``."""
        request = alone(user_of(self._containers, volume), volume, scratch)
        made, _ = await self._containers.create(request, name)
        await self._containers.lifecycle.start(made)
        return made.id

    async def execute(self, container: str, argv: Sequence[str], timeout: float) -> Ended:
        """See ``DrillAccess.execute``."""
        return await self._access.execute(container, argv, timeout)

    async def remove_container(self, name: str) -> None:
        """See ``DrillAccess.remove_container``."""
        try:
            await self._containers.remove(self._containers.get(name), force=True, volumes=True)
        except NotFound:
            return

    async def remove_volume(self, name: str) -> None:
        """See ``DrillAccess.remove_volume``."""
        try:
            await asyncio.to_thread(self._volumes.remove, name)
        except VolumeNotFound:
            return

    async def leftovers(self) -> Sequence[tuple[str, str]]:
        """See ``DrillAccess.leftovers``."""
        containers = {one.name.lstrip("/") for one in self._containers.all()}
        volumes = {volume.name for volume in self._volumes.list()}
        names = {name for name in containers | volumes if name.startswith(PREFIX)}
        return [
            (name if name in containers else "", name if name in volumes else "")
            for name in sorted(names)
        ]


class Drills:
    """Carries out drills and writes them down.

    Args:
        containers, volumes, restores: this daemon's.
        book: whose policy says how a drill checks.
        journal: the history.
        teller: tells people of them.
        events: told of each.
        clock: to measure.
    """

    def __init__(
        self,
        containers: ContainerManager,
        volumes: VolumeManager,
        restores: RestoreService,
        book: PolicyBook,
        journal: Journal,
        teller: Teller,
        events: EventBus,
        clock: Clock,
    ) -> None:
        self._containers = containers
        self._volumes = volumes
        self._restores = restores
        self._book = book
        self._journal = journal
        self._teller = teller
        self._events = events
        self._clock = clock

    async def recover(self) -> None:
        """Remove what drills of a killed daemon left."""
        await sweep(self._hands(""))

    async def run(
        self, volume: str, repository: str = "", reason: Reason = Reason.ASKED
    ) -> Outcome:
        """Drill the newest good backup of a volume.

        Raises:
            VolumeNotFound: there is no such volume.
            NothingToDrill: no container uses it.
        """
        self._volumes.get(volume)
        policy = self._book.of(volume)
        user = user_of(self._containers, volume)
        check = policy.drill.command if policy and policy.drill else ()
        good = self._journal.protection(volume, 0).last_good
        snapshot = good.outcome.snapshot if good and good.outcome else ""
        number = self._journal.begin(policy.name if policy else "", volume, Kind.DRILL, reason)
        outcome = await drill(
            number,
            volume,
            check or _check_of(user),
            self._hands(repository),
            self._clock,
            snapshot=snapshot,
        )
        self._journal.end(number, outcome)
        self._teller.ended(volume, Kind.DRILL, outcome)
        self._events.publish("drill", outcome.result.value, volume, {"snapshot": outcome.snapshot})
        return outcome

    def _hands(self, repository: str) -> DrillHands:
        return DrillHands(self._containers, self._volumes, self._restores, repository)


def user_of(containers: ContainerManager, volume: str) -> Container:
    """The container that is started on a restored volume: a running one before others.

    Raises:
        NothingToDrill: none uses it.
    """
    users = sorted(
        (one for one in containers.using_volume(volume) if not one.name.startswith(PREFIX)),
        key=lambda one: (not one.state.running, one.name),
    )
    if not users:
        raise NothingToDrill(
            f"no container uses volume {volume}", hint="a drill starts one on the restored data"
        )
    return users[0]


def alone(container: Container, volume: str, scratch: str) -> CreateRequest:
    """The container's request, on the scratch volume and cut off from everything else."""
    definition = container.definition
    [place, *_] = [point.destination for point in definition.mounts if point.name == volume]
    settings = msgspec.structs.asdict(definition.config)
    settings["image"] = definition.image_id
    settings["labels"] = {"lazarette.drill": volume}
    return CreateRequest(
        **settings,
        host_config=HostConfig(binds=[f"{scratch}:{place}"], network_mode="none"),
    )


def _check_of(container: Container) -> Sequence[str]:
    """The check of the database it is by its image; else that it starts and goes on."""
    config = container.definition.config
    profile = profile_for("auto", User(container.id, container.name, config.image, config.labels))
    return (profile.check if profile is not None else ()) or _ALIVE

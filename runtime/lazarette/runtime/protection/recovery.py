"""A host from a bucket: volumes first, then networks, then the containers on them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol, TypeVar

import msgspec

from lazarette.backup.jobs.model import LOG_PREFIX, StoreAccess
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.fuse import jsontext
from lazarette.runtime.containers.model import ContainerConfig
from lazarette.runtime.networks.model import NetworkSpec
from lazarette.runtime.protection.definitions import (
    PROJECT,
    ContainerDefinition,
    Definitions,
)
from lazarette.runtime.protection.fills import FillService
from lazarette.runtime.protection.images import PREFIX as IMAGE_PREFIX
from lazarette.runtime.protection.policies import PolicyBook
from lazarette.runtime.protection.repositories import RepositoryBook
from lazarette.runtime.protection.restores import RestoreService
from lazarette.storage.errors import LazaretteError, NotModified, SnapshotNotFound, VolumeNotFound
from lazarette.storage.volumes.manager import VolumeManager

Tell = Callable[[object], Awaitable[None]]
_DEPENDS_ON = "com.docker.compose.depends_on"
_SERVICE = "com.docker.compose.service"
_EXISTS = "exists, left as it is"


class Hands(Protocol):
    """What recovery needs of the engine."""

    async def has_container(self, name: str) -> bool:
        """Whether a container of that name is there."""
        ...

    async def bring_network(self, network: NetworkSpec) -> None:
        """Make a network unless it is there."""
        ...

    async def bring_image(self, reference: str, image_id: str, repository: str) -> None:
        """Make an image available, from this host, the repository or a registry.

        Raises:
            NotFound: it is nowhere.
        """
        ...

    async def bring_container(self, container: ContainerDefinition) -> str:
        """Make a container of its definition; its id."""
        ...

    async def start_container(self, container_id: str) -> None:
        """Start it."""
        ...


class Item(msgspec.Struct):
    """One thing that comes back, or does not.

    Attributes:
        kind: ``volume``, ``policy``, ``network`` or ``container``.
        name: of it.
        point: the restore point it comes from.
        result: ``planned``, ``restored``, ``started``, ``exists`` or why it failed.
        good: nothing is left to do by hand.
    """

    kind: Literal["volume", "policy", "network", "container"]
    name: str
    point: str
    result: str = "planned"
    good: bool = True


class Report(msgspec.Struct):
    """How a recovery ended: ``ok``, or ``warnings`` when an item is not good."""

    outcome: Literal["ok", "warnings"]
    items: list[Item]


class HostRecovery:
    """Brings hosts back.

    Args:
        repositories: comes to know the bucket.
        restores: shows or restores volumes.
        fills: fills them, once the containers run.
        volumes: what is there already.
        policies: gets those that were set.
        hands: makes networks and containers.
    """

    def __init__(
        self,
        repositories: RepositoryBook,
        restores: RestoreService,
        fills: FillService,
        volumes: VolumeManager,
        policies: PolicyBook,
        hands: Hands,
    ) -> None:
        self._repositories = repositories
        self._restores = restores
        self._fills = fills
        self._volumes = volumes
        self._policies = policies
        self._hands = hands

    async def recover(
        self,
        access: StoreAccess,
        *,
        name: str = "",
        volumes: Sequence[str] = (),
        projects: Sequence[str] = (),
        start: bool = True,
        instant: bool = True,
        dry_run: bool = False,
        tell: Tell,
    ) -> Report:
        """Bring back the newest point of each volume, and what belongs to it.

        Of all volumes, or of those named and those of the named compose projects.  A project
        comes with its services that have no volume, unless only volumes are named.

        What exists already is left alone and said so.  With ``instant`` the containers
        start before the data have arrived, which follow in the background.

        Raises:
            Unauthenticated: credentials or kit are wrong.
            WrongStore: there is no such bucket.
            SnapshotNotFound: nothing in it is of a named volume or project.
        """
        known = await asyncio.to_thread(self._repositories.adopt, name, access)
        found = {
            record.volume: (record, Definitions.parse(record.meta))
            for record in newest_points(await self._restores.points(None, known.name))
        }
        chosen = _chosen(found, volumes, projects)
        whole = [
            msgspec.structs.replace(one, containers=[*_mates(one, projects), *one.containers])
            if projects or not volumes
            else one
            for _, one in chosen
        ]
        with self._fills.postponed():
            items, lacking = await asyncio.gather(
                self._volumes_of(chosen, known.name, instant, dry_run, tell),
                self._images(whole, known.name, dry_run),
            )
            items += await self._bring(whole, lacking, start, dry_run)
        return Report("ok" if all(item.good for item in items) else "warnings", items)

    async def bring(self, definitions: Definitions, repository: str, *, start: bool) -> Report:
        """Bring what belongs to a volume that is here; containers that exist are started."""
        lacking = await self._images([definitions], repository, False)
        items = await self._bring([definitions], lacking, start, False, existing=True)
        return Report("ok" if all(item.good for item in items) else "warnings", items)

    async def _volumes_of(
        self,
        chosen: Sequence[tuple[SnapshotRecord, Definitions]],
        repository: str,
        instant: bool,
        dry_run: bool,
        tell: Tell,
    ) -> list[Item]:
        items = []
        for record, definitions in chosen:
            item = await self._volume(record, repository, instant, dry_run, tell)
            items.append(item)
            if definitions.policy and item.result != _EXISTS:
                items.append(self._policy(record.volume, definitions.policy, dry_run))
        return items

    async def _images(
        self, definitions: Sequence[Definitions], repository: str, dry_run: bool
    ) -> dict[str, LazaretteError]:
        """Bring the images of containers that are not here; what does not come, by id, and why."""
        containers = unique(one for found in definitions for one in found.containers)
        wanted = {
            one.image_id: one.image
            for one in containers
            if not dry_run and not await self._hands.has_container(one.name)
        }
        lacking = {}
        for image_id, reference in wanted.items():
            try:
                await self._hands.bring_image(reference, image_id, repository)
            except LazaretteError as error:
                lacking[image_id] = error
        return lacking

    async def _bring(
        self,
        definitions: Sequence[Definitions],
        lacking: Mapping[str, LazaretteError],
        start: bool,
        dry_run: bool,
        existing: bool = False,
    ) -> list[Item]:
        networks = unique(one for found in definitions for one in found.networks)
        items = [await self._network(network, dry_run) for network in networks]
        containers = unique(one for found in definitions for one in found.containers)
        for container in in_order(containers):
            if existing and await self._hands.has_container(container.name):
                items.append(await self._start(container, start))
            else:
                items.append(await self._container(container, lacking, start, dry_run))
        return items

    async def _start(self, container: ContainerDefinition, start: bool) -> Item:
        item = Item("container", container.name, "", "exists")
        if start and container.running:
            try:
                await self._hands.start_container(container.name)
                item.result = "started"
            except NotModified:
                item.result = "runs"
            except LazaretteError as error:
                item.result, item.good = error.message, False
        return item

    async def _volume(
        self, record: SnapshotRecord, repository: str, instant: bool, dry_run: bool, tell: Tell
    ) -> Item:
        item = Item("volume", record.volume, record.id[:12])
        try:
            self._volumes.get(record.volume)
        except VolumeNotFound:
            pass
        else:
            item.result, item.good = _EXISTS, False
            return item
        if dry_run:
            return item
        await tell({"phase": f"volume {record.volume}"})
        try:
            done = await self._restores.restore(
                record.volume, record.id, repository=repository, instant=instant
            )
        except LazaretteError as error:
            item.result, item.good = error.message, False
            return item
        item.good = done.result.outcome == "ok"
        if item.good:
            item.result = "usable, filling" if instant else "restored"
        else:
            item.result = done.result.outcome
        if done.result.failure is not None:
            item.result = done.result.failure.message
        return item

    def _policy(self, volume: str, words: str, dry_run: bool) -> Item:
        item = Item("policy", volume, "")
        if dry_run:
            return item
        try:
            self._policies.set(volume, jsontext.decode(words, type=dict[str, object]))
        except (LazaretteError, msgspec.MsgspecError) as error:
            item.result, item.good = str(error), False
        else:
            item.result = "restored"
        return item

    async def _network(self, network: NetworkSpec, dry_run: bool) -> Item:
        item = Item("network", network.name, "")
        if dry_run:
            return item
        try:
            await self._hands.bring_network(network)
        except LazaretteError as error:
            item.result, item.good = error.message, False
        else:
            item.result = "restored"
        return item

    async def _container(
        self,
        container: ContainerDefinition,
        lacking: Mapping[str, LazaretteError],
        start: bool,
        dry_run: bool,
    ) -> Item:
        item = Item("container", container.name, "")
        if await self._hands.has_container(container.name):
            item.result, item.good = _EXISTS, False
            return item
        if dry_run:
            return item
        if container.image_id in lacking:
            item.result, item.good = lacking[container.image_id].message, False
            return item
        try:
            made = await self._hands.bring_container(container)
            item.result = "restored"
            if start and container.running:
                await self._hands.start_container(made)
                item.result = "started"
        except LazaretteError as error:
            item.result, item.good = error.message, False
        return item


def newest_points(
    records: Sequence[SnapshotRecord], volumes: Sequence[str] = ()
) -> list[SnapshotRecord]:
    """The newest snapshot of each volume, by name; only of ``volumes`` when given.

    Folders backed up by hand (named by their path), images and logs are no volumes.
    """
    newest: dict[str, SnapshotRecord] = {}
    for record in records:
        if _is_volume(record.volume) and (not volumes or record.volume in volumes):
            newest[record.volume] = record
    return [newest[name] for name in sorted(newest)]


def _chosen(
    found: Mapping[str, tuple[SnapshotRecord, Definitions]],
    volumes: Sequence[str],
    projects: Sequence[str],
) -> list[tuple[SnapshotRecord, Definitions]]:
    """What is meant by names of volumes and projects; all when there are none.

    Raises:
        SnapshotNotFound: a name means nothing.
    """
    known = {project for _, one in found.values() for project in one.projects}
    missing = sorted({*volumes} - found.keys()) + sorted({*projects} - known)
    if missing:
        raise SnapshotNotFound(
            f"the repository has nothing of {', '.join(missing)}",
            hint="laz recover --dry-run lists what there is",
        )
    return [
        (record, one)
        for name, (record, one) in found.items()
        if not (volumes or projects) or name in volumes or one.projects.intersection(projects)
    ]


def _mates(one: Definitions, projects: Sequence[str]) -> list[ContainerDefinition]:
    """Services without the volume, of any project or of the named ones."""
    return [
        mate for mate in one.project if not projects or mate.config.labels.get(PROJECT) in projects
    ]


def _is_volume(name: str) -> bool:
    return not name.startswith(("/", IMAGE_PREFIX, LOG_PREFIX))


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class _Configured(_Named, Protocol):
    @property
    def config(self) -> ContainerConfig: ...


T = TypeVar("T", bound=_Named)
C = TypeVar("C", bound=_Configured)


def unique(found: Iterable[T]) -> list[T]:
    """The last of each name, in order of their first."""
    return list({one.name: one for one in found}.values())


def in_order(containers: Sequence[C]) -> list[C]:
    """Containers after those they depend on, by compose's labels; others as given."""
    services = {
        container.config.labels.get(_SERVICE, container.name): container for container in containers
    }
    ordered: dict[str, C] = {}

    def place(container: C, above: frozenset[str]) -> None:
        if container.name in ordered or container.name in above:
            return
        depends = container.config.labels.get(_DEPENDS_ON, "")
        for dependency in depends.split(","):
            needed = services.get(dependency.partition(":")[0])
            if needed is not None:
                place(needed, above | {container.name})
        ordered[container.name] = container

    for container in containers:
        place(container, frozenset())
    return list(ordered.values())

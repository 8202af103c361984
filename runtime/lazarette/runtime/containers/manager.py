"""Containers of this host: made, found, started, watched, removed.

The manager keeps every container in memory and in the database, and joins the parts:
:mod:`creation` says what a container is, :mod:`lifecycle` moves it through its states,
:mod:`setup` makes what a run needs, :mod:`exec` runs further processes in it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
from collections.abc import Mapping, Sequence

from lazarette.backup.policy.profiles import keeps_database
from lazarette.runtime import remap
from lazarette.runtime.config import Config
from lazarette.runtime.containers import (
    cgroups,
    creation,
    housekeeping,
    links,
    names,
    oci,
    recover,
    spec,
    stats,
    users,
)
from lazarette.runtime.containers.container import Container, Places
from lazarette.runtime.containers.errors import (
    ContainerNameTaken,
    ContainerNotFound,
    WrongState,
)
from lazarette.runtime.containers.exec import ExecSessions
from lazarette.runtime.containers.gate import FreezerGate
from lazarette.runtime.containers.inspect import Inspector
from lazarette.runtime.containers.lifecycle import Lifecycle
from lazarette.runtime.containers.membership import Membership
from lazarette.runtime.containers.model import CreateRequest, UpdateRequest
from lazarette.runtime.containers.monitor import Monitor
from lazarette.runtime.containers.networking import Networking
from lazarette.runtime.containers.populate import populate
from lazarette.runtime.containers.record import Definition, State, Status
from lazarette.runtime.containers.services import ImageSource
from lazarette.runtime.containers.setup import Preparer
from lazarette.runtime.containers.store import ContainerStore
from lazarette.runtime.containers.supervise import Supervisor
from lazarette.runtime.containers.watch import FolderWatch
from lazarette.runtime.events import EventBus
from lazarette.runtime.images.listing import require_platform
from lazarette.runtime.images.model import Platform
from lazarette.runtime.networks.model import EndpointRequest, Network
from lazarette.storage.clock import Clock
from lazarette.storage.errors import Conflict, InUse, InvalidArgument, LazaretteError, NotFound
from lazarette.storage.layers.contract import LayerDriver
from lazarette.storage.state import State as Database
from lazarette.storage.volumes.manager import VolumeManager

log = logging.getLogger(__name__)


class ContainerManager:
    """All containers of one daemon.

    Args:
        config: places and names.
        state: the daemon's database.
        images: where images come from.
        layers: roots of containers.
        volumes: named volumes.
        networking: sandboxes, endpoints and published ports.
        events: told of everything.
        clock: stamps everything.

    Attributes:
        lifecycle: start, stop and what is between.
        execs: further processes.
        runtime: the OCI runtime that was chosen.
        facts: what the host can do.
        inspector: shows containers.
        supervisor: restarts, removes and probes them.
        watch: wakes followers of logs.
    """

    def __init__(
        self,
        config: Config,
        state: Database,
        images: ImageSource,
        layers: LayerDriver,
        volumes: VolumeManager,
        networking: Networking,
        events: EventBus,
        clock: Clock,
    ) -> None:
        self.config = config
        self.places = Places.of(config)
        for folder in (self.places.data, self.places.run):
            folder.mkdir(parents=True, exist_ok=True, mode=0o711)
        hierarchies = cgroups.detect()
        self.runtime = oci.choose(config.runtime, hierarchies, config.exec_root)
        self.facts = spec.find_facts(
            hierarchies, oci.find_init(), remap.idmap_of(config.userns_remap)
        )
        self.places.roots.mkdir(exist_ok=True, mode=0o710)
        if self.facts.idmap is not None:
            users.open_roots(self.places.roots, self.facts.idmap)
        self.cgroup_parent = oci.cgroup_parent(config.exec_root)
        self.store = ContainerStore(state)
        self.images = images
        self.layers = layers
        self.volumes = volumes
        self.networking = networking
        self.events = events
        self.clock = clock
        self.watch = FolderWatch()
        self.monitor = Monitor(oci.find_conmon(), self.runtime, hierarchies)
        self.preparer = Preparer(
            layers,
            images,
            volumes,
            self.networking,
            self.facts,
            self.cgroup_parent,
            self.runtime,
            self.get,
            clock,
        )
        self.lifecycle = Lifecycle(
            self.store, self.preparer, self.monitor, self.runtime, self.facts, events, clock
        )
        self.execs = ExecSessions(self.lifecycle, self.monitor, self.facts)
        self.inspector = Inspector(networking.networks, volumes, layers, config.exec_root / "netns")
        self.supervisor = Supervisor(self)
        self._sampler = stats.Sampler(hierarchies, clock)
        self._membership = Membership(networking.networks, self.store, self.preparer)
        self.lifecycle.after = self.supervisor
        self._containers: dict[str, Container] = {}
        self._names: dict[str, str] = {}

    def load(self) -> list[str]:
        """Take what the database has into memory; call before the networks recover.

        Returns:
            Ids of containers that still run, whose networks must stay.
        """
        return recover.load(self)

    async def resume(self) -> None:
        """Go on where the last daemon ended; call once, after the networks recovered."""
        await recover.resume(self)

    async def close(self) -> None:
        """Let go of everything; containers run on."""
        await self.lifecycle.close()
        self.watch.close()

    # ---- finding

    def adopt(self, definition: Definition, state: State) -> Container:
        """Take a container from the database into memory."""
        container = Container(definition, state, self.places)
        self._containers[definition.id] = container
        self._names[definition.name] = definition.id
        return container

    def all(self) -> list[Container]:
        """Every container, newest first."""
        return sorted(
            self._containers.values(), key=lambda one: one.definition.created_ns, reverse=True
        )

    def get(self, reference: str) -> Container:
        """A container by id, name (with or without slash) or unique beginning of its id.

        Raises:
            ContainerNotFound: there is none.
            InvalidArgument: the beginning fits several.
        """
        found = self._containers.get(reference)
        if found is not None:
            return found
        by_name = self._names.get(reference.removeprefix("/"))
        if by_name is not None and by_name in self._containers:
            return self._containers[by_name]
        matching = [key for key in self._containers if key.startswith(reference)]
        if not reference or not matching:
            raise ContainerNotFound(reference)
        if len(matching) > 1:
            raise InvalidArgument(f"multiple IDs found with provided prefix: {reference}")
        return self._containers[matching[0]]

    def using_volume(self, name: str) -> list[Container]:
        """Containers, running or not, that have a volume mounted."""
        return [
            one
            for one in self._containers.values()
            if any(p.type == "volume" and p.name == name for p in one.definition.mounts)
        ]

    def using_image(self, image_id: str) -> list[Container]:
        """Containers made of an image."""
        return [one for one in self._containers.values() if one.definition.image_id == image_id]

    def gate_for(self, volumes: Sequence[str]) -> FreezerGate:
        """A gate that holds the running containers that write any of these volumes."""
        wanted = set(volumes)
        ids = [
            one.id
            for one in self._containers.values()
            if one.state.running
            and any(p.type == "volume" and p.name in wanted for p in one.definition.mounts)
        ]
        return FreezerGate(ids, self)

    # ---- making

    async def create(
        self,
        request: CreateRequest,
        name: str = "",
        version: tuple[int, int] = (1, 50),
        platform: Platform | None = None,
    ) -> tuple[Container, list[str]]:
        """Make a container.

        Returns:
            The container and the warnings for its maker.

        Raises:
            ImageNotFound: no such image.
            NoSuchPlatform: it is for another platform.
            ContainerNameTaken: the name is used.
            InvalidArgument: something in the request cannot be.
        """
        if not request.image:
            raise InvalidArgument("image reference is required")
        image = await asyncio.to_thread(self.images.get, request.image)
        require_platform(request.image, image.config, platform)
        container_id = secrets.token_hex(32)
        name = names.check_name(name) if name else names.make_name(self._names)
        self._claim(name, container_id)
        try:
            definition = creation.define(
                request,
                image,
                container_id,
                name,
                self.clock.now_ns(),
                self.facts,
                lambda reference: self.get(reference).definition,
                version,
            )
            container = Container(definition, State(), self.places)
            await asyncio.to_thread(self._make, container, request)
        except BaseException:
            self._names.pop(name, None)
            raise
        self._containers[container_id] = container
        self.lifecycle.emit(container, "create")
        return container, spec.warnings(definition.host, self.facts)

    def _claim(self, name: str, container_id: str) -> None:
        holder = self._names.get(name)
        if holder is not None:
            raise ContainerNameTaken(name, holder)
        self._names[name] = container_id

    def _make(self, container: Container, request: CreateRequest) -> None:
        definition = container.definition
        made: list[str] = []
        try:
            self.layers.prepare(definition.layer, definition.image_layer)
            for point in definition.mounts:
                if point.type == "volume":
                    made += self._make_volume(container, point.destination, request)
            populate(container, self.layers, self.volumes)
            container.data.mkdir(mode=0o710, parents=True, exist_ok=True)
            self.store.save(definition, container.state)
        except BaseException:
            self._unmake(container, made)
            raise

    def _make_volume(
        self, container: Container, destination: str, request: CreateRequest
    ) -> list[str]:
        """Make the volume of a mount; returns its name if it was made just for this."""
        point = next(p for p in container.definition.mounts if p.destination == destination)
        if point.anonymous and point.name:
            return []  # another container's anonymous volume, through VolumesFrom
        options, labels = spec.volume_options(request.host_config, destination)
        database = keeps_database(container.definition.image_ref, destination)
        volume = self.volumes.create(
            *(point.name or None, point.driver, options, labels),
            suited=self.volumes.databases if database else "",
        )
        fresh = [volume.name] if point.anonymous else []
        point.name, point.driver = volume.name, volume.driver
        return fresh

    def _unmake(self, container: Container, volumes: list[str]) -> None:
        self.layers.remove(container.definition.layer)
        for name in volumes:
            self.volumes.remove(name, force=True)
        shutil.rmtree(container.data, ignore_errors=True)

    # ---- changing

    def rename(self, container: Container, name: str) -> None:
        """Give a container another name.

        Raises:
            InvalidArgument: no name, a bad one, or the one it has.
            ContainerNameTaken: the name is used.
        """
        if not name:
            raise InvalidArgument("Neither old nor new names may be empty")
        wanted = names.check_name(name)
        old = container.name
        if wanted == old:
            raise InvalidArgument("Renaming a container with the same name as its current name")
        self._claim(wanted, container.id)
        container.definition.name = wanted
        self.store.save(container.definition, container.state)
        self._names.pop(old, None)
        self.lifecycle.emit(container, "rename", oldName=f"/{old}")

    async def remove(
        self, container: Container, *, force: bool = False, volumes: bool = False
    ) -> None:
        """Remove a container with its root, logs and, if asked, anonymous volumes.

        Raises:
            WrongState: it runs and ``force`` is not set, or its removal is under way.
        """
        if container.removing:
            raise WrongState(f"removal of container {container.name} is already in progress")
        status = container.state.status
        if container.state.running or status is Status.RESTARTING:
            if not force:
                raise WrongState(_running_text(container))
            if status is Status.RESTARTING:
                await self.lifecycle.stop(container)
            else:
                auto = container.definition.host.auto_remove
                container.definition.host.auto_remove = False
                try:
                    await self.lifecycle.kill(container, "KILL")
                except WrongState:
                    log.debug("container %s ended by itself", container.name)
                finally:
                    container.definition.host.auto_remove = auto
        container.removing = True
        try:
            async with container.lock:
                await asyncio.to_thread(self._destroy, container, volumes)
        except BaseException:
            container.removing = False
            raise
        self.execs.forget(container)
        self._containers.pop(container.id, None)
        self._names.pop(container.name, None)
        self.lifecycle.emit(container, "destroy")
        container.is_gone()

    def _destroy(self, container: Container, volumes: bool) -> None:
        """Everything of a container goes, its row last but one, so that a killed removal
        is finished at the next start."""
        container.state.status = Status.REMOVING
        if container.root_mounted or container.bundle.exists():
            self.preparer.release(container)
        try:
            self.layers.remove(container.definition.layer)
        except InUse as busy:
            raise WrongState(f"cannot remove container {container.name}: {busy.message}") from busy
        if volumes:
            self._remove_anonymous(container)
        self.store.delete(container.id)
        shutil.rmtree(container.data, ignore_errors=True)

    def _remove_anonymous(self, container: Container) -> None:
        for point in container.definition.mounts:
            if point.type != "volume" or not point.anonymous:
                continue
            if any(one is not container for one in self.using_volume(point.name)):
                continue
            try:
                self.volumes.remove(point.name, force=True)
            except (InUse, NotFound) as kept:
                log.info("volume %s stays: %s", point.name, kept)
            except LazaretteError as bad:
                log.warning("removing volume %s: %s", point.name, bad)

    def remove_link(self, container: Container, alias: str) -> None:
        """Forget a link to another container.

        Raises:
            ContainerNotFound: it has no link of that alias.
        """
        links.forget(container, alias)
        self.store.save(container.definition, container.state)

    async def prune(self, filters: Mapping[str, Sequence[str]]) -> tuple[list[str], int]:
        """Remove every container that does not run and passes the filters.

        Returns:
            Their ids, and the bytes their writable layers took.
        """
        removed, reclaimed = [], 0
        for container in housekeeping.prunable(self.all(), filters, self.clock.now_ns()):
            try:
                usage = await asyncio.to_thread(self.layers.usage, container.definition.layer)
                await self.remove(container)
            except (Conflict, NotFound):
                continue
            removed.append(container.id)
            reclaimed += usage.bytes
        return removed, reclaimed

    async def update(self, container: Container, request: UpdateRequest) -> list[str]:
        """Change limits and the restart policy, of a running container too.

        Returns:
            Warnings.
        """
        return await asyncio.to_thread(housekeeping.update, self, container, request)

    def log_details(self, container: Container) -> bytes:
        """What ``--details`` shows before each line: labels and variables of the log options."""
        return housekeeping.log_details(container)

    async def connect_network(self, container: str, request: EndpointRequest) -> None:
        """Put a container on one more network.

        Raises:
            ContainerNotFound: no such container.
            EndpointExists: it is on it already.
        """
        await self._membership.connect(self.get(container), request)

    async def disconnect_network(self, container: str, network: Network, force: bool) -> None:
        """Take a container off a network.

        Raises:
            ContainerNotFound: no such container; fine with ``force``.
            EndpointNotFound: it is not on it.
        """
        try:
            found = self.get(container)
        except ContainerNotFound:
            if force:
                return
            raise
        await self._membership.disconnect(found, network)

    def sample(self, container: Container, before: dict[str, object] | None) -> dict[str, object]:
        """What a container uses now; see :mod:`stats`."""
        return self._sampler.sample(container, self.preparer.group(container), before)

    def top(self, container: Container, arguments: str) -> dict[str, object]:
        """Its processes as the host's ``ps`` lists them.

        Raises:
            WrongState: it does not run.
        """
        self.lifecycle.require_running(container)
        return stats.top(self.preparer.group(container), arguments)

    # ---- waiting

    async def wait(self, future: asyncio.Future[int]) -> int:
        """The exit code, once the condition of ``container.expect`` holds."""
        return await asyncio.shield(future)


def _running_text(container: Container) -> str:
    return (
        f'cannot remove container "/{container.name}": container is '
        f"{container.state.status.value}: stop the container before removing or force remove"
    )

"""What protection asks the engine to do: images, networks and containers brought back."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.containers.model import CreateRequest, NetworkingConfig
from lazarette.runtime.images import archive, save
from lazarette.runtime.images.errors import ImageNotFound
from lazarette.runtime.images.store import ImageStore
from lazarette.runtime.networks.manager import NetworkManager
from lazarette.runtime.networks.model import NetworkSpec
from lazarette.runtime.protection.definitions import ContainerDefinition
from lazarette.runtime.protection.holding import EngineAccess
from lazarette.runtime.protection.images import ImageKeep
from lazarette.runtime.protection.recovery import in_order
from lazarette.storage.errors import NotFound

log = logging.getLogger(__name__)


class StoreArchives:
    """Image archives from and to the image store."""

    def __init__(self, images: ImageStore) -> None:
        self._images = images

    def save_archive(self, image_id: str, names: list[str], path: Path) -> None:
        """Write an image with its names."""
        with open(path, "wb") as target:
            save.save(self._images, names or [image_id], target)

    def load_archive(self, path: Path) -> None:
        """Load an archive."""
        with open(path, "rb") as source:
            archive.load(self._images, source)


class VolumeUsers(EngineAccess):
    """The containers of volumes, to be stopped and started; implements ``inplace.Users``."""

    def running(self, volume: str) -> list[str]:
        """See ``Users.running``."""
        found = [one for one in self._containers.using_volume(volume) if one.state.running]
        found.sort(key=lambda one: one.state.started_ns)
        return [one.id for one in in_order([each.definition for each in found])]

    def name(self, container: str) -> str:
        """See ``Users.name``."""
        try:
            return self._containers.get(container).name
        except NotFound:
            return container[:12]


class EngineHands:
    """Brings back what a recovery names."""

    def __init__(
        self,
        images: ImageStore,
        keep: ImageKeep,
        networks: NetworkManager,
        containers: ContainerManager,
    ) -> None:
        self._images = images
        self._keep = keep
        self._networks = networks
        self._containers = containers

    async def has_container(self, name: str) -> bool:
        """Whether a container of that name is there."""
        try:
            self._containers.get(name)
        except NotFound:
            return False
        return True

    async def bring_network(self, network: NetworkSpec) -> None:
        """Make a network unless it is there."""
        try:
            await asyncio.to_thread(self._networks.inspect, network.name)
        except NotFound:
            await asyncio.to_thread(self._networks.create, network)

    async def bring_image(self, reference: str, image_id: str, repository: str) -> None:
        """The very image the container was made of, from here or the repository.

        Raises:
            NotFound: it is in neither.
        """
        try:
            await asyncio.to_thread(self._images.get, image_id)
        except ImageNotFound:
            log.info("image %s comes from repository %s", reference, repository)
            await self._keep.bring(image_id, repository)

    async def bring_container(self, container: ContainerDefinition) -> str:
        """Make a container of its definition, of the very image it was made of."""
        settings = msgspec.structs.asdict(container.config)
        settings["image"] = container.image if self._is(container) else container.image_id
        request = CreateRequest(
            **settings,
            host_config=container.host,
            networking_config=NetworkingConfig(endpoints_config=dict(container.endpoints)),
        )
        made, _ = await self._containers.create(request, container.name)
        return made.id

    async def start_container(self, container_id: str) -> None:
        """Start it."""
        await self._containers.lifecycle.start(self._containers.get(container_id))

    def _is(self, container: ContainerDefinition) -> bool:
        """Whether the name the container was made by still means the same image."""
        found = self._images.find(container.image)
        return found is not None and found.id == container.image_id

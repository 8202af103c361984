"""What is kept with a volume's data: the volume, its containers, networks and policy."""

from __future__ import annotations

from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.networks.manager import NetworkManager
from lazarette.runtime.networks.model import NetworkSpec
from lazarette.runtime.protection.definitions import (
    PROJECT,
    ContainerDefinition,
    Definitions,
    VolumeDefinition,
)
from lazarette.runtime.protection.policies import PolicyBook
from lazarette.storage.errors import NotFound
from lazarette.storage.volumes.manager import VolumeManager

_PREDEFINED = ("bridge", "host", "none")


class Describer:
    """Collects definitions from the services that own them."""

    def __init__(
        self,
        volumes: VolumeManager,
        containers: ContainerManager,
        networks: NetworkManager,
        policies: PolicyBook,
    ) -> None:
        self._volumes = volumes
        self._containers = containers
        self._networks = networks
        self._policies = policies

    def of_volume(self, name: str) -> Definitions:
        """Everything that belongs to a volume now.

        Raises:
            VolumeNotFound: there is none.
        """
        volume = self._volumes.get(name)
        users = self._containers.using_volume(name)
        mates = self._mates(users)
        return Definitions(
            volume=VolumeDefinition(name, volume.driver, dict(volume.options), dict(volume.labels)),
            containers=[_container(one) for one in users],
            networks=self._networks_of([*users, *mates]),
            policy=self._policies.words(name),
            project=[_container(one) for one in mates],
        )

    def _mates(self, users: list[Container]) -> list[Container]:
        """The other containers of the users' compose projects."""
        own = {one.id for one in users}
        projects = {one.definition.config.labels.get(PROJECT) for one in users} - {None, ""}
        return [
            one
            for one in self._containers.all()
            if one.id not in own and one.definition.config.labels.get(PROJECT) in projects
        ]

    def _networks_of(self, containers: list[Container]) -> list[NetworkSpec]:
        names = {name for one in containers for name in one.definition.endpoints}
        found = []
        for name in sorted(names.difference(_PREDEFINED)):
            try:
                found.append(self._networks.inspect(name).spec)
            except NotFound:
                continue  # removed while the container was stopped
        return found


def _container(one: Container) -> ContainerDefinition:
    definition = one.definition
    return ContainerDefinition(
        name=definition.name,
        image=definition.image_ref,
        image_id=definition.image_id,
        config=definition.config,
        host=definition.host,
        endpoints=definition.endpoints,
        running=one.state.running,
    )

"""Which networks a container is on, changed while it exists.

Implements :class:`lazarette.runtime.api.networks.ContainerNetworks`.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.networking import endpoint_request, settings_of
from lazarette.runtime.containers.setup import Preparer
from lazarette.runtime.containers.store import ContainerStore
from lazarette.runtime.networks.manager import NetworkManager
from lazarette.runtime.networks.model import (
    EndpointExists,
    EndpointNotFound,
    EndpointRequest,
    Network,
)
from lazarette.storage.errors import Forbidden, InvalidArgument


class Membership:
    """Connects and disconnects containers.

    Args:
        networks: all networks.
        store: containers' records.
        preparer: writes their name files.
    """

    def __init__(self, networks: NetworkManager, store: ContainerStore, preparer: Preparer) -> None:
        self._networks = networks
        self._store = store
        self._preparer = preparer

    async def connect(self, container: Container, request: EndpointRequest) -> None:
        """Put a container, running or not, on one more network.

        Raises:
            EndpointExists: it is on it already.
            Forbidden: it has the host's or another container's network.
        """
        network = self._networks.inspect(request.network)
        mode = container.definition.host.network_mode
        if mode == "host" or network.name == "host":
            raise Forbidden(
                "cannot connect container to host network - container must be created "
                "in host network mode"
            )
        if mode.startswith("container:"):
            raise InvalidArgument(
                "container sharing network namespace with another container "
                "or host cannot be connected to any other network"
            )
        async with container.lock:
            known = container.definition.endpoints
            if network.name in known and container.state.running:
                raise EndpointExists(
                    f"endpoint with name {container.name} already exists in network {network.name}"
                )
            settings = settings_of(request, network.id)
            if container.state.running:
                full = endpoint_request(container, network.name, settings)
                await asyncio.to_thread(self._networks.connect, network.id, container.id, full)
                await asyncio.to_thread(self._preparer.write_names, container)
            known[network.name] = settings
            self._store.save(container.definition, container.state)

    async def disconnect(self, container: Container, network: Network) -> None:
        """Take a container, running or not, off a network.

        Raises:
            EndpointNotFound: it is not on it.
        """
        async with container.lock:
            known = container.definition.endpoints
            if network.name not in known:
                raise EndpointNotFound(
                    f"container {container.id} is not connected to network {network.name}"
                )
            if container.state.running:
                with suppress(EndpointNotFound):
                    await asyncio.to_thread(self._networks.disconnect, network.id, container.id)
                await asyncio.to_thread(self._preparer.write_names, container)
            del known[network.name]
            self._store.save(container.definition, container.state)

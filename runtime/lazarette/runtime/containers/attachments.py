"""A container's networks: kept in its definition, wired at once when it runs."""

from __future__ import annotations

import asyncio

from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.errors import ContainerNotFound
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.containers.model import EndpointSettings, IpamConfig
from lazarette.runtime.networks.manager import NetworkManager
from lazarette.runtime.networks.model import EndpointRequest, Network
from lazarette.storage.errors import Forbidden, NotFound


class AlreadyConnected(Forbidden):
    """The container is in the network already."""

    number = 374


class ContainerAttachments:
    """Puts containers, running or not, into networks and takes them out.

    Args:
        containers: whose definitions remember.
        networks: wires running ones.
    """

    def __init__(self, containers: ContainerManager, networks: NetworkManager) -> None:
        self._containers = containers
        self._networks = networks

    async def connect_network(self, container: str, request: EndpointRequest) -> None:
        """Put a container into the network of the request.

        Raises:
            ContainerNotFound: no such container.
            AlreadyConnected: it is in it already.
        """
        one = self._containers.get(container)
        network = await asyncio.to_thread(self._networks.inspect, request.network)
        async with one.lock:
            if network.name in one.definition.endpoints:
                raise AlreadyConnected(
                    f"endpoint with name {one.name} already exists in network {network.name}"
                )
            if one.state.running:
                await asyncio.to_thread(self._networks.connect, network.id, one.id, request)
            one.definition.endpoints[network.name] = _settings(request, network)
            await self._save(one)

    async def disconnect_network(self, container: str, network: Network, force: bool) -> None:
        """Take a container out of a network; with ``force`` also one that is gone.

        Raises:
            NotFound: no such container, or it is not in it.
        """
        try:
            one = self._containers.get(container)
        except ContainerNotFound:
            if force:
                await asyncio.to_thread(self._networks.disconnect, network.id, container)
                return
            raise
        async with one.lock:
            if network.name not in one.definition.endpoints:
                raise NotFound(f"container {one.id} is not connected to network {network.name}")
            if one.state.running:
                await asyncio.to_thread(self._networks.disconnect, network.id, one.id)
            del one.definition.endpoints[network.name]
            await self._save(one)

    async def _save(self, one: Container) -> None:
        await asyncio.to_thread(self._containers.store.save, one.definition, one.state)


def _settings(request: EndpointRequest, network: Network) -> EndpointSettings:
    """The request as a container's definition keeps it."""
    wanted = None
    if request.ipv4 or request.ipv6:
        wanted = IpamConfig(ipv4_address=request.ipv4 or "", ipv6_address=request.ipv6 or "")
    return EndpointSettings(
        ipam_config=wanted,
        aliases=list(request.aliases) or None,
        mac_address=request.mac or "",
        driver_opts=dict(request.driver_opts) or None,
        network_id=network.id,
    )

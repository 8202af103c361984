"""``/networks``: list, create, inspect, connect, disconnect, remove, prune."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
from aiohttp import web

from lazarette.runtime.api.http import Call, Route, empty, json_response
from lazarette.runtime.images.listing import until_ns
from lazarette.runtime.networks.cluster import Record
from lazarette.runtime.networks.manager import NetworkManager
from lazarette.runtime.networks.model import (
    Endpoint,
    EndpointRequest,
    Network,
    NetworkSpec,
    Pool,
    parse_ip,
)
from lazarette.storage.clock import rfc3339
from lazarette.storage.errors import InvalidArgument

_LIST_FILTERS = ("dangling", "driver", "id", "label", "name", "scope", "type")
_PRUNE_FILTERS = ("label", "label!", "until")


class ContainerNetworks(Protocol):
    """What the routes need of containers: a container's networks outlive its runs."""

    async def connect_network(self, container: str, request: EndpointRequest) -> None:
        """Put a container, running or not, into the network of the request.

        Raises:
            NotFound: no such container.
            EndpointExists: it is in it already.
        """
        ...

    async def disconnect_network(self, container: str, network: Network, force: bool) -> None:
        """Take a container, running or not, out of a network.

        Raises:
            NotFound: no such container (fine with ``force``), or not in it.
        """
        ...


class IpamConfigBody(msgspec.Struct):
    """An address pool, as clients write it."""

    subnet: str | None = msgspec.field(name="Subnet", default=None)
    ip_range: str | None = msgspec.field(name="IPRange", default=None)
    gateway: str | None = msgspec.field(name="Gateway", default=None)
    aux: dict[str, str] | None = msgspec.field(name="AuxiliaryAddresses", default=None)


class IpamBody(msgspec.Struct):
    """Address management, as clients write it."""

    driver: str | None = msgspec.field(name="Driver", default=None)
    options: dict[str, str] | None = msgspec.field(name="Options", default=None)
    config: list[IpamConfigBody] | None = msgspec.field(name="Config", default=None)


class ConfigFromBody(msgspec.Struct):
    """The template of a network."""

    network: str = msgspec.field(name="Network", default="")


class CreateBody(msgspec.Struct):
    """``POST /networks/create``."""

    name: str = msgspec.field(name="Name", default="")
    driver: str | None = msgspec.field(name="Driver", default=None)
    scope: str | None = msgspec.field(name="Scope", default=None)
    internal: bool | None = msgspec.field(name="Internal", default=None)
    attachable: bool | None = msgspec.field(name="Attachable", default=None)
    ingress: bool | None = msgspec.field(name="Ingress", default=None)
    config_only: bool | None = msgspec.field(name="ConfigOnly", default=None)
    config_from: ConfigFromBody | None = msgspec.field(name="ConfigFrom", default=None)
    ipam: IpamBody | None = msgspec.field(name="IPAM", default=None)
    enable_ipv4: bool | None = msgspec.field(name="EnableIPv4", default=None)
    enable_ipv6: bool | None = msgspec.field(name="EnableIPv6", default=None)
    options: dict[str, str] | None = msgspec.field(name="Options", default=None)
    labels: dict[str, str] | None = msgspec.field(name="Labels", default=None)

    def spec(self) -> NetworkSpec:
        """As the manager takes it."""
        ipam = self.ipam or IpamBody()
        pools = tuple(
            Pool(
                subnet=each.subnet or "",
                ip_range=each.ip_range or "",
                gateway=each.gateway or "",
                aux=each.aux or {},
            )
            for each in ipam.config or ()
        )
        driver = self.driver or "bridge"
        return NetworkSpec(
            name=self.name,
            driver="bridge" if driver == "default" else driver,
            internal=bool(self.internal),
            attachable=bool(self.attachable),
            ingress=bool(self.ingress),
            enable_ipv4=self.enable_ipv4 is not False,
            enable_ipv6=bool(self.enable_ipv6),
            ipam_driver=ipam.driver or "default",
            ipam_options=ipam.options or {},
            pools=pools,
            options=self.options or {},
            labels=self.labels or {},
            config_only=bool(self.config_only),
            config_from=self.config_from.network if self.config_from else "",
        )


class EndpointIpamBody(msgspec.Struct):
    """Addresses a container wants."""

    ipv4: str | None = msgspec.field(name="IPv4Address", default=None)
    ipv6: str | None = msgspec.field(name="IPv6Address", default=None)
    link_local: list[str] | None = msgspec.field(name="LinkLocalIPs", default=None)


class EndpointBody(msgspec.Struct):
    """``EndpointSettings``, as clients write it; containers' create takes it too."""

    ipam: EndpointIpamBody | None = msgspec.field(name="IPAMConfig", default=None)
    links: list[str] | None = msgspec.field(name="Links", default=None)
    aliases: list[str] | None = msgspec.field(name="Aliases", default=None)
    mac: str | None = msgspec.field(name="MacAddress", default=None)
    driver_opts: dict[str, str] | None = msgspec.field(name="DriverOpts", default=None)
    gateway_priority: int = msgspec.field(name="GwPriority", default=0)

    def request(self, network: str) -> EndpointRequest:
        """As the manager takes it; the container's names are not in it."""
        ipam = self.ipam or EndpointIpamBody()
        return EndpointRequest(
            network=network,
            aliases=tuple(self.aliases or ()),
            links=tuple(self.links or ()),
            ipv4=ipam.ipv4 or "",
            ipv6=ipam.ipv6 or "",
            mac=self.mac or "",
            link_local=tuple(ipam.link_local or ()),
            driver_opts=self.driver_opts or {},
            gateway_priority=self.gateway_priority,
        )


class ConnectBody(msgspec.Struct):
    """``POST /networks/{id}/connect``."""

    container: str = msgspec.field(name="Container", default="")
    endpoint: EndpointBody | None = msgspec.field(name="EndpointConfig", default=None)


class DisconnectBody(msgspec.Struct):
    """``POST /networks/{id}/disconnect``."""

    container: str = msgspec.field(name="Container", default="")
    force: bool = msgspec.field(name="Force", default=False)


def rendered(network: Network) -> dict[str, object]:
    """A network as the Engine shows it, without its containers."""
    spec = network.spec
    config = []
    for pool in spec.pools:
        entry: dict[str, object] = {"Subnet": pool.subnet}
        if pool.ip_range:
            entry["IPRange"] = pool.ip_range
        if pool.gateway:
            entry["Gateway"] = pool.gateway
        if pool.aux:
            entry["AuxiliaryAddresses"] = pool.aux
        config.append(entry)
    return {
        "Name": spec.name,
        "Id": network.id,
        "Created": rfc3339(network.created_ns),
        "Scope": spec.scope,
        "Driver": spec.driver,
        "EnableIPv4": spec.enable_ipv4,
        "EnableIPv6": spec.enable_ipv6,
        "IPAM": {
            "Driver": spec.ipam_driver,
            "Options": spec.ipam_options or None,
            "Config": config,
        },
        "Internal": spec.internal,
        "Attachable": spec.attachable,
        "Ingress": spec.ingress,
        "ConfigFrom": {"Network": spec.config_from},
        "ConfigOnly": spec.config_only,
        "Options": spec.options,
        "Labels": spec.labels,
    }


def _member(endpoint: Endpoint) -> dict[str, object]:
    four = f"{endpoint.ip}/{endpoint.prefix}" if endpoint.ip else ""
    six = f"{endpoint.ipv6}/{endpoint.ipv6_prefix}" if endpoint.ipv6 else ""
    return {
        "Name": endpoint.request.name,
        "EndpointID": endpoint.id,
        "MacAddress": endpoint.mac,
        "IPv4Address": four,
        "IPv6Address": six,
    }


def _remote(network: Network, record: Record) -> dict[str, object]:
    """An endpoint of another host, as the Engine shows those."""

    def with_prefix(address: str) -> str:
        for pool in network.spec.pools:
            if address and parse_ip(address) in pool.network:
                return f"{address}/{pool.network.prefixlen}"
        return address

    return {
        "Name": record.name,
        "EndpointID": record.endpoint,
        "MacAddress": record.mac,
        "IPv4Address": with_prefix(record.ip),
        "IPv6Address": with_prefix(record.ipv6),
    }


class NetworkRoutes:
    """The handlers.

    Args:
        networks: the service.
        containers: where containers remember their networks.
    """

    def __init__(self, networks: NetworkManager, containers: ContainerNetworks) -> None:
        self._networks = networks
        self._containers = containers

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route("GET", "/networks", self._list),
            Route("POST", "/networks/create", self._create),
            Route("POST", "/networks/prune", self._prune),
            Route("GET", "/networks/{id}", self._inspect),
            Route("DELETE", "/networks/{id}", self._remove),
            Route("POST", "/networks/{id}/connect", self._connect),
            Route("POST", "/networks/{id}/disconnect", self._disconnect),
        ]

    async def _list(self, call: Call) -> web.StreamResponse:
        filters = call.filters(_LIST_FILTERS)
        found = [n for n in self._networks.networks() if self._matches(n, filters)]
        return json_response([rendered(network) | {"Containers": {}} for network in found])

    async def _create(self, call: Call) -> web.StreamResponse:
        body = await call.json(CreateBody)
        network = await asyncio.to_thread(self._networks.create, body.spec())
        return json_response({"Id": network.id, "Warning": ""}, 201)

    async def _inspect(self, call: Call) -> web.StreamResponse:
        network = self._networks.inspect(call.path["id"])
        members = {e.container: _member(e) for e in self._networks.endpoints(network.id)}
        elsewhere = self._networks.elsewhere(network)
        members |= {f"ep-{record.endpoint}": _remote(network, record) for record in elsewhere}
        peers = {record.host: record.via for record in elsewhere}
        shown: dict[str, object] = {"Containers": members}
        if peers:
            shown["Peers"] = [{"Name": host[:12], "IP": via} for host, via in sorted(peers.items())]
        return json_response(rendered(network) | shown)

    async def _remove(self, call: Call) -> web.StreamResponse:
        await asyncio.to_thread(self._networks.remove, call.path["id"])
        return empty()

    async def _prune(self, call: Call) -> web.StreamResponse:
        filters = call.filters(_PRUNE_FILTERS)
        given = filters.get("until", [])
        until = until_ns(given, self._networks.clock) if given else 1 << 63
        wanted = {
            network.id
            for network in self._networks.networks()
            if _labelled(network.spec.labels, filters.get("label", []))
            and not any(
                _labelled(network.spec.labels, [each]) for each in filters.get("label!", [])
            )
            and network.created_ns < until
        }
        removed = await asyncio.to_thread(self._networks.prune, wanted)
        return json_response({"NetworksDeleted": removed or None})

    async def _connect(self, call: Call) -> web.StreamResponse:
        body = await call.json(ConnectBody)
        if not body.container:
            raise InvalidArgument("invalid connect request: no container is named")
        network = self._networks.inspect(call.path["id"])
        request = (body.endpoint or EndpointBody()).request(network.id)
        await self._containers.connect_network(body.container, request)
        return empty(200)

    async def _disconnect(self, call: Call) -> web.StreamResponse:
        body = await call.json(DisconnectBody)
        network = self._networks.inspect(call.path["id"])
        await self._containers.disconnect_network(body.container, network, body.force)
        return empty(200)

    def _matches(self, network: Network, filters: Mapping[str, list[str]]) -> bool:
        spec = network.spec
        checks: dict[str, Callable[[str], bool]] = {
            "driver": lambda value: spec.driver == value,
            "id": lambda value: network.id.startswith(value),
            "name": lambda value: _name_matches(spec.name, value),
            "scope": lambda value: spec.scope == value,
            "type": lambda value: _type(value) == network.user_defined,
            "dangling": lambda value: _flag(value) == self._dangling(network),
        }
        if not _labelled(spec.labels, filters.get("label", [])):
            return False
        return all(
            any(check(value) for value in filters[key])
            for key, check in checks.items()
            if filters.get(key)
        )

    def _dangling(self, network: Network) -> bool:
        return network.user_defined and not self._networks.endpoints(network.id)


def _labelled(labels: Mapping[str, str], wanted: list[str]) -> bool:
    """Whether all of ``key`` or ``key=value`` are there."""
    for each in wanted:
        key, equals, value = each.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


def _name_matches(name: str, pattern: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return pattern in name


def _type(value: str) -> bool:
    if value not in ("custom", "builtin"):
        raise InvalidArgument(f"invalid filter 'type={value}'")
    return value == "custom"


def _flag(value: str) -> bool:
    if value.lower() in ("1", "t", "true"):
        return True
    if value.lower() in ("0", "f", "false"):
        return False
    raise InvalidArgument(f"invalid filter 'dangling={value}'")

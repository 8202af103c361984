"""The networks of a daemon: their names, their pools and who holds which address."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence

import msgspec

from lazarette.runtime.networks import ipam, resolvconf
from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks.contract import NetworkDriver, SharedNetworkDriver
from lazarette.runtime.networks.model import (
    DEFAULT_NETWORK,
    OPTION_BRIDGE_NAME,
    OPTION_DEFAULT,
    OPTION_HOST_ADDRESS,
    OPTION_ICC,
    OPTION_MASQUERADE,
    AddressConflict,
    Endpoint,
    EndpointRequest,
    IPNetwork,
    Network,
    NetworkExists,
    NetworkNotFound,
    NetworkSpec,
    Pool,
    parse_ip,
)
from lazarette.runtime.networks.records import NetworkRecords
from lazarette.storage.clock import Clock
from lazarette.storage.errors import Forbidden, InvalidArgument, NotFound

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_. -]*")
_WITHOUT_LINKS = ("host", "null")

Addressed = tuple[str, int, str]
"""Address, prefix length and gateway."""


class Catalogue:
    """Networks by id.

    Args:
        records: where they are kept.
        drivers: by name.
        netlink: a socket of the host, whose routes pools keep clear of.
        clock: stamps networks.
        lock: held for every change; the manager's.
    """

    def __init__(
        self,
        records: NetworkRecords,
        drivers: Mapping[str, NetworkDriver],
        netlink: nl.Netlink,
        clock: Clock,
        lock: threading.RLock,
    ) -> None:
        self._records = records
        self._drivers = drivers
        self._netlink = netlink
        self._clock = clock
        self._lock = lock
        self._networks: dict[str, Network] = {}
        self._spaces: dict[str, list[ipam.AddressSpace]] = {}

    def load(self, bridge: str) -> None:
        """Know what is recorded, and the predefined networks.

        Args:
            bridge: name of the default network's bridge.
        """
        for network in self._records.load():
            self._know(network)
        names = {network.name for network in self._networks.values()}
        if DEFAULT_NETWORK not in names:
            options = {
                OPTION_DEFAULT: "true",
                OPTION_ICC: "true",
                OPTION_MASQUERADE: "true",
                OPTION_HOST_ADDRESS: "0.0.0.0",
                OPTION_BRIDGE_NAME: bridge,
            }
            self.add(NetworkSpec(name=DEFAULT_NETWORK, options=options))
        for name, driver in (("host", "host"), ("none", "null")):
            if name not in names:
                self.add(NetworkSpec(name=name, driver=driver))

    def all(self) -> list[Network]:
        """All networks, oldest first."""
        with self._lock:
            return sorted(self._networks.values(), key=lambda network: network.created_ns)

    def get(self, network_id: str) -> Network | None:
        """The network with exactly that id."""
        return self._networks.get(network_id)

    def inspect(self, ref: str) -> Network:
        """A network by id, name or the beginning of its id.

        Raises:
            NetworkNotFound: there is none.
            InvalidArgument: the beginning fits several.
        """
        with self._lock:
            if ref in self._networks:
                return self._networks[ref]
            for network in self._networks.values():
                if network.name == ref:
                    return network
            fitting = [n for n in self._networks.values() if ref and n.id.startswith(ref)]
        if len(fitting) > 1:
            raise InvalidArgument(f"network {ref} is ambiguous ({len(fitting)} matches found)")
        if not fitting:
            raise NetworkNotFound(f"network {ref} not found")
        return fitting[0]

    def add(self, spec: NetworkSpec) -> Network:
        """Check, complete and record a network.

        Raises:
            InvalidArgument: the name, an address or an option is wrong.
            NetworkExists: the name is taken.
            AddressConflict: a pool overlaps another network's, or none is left.
            NotFound: no such driver.
        """
        with self._lock:
            if not _NAME.fullmatch(spec.name):
                raise InvalidArgument(f"invalid network name: {spec.name or 'it is empty'}")
            if any(network.name == spec.name for network in self._networks.values()):
                raise NetworkExists(f"network with name {spec.name} already exists")
            id_ = secrets.token_hex(32)
            network = Network(
                id=id_, created_ns=self._clock.now_ns(), spec=self._completed(id_, spec)
            )
            self._check(network)
            shared = self.shared(network)
            if shared is not None:
                network = shared.complete(network)
            self._records.save(network)
            self._know(network)
            return network

    def adopt(self, network: Network) -> bool:
        """Know and record a network another host made; False if it is known."""
        with self._lock:
            if network.id in self._networks:
                return False
            self._records.save(network)
            self._know(network)
            return True

    def shared(self, network: Network) -> SharedNetworkDriver | None:
        """The driver of a network other hosts have too, None for all others."""
        driver = self._drivers.get(network.driver)
        return driver if isinstance(driver, SharedNetworkDriver) else None

    def forget(self, network: Network) -> None:
        """Drop a network from memory; :meth:`erase` drops its record."""
        with self._lock:
            self._networks.pop(network.id, None)
            self._spaces.pop(network.id, None)

    def erase(self, network: Network) -> None:
        """Drop the record of a network of which nothing is left."""
        self._records.forget(network.id)

    def take(self, network: Network, request: EndpointRequest) -> tuple[Addressed, Addressed]:
        """Addresses for an endpoint, IPv4 and IPv6; empty for a family it has not.

        Raises:
            AddressConflict: one is taken or none is left.
            InvalidArgument: one is not of this network.
        """
        result: dict[int, Addressed] = {4: ("", 0, ""), 6: ("", 0, "")}
        enabled = {4: network.spec.enable_ipv4, 6: network.spec.enable_ipv6}
        taken: list[tuple[ipam.AddressSpace, str]] = []
        try:
            for version, wanted in ((4, request.ipv4), (6, request.ipv6)):
                spaces = [
                    s for s in self._spaces.get(network.id, ()) if s.subnet.version == version
                ]
                if wanted and not spaces:
                    raise InvalidArgument(
                        f"invalid address {wanted}: network {network.name} has no such subnet"
                    )
                if not spaces or not (enabled[version] or wanted):
                    continue
                space = _space_for(spaces, wanted, version)
                address = space.take(wanted)
                taken.append((space, address))
                result[version] = (address, space.subnet.prefixlen, space.pool.gateway)
        except BaseException:
            for space, address in taken:
                space.give_back(address)
            raise
        return result[4], result[6]

    def note(self, endpoint: Endpoint) -> None:
        """An endpoint was found that holds addresses."""
        for space, address in self._held(endpoint):
            space.note(address)

    def give_back(self, endpoint: Endpoint) -> None:
        """An endpoint is gone."""
        for space, address in self._held(endpoint):
            space.give_back(address)

    def _held(self, endpoint: Endpoint) -> list[tuple[ipam.AddressSpace, str]]:
        return [
            (space, address)
            for space in self._spaces.get(endpoint.network, [])
            for address in (endpoint.ip, endpoint.ipv6)
            if address and parse_ip(address) in space.subnet
        ]

    def _know(self, network: Network) -> None:
        self._networks[network.id] = network
        shared = self.shared(network)
        claims = None if shared is None else _SharedClaims(shared, network)
        self._spaces[network.id] = [
            ipam.AddressSpace(pool, self._clock, claims)
            for pool in network.spec.pools
            if pool.subnet
        ]

    def _check(self, network: Network) -> None:
        driver = self._drivers.get(network.driver)
        if driver is None or network.spec.config_only:
            return
        driver.check(network)
        if network.driver != "bridge":
            return
        for other in self._networks.values():
            if other.driver == "bridge" and other.link == network.link:
                raise Forbidden(
                    f"cannot create network {network.name}: bridge {network.link} is used "
                    f"by network {other.name}"
                )

    def _completed(self, id_: str, spec: NetworkSpec) -> NetworkSpec:
        if spec.config_from:
            spec = self._copied(spec)
        if spec.driver in _WITHOUT_LINKS:
            if spec.name not in ("host", "none"):
                raise Forbidden(f'only one instance of "{spec.driver}" network is allowed')
            return spec
        if spec.config_only:
            return spec
        if spec.driver not in self._drivers:
            raise NotFound(
                f"could not find plugin {spec.driver} in v1 plugin registry: "
                f'plugin "{spec.driver}" not found'
            )
        scope = self._drivers[spec.driver].capabilities.scope
        spec = msgspec.structs.replace(spec, scope="swarm" if scope == "global" else "local")
        if spec.ipam_driver == "null":
            return spec
        return self._with_pools(id_, spec)

    def _copied(self, spec: NetworkSpec) -> NetworkSpec:
        template = self.inspect(spec.config_from).spec
        if not template.config_only:
            raise InvalidArgument(f"network {spec.config_from} is not a configuration network")
        return msgspec.structs.replace(
            spec,
            pools=template.pools,
            options=template.options,
            enable_ipv6=template.enable_ipv6,
            internal=template.internal,
            ipam_driver=template.ipam_driver,
        )

    def _with_pools(self, id_: str, spec: NetworkSpec) -> NetworkSpec:
        others = [
            pool.network
            for network in self._networks.values()
            for pool in network.spec.pools
            if pool.subnet
        ]
        pools: list[Pool] = []
        for pool in spec.pools:
            if pool.subnet:
                done = ipam.completed(pool)
                if any(ipam.overlap(done.network, other) for other in others):
                    raise AddressConflict(
                        "invalid pool request: Pool overlaps with other one on this address space"
                    )
                others.append(done.network)
                pools.append(done)
        versions = {pool.network.version for pool in pools}
        if spec.enable_ipv4 and 4 not in versions:
            given = next((pool for pool in spec.pools if not pool.subnet), Pool())
            candidates = ipam.overlay_pools() if spec.scope == "swarm" else ipam.default_pools()
            chosen = ipam.choose(candidates, [*others, *self._host_subnets()])
            pools.insert(0, ipam.completed(msgspec.structs.replace(given, subnet=str(chosen))))
        if spec.enable_ipv6 and 6 not in versions:
            pools.append(ipam.completed(Pool(subnet=str(ipam.unique_local_pool(id_)))))
        return msgspec.structs.replace(spec, pools=tuple(pools))

    def _host_subnets(self) -> list[IPNetwork]:
        """What the host reaches by more than its default route, resolvers included."""
        texts = [route.destination for route in rt.routes(self._netlink, socket.AF_INET)]
        texts = [text for text in texts if not text.endswith("/0")]
        taken: list[IPNetwork] = []
        for text in (*texts, *resolvconf.of_host().nameservers):
            try:
                taken.append(ipaddress.ip_network(text))
            except ValueError:
                continue
        return taken


class _SharedClaims:
    """See :class:`~lazarette.runtime.networks.ipam.Claims`."""

    def __init__(self, driver: SharedNetworkDriver, network: Network) -> None:
        self._driver = driver
        self._network = network

    def claim(self, address: str) -> bool:
        return self._driver.claim(self._network, address)

    def release(self, address: str) -> None:
        self._driver.release(self._network, address)

    def avoid(self) -> set[str]:
        return self._driver.avoid(self._network)


def _space_for(spaces: Sequence[ipam.AddressSpace], wanted: str, version: int) -> ipam.AddressSpace:
    if not wanted:
        return spaces[0]
    address = parse_ip(wanted, version)
    for space in spaces:
        if address in space.subnet:
            return space
    raise InvalidArgument(
        f"invalid address {wanted}: it does not belong to any of this network's subnets"
    )

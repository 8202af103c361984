"""Networks and the endpoints of containers in them: the service behind the API.

Safe to call from any thread; calls block for the few milliseconds the kernel takes.  What
is decided is recorded before the kernel is asked for it, so that :meth:`recover` can
finish or undo whatever a crash cut short.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import re
import secrets
import socket
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lazarette.runtime.events import EventBus
from lazarette.runtime.networks import ipam, namespaces, resolvconf, sysctl
from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks.bridge import BridgeDriver
from lazarette.runtime.networks.contract import NetworkDriver
from lazarette.runtime.networks.directory import Directory
from lazarette.runtime.networks.dns import Resolver, Upstream
from lazarette.runtime.networks.firewall import Firewall, Forward
from lazarette.runtime.networks.model import (
    DEFAULT_NETWORK,
    OPTION_BRIDGE_NAME,
    OPTION_DEFAULT,
    OPTION_HOST_ADDRESS,
    OPTION_ICC,
    OPTION_INTERFACE_PREFIX,
    OPTION_MASQUERADE,
    PREDEFINED,
    AddressConflict,
    Endpoint,
    EndpointExists,
    EndpointNotFound,
    EndpointRequest,
    IPNetwork,
    Network,
    NetworkExists,
    NetworkInUse,
    NetworkNotFound,
    NetworkSpec,
    Pool,
    PortBinding,
    PortRequest,
    PruneRunning,
    parse_ip,
    parse_mac,
)
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.ports import HeldPort, HostPorts
from lazarette.runtime.networks.records import LiveRecords, NetworkRecords
from lazarette.storage.clock import Clock
from lazarette.storage.errors import Forbidden, InvalidArgument, LazaretteError, NotFound
from lazarette.storage.state import State

log = logging.getLogger(__name__)

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_. -]*")
_INTERFACE_OPTION = "com.docker.network.endpoint.ifname"
_SYSCTLS_OPTION = "com.docker.network.endpoint.sysctls"
_LOOPBACK_UP = nl.link_set(1, "start lo", up=True)


@dataclass
class Sandbox:
    """What a container has: its namespace, endpoints by network id, and ports.

    Attributes:
        path: the namespace's file.
        endpoints: by network id, in the order they were made.
        held: host ports held for it.
        forwards: what the firewall does for them.
        dns: resolvers the container was given, instead of the host's.
    """

    path: Path
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    held: list[HeldPort] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    dns: tuple[str, ...] = ()


class NetworkManager:
    """All networks of one daemon.

    Bridges, table and ports are those of the network namespace it is made in.

    Args:
        state: the daemon's database.
        exec_root: where namespaces are bound and live records kept.
        bridge: name of the default bridge; names the nftables table and links too.
        events: told of networks made and removed, joined and left.
        clock: stamps networks.
    """

    def __init__(
        self, state: State, exec_root: Path, bridge: str, events: EventBus, clock: Clock
    ) -> None:
        self.clock = clock
        self._events = events
        self._bridge = bridge
        self._folder = exec_root / "netns"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._prefix = "lz" + hashlib.sha256(bridge.encode()).hexdigest()[:4]
        self.host = NetNamespace.current()
        self.netlink = nl.Netlink()
        self._firewall = Firewall(f"lazarette-{bridge}")
        self._ports = HostPorts(self.host)
        self._directory = Directory()
        self._resolver = Resolver(self._directory, self.host)
        self._records = NetworkRecords(state)
        self.live = LiveRecords(exec_root)
        self._drivers: dict[str, NetworkDriver] = {
            "bridge": BridgeDriver(self.host, self.netlink),
        }
        self.lock = threading.RLock()
        self._rules = threading.Lock()
        self._networks: dict[str, Network] = {}
        self._spaces: dict[str, list[ipam.AddressSpace]] = {}
        self._sandboxes: dict[str, Sandbox] = {}
        self._pruning = threading.Lock()

    def recover(self, active: Collection[str]) -> None:
        """Bring the host to what the records say; call once, before anything else.

        Args:
            active: ids of containers that run; sandboxes of all others are removed.
        """
        with self.lock:
            for network in self._records.load():
                self._know(network)
            self._predefine()
            for network in self._networks.values():
                self._make_again(network)
            self._recover_sandboxes(active)
            self._sweep()
            self._rebuild()

    def close(self) -> None:
        """Let go of sockets and files; networks, endpoints and rules stay."""
        self._resolver.close()
        self._ports.close()
        self._firewall.close()
        self.netlink.close()
        self.host.close()
        self.live.close()

    def _predefine(self) -> None:
        names = {network.name for network in self._networks.values()}
        if DEFAULT_NETWORK not in names:
            options = {
                OPTION_DEFAULT: "true",
                OPTION_ICC: "true",
                OPTION_MASQUERADE: "true",
                OPTION_HOST_ADDRESS: "0.0.0.0",
                OPTION_BRIDGE_NAME: self._bridge,
            }
            self._add(NetworkSpec(name=DEFAULT_NETWORK, options=options))
        for name, driver in (("host", "host"), ("none", "null")):
            if name not in names:
                self._add(NetworkSpec(name=name, driver=driver))

    def _make_again(self, network: Network) -> None:
        driver = self._drivers.get(network.driver)
        if driver is None or network.spec.config_only:
            return
        try:
            driver.make(network)
        except LazaretteError as error:
            log.warning("network %s cannot be brought up: %s", network.name, error)

    def _recover_sandboxes(self, active: Collection[str]) -> None:
        for endpoint in self.live.endpoints():
            path = self._folder / endpoint.container
            if endpoint.container in active and namespaces.is_bound(path):
                sandbox = self._sandboxes.setdefault(endpoint.container, Sandbox(path))
                sandbox.endpoints[endpoint.network] = endpoint
                self._note(endpoint)
                if self._has_names(endpoint):
                    self._directory.add(endpoint)
            else:
                self.live.forget_container(endpoint.container)
        for container, dns in self.live.dns().items():
            if container in self._sandboxes:
                self._sandboxes[container].dns = tuple(dns)
        for container in self._sandboxes:
            self._resolve(container)
        for container, bindings in self.live.ports().items():
            known = self._sandboxes.get(container)
            if known is None:
                self.live.forget_container(container)
                continue
            known.held = self._ports.hold_again(bindings)
            known.forwards = self._forwards(container, bindings)
        for file in self._folder.iterdir():
            if file.name not in self._sandboxes:
                if file.name in active and namespaces.is_bound(file):
                    self._sandboxes[file.name] = Sandbox(file)
                else:
                    namespaces.remove(file)

    def _sweep(self) -> None:
        """Remove links of ours that no endpoint has."""
        wanted = {
            endpoint.host_interface
            for sandbox in self._sandboxes.values()
            for endpoint in sandbox.endpoints.values()
        }
        stray = [
            link.name
            for link in nl.links(self.netlink)
            if link.name.startswith(self._prefix) and link.name not in wanted
        ]
        self.netlink.run([nl.link_delete(name) for name in stray])

    def _rebuild(self) -> None:
        """Make the firewall's table anew from what is known."""
        with self._rules, self.lock:
            segments = [
                segment
                for network in self._networks.values()
                if (driver := self._drivers.get(network.driver)) is not None
                and (segment := driver.segment(network)) is not None
            ]
            forwards = [f for sandbox in self._sandboxes.values() for f in sandbox.forwards]
            self._firewall.replace(segments, forwards)

    def networks(self) -> list[Network]:
        """All networks, oldest first."""
        with self.lock:
            return sorted(self._networks.values(), key=lambda network: network.created_ns)

    def inspect(self, ref: str) -> Network:
        """A network by id, name or the beginning of its id.

        Raises:
            NetworkNotFound: there is none.
            InvalidArgument: the beginning fits several.
        """
        with self.lock:
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

    def endpoints(self, ref: str) -> list[Endpoint]:
        """The active endpoints of a network."""
        network = self.inspect(ref)
        with self.lock:
            return [
                sandbox.endpoints[network.id]
                for sandbox in self._sandboxes.values()
                if network.id in sandbox.endpoints
            ]

    def create(self, spec: NetworkSpec) -> Network:
        """Make a network.

        Raises:
            InvalidArgument: the name, an address or an option is wrong.
            NetworkExists: the name is taken.
            AddressConflict: a pool overlaps another network's, or none is left.
            NotFound: no such driver.
        """
        if spec.name in PREDEFINED:
            raise Forbidden(f"operation is not permitted on predefined {spec.name} network")
        if not _NAME.fullmatch(spec.name):
            raise InvalidArgument(f"invalid network name: {spec.name or 'it is empty'}")
        with self.lock:
            network = self._add(spec)
            driver = self._drivers.get(network.driver)
        try:
            if driver is not None and not spec.config_only:
                driver.make(network)
                self._rebuild()
        except BaseException:
            self._drop(network)
            raise
        self._tell(network, "create")
        return network

    def remove(self, ref: str) -> None:
        """Remove a network without endpoints.

        Raises:
            NetworkNotFound: there is none.
            NetworkInUse: it has endpoints or is predefined.
        """
        network = self.inspect(ref)
        with self.lock:
            if not network.user_defined:
                raise NetworkInUse(f"{network.name} is a pre-defined network and cannot be removed")
            users = [
                endpoint.request.name or endpoint.container[:12]
                for endpoint in self.endpoints(network.id)
            ]
            if users:
                raise NetworkInUse(
                    f"error while removing network: network {network.name} id {network.id} "
                    f"has active endpoints ({', '.join(users)})",
                    hint="disconnect or stop them first",
                )
            del self._networks[network.id]
        self._drop(network)
        self._tell(network, "destroy")

    def prune(self, wanted: Collection[str]) -> list[str]:
        """Remove those of the networks with these ids that are user-defined and unused.

        Returns:
            Names of those removed.

        Raises:
            PruneRunning: another prune has not ended.
        """
        if not self._pruning.acquire(blocking=False):
            raise PruneRunning("a prune operation is already running")
        removed = []
        try:
            for network in self.networks():
                if not network.user_defined or network.id not in wanted:
                    continue
                try:
                    self.remove(network.id)
                    removed.append(network.name)
                except (NetworkInUse, NetworkNotFound):
                    continue
        finally:
            self._pruning.release()
        return removed

    def _add(self, spec: NetworkSpec) -> Network:
        """Check, complete and record a network; the lock is held or not needed."""
        if any(network.name == spec.name for network in self._networks.values()):
            raise NetworkExists(f"network with name {spec.name} already exists")
        if spec.config_from:
            spec = self._copied(spec)
        id_ = secrets.token_hex(32)
        if spec.driver not in ("host", "null") and not spec.config_only:
            if spec.driver not in self._drivers:
                raise NotFound(
                    f"could not find plugin {spec.driver} in v1 plugin registry: "
                    f'plugin "{spec.driver}" not found'
                )
            spec = self._with_pools(id_, spec)
        elif spec.driver in ("host", "null") and spec.name not in ("host", "none"):
            raise Forbidden(f'only one instance of "{spec.driver}" network is allowed')
        network = Network(id=id_, created_ns=self.clock.now_ns(), spec=spec)
        driver = self._drivers.get(spec.driver)
        if driver is not None and not spec.config_only:
            driver.check(network)
            taken = {
                other.link: other for other in self._networks.values() if other.driver == "bridge"
            }
            if spec.driver == "bridge" and network.link in taken:
                raise Forbidden(
                    f"cannot create network {network.id}: bridge name {network.link} "
                    f"is used by network {taken[network.link].name}"
                )
        self._records.save(network)
        self._know(network)
        return network

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
            chosen = ipam.choose(ipam.default_pools(), [*others, *self._host_routes()])
            pools.insert(0, ipam.completed(msgspec.structs.replace(given, subnet=str(chosen))))
        if spec.enable_ipv6 and 6 not in versions:
            pools.append(ipam.completed(Pool(subnet=str(ipam.unique_local_pool(id_)))))
        return msgspec.structs.replace(spec, pools=tuple(pools))

    def _host_routes(self) -> list[IPNetwork]:
        taken: list[IPNetwork] = []
        for route in nl.routes(self.netlink, socket.AF_INET):
            if not route.destination.endswith("/0"):
                taken.append(ipaddress.ip_network(route.destination))
        for server in resolvconf.of_host().nameservers:
            try:
                taken.append(ipaddress.ip_network(server))
            except ValueError:
                continue
        return taken

    def _know(self, network: Network) -> None:
        self._networks[network.id] = network
        self._spaces[network.id] = [
            ipam.AddressSpace(pool, self.clock) for pool in network.spec.pools if pool.subnet
        ]

    def _drop(self, network: Network) -> None:
        with self.lock:
            self._networks.pop(network.id, None)
            self._spaces.pop(network.id, None)
        driver = self._drivers.get(network.driver)
        if driver is not None and not network.spec.config_only:
            driver.unmake(network)
            self._rebuild()
        self._records.forget(network.id)

    def create_sandbox(self, container: str) -> Path:
        """Make a container's network namespace, with ``lo`` up; one it has is kept.

        Returns:
            The file it is bound to.
        """
        path = self._folder / container
        namespaces.create(path, _furnish)
        with self.lock:
            self._sandboxes.setdefault(container, Sandbox(path))
        return path

    def remove_sandbox(self, container: str) -> None:
        """Unbind a container's namespace; it ends with its last process."""
        self.teardown(container)

    def attach(self, container: str, requests: Sequence[EndpointRequest]) -> list[Endpoint]:
        """Join a sandbox to networks, to all or to none; those it is in are kept.

        Raises:
            NetworkNotFound: one does not exist.
            AddressConflict: an address is taken or none is left.
            InvalidArgument: an address or option is wrong.
        """
        made: list[Endpoint] = []
        result: list[Endpoint] = []
        try:
            for request in requests:
                network = self.inspect(request.network)
                with self.lock:
                    known = self._sandbox(container).endpoints.get(network.id)
                if known is None:
                    known = self._join(container, network, request)
                    made.append(known)
                result.append(known)
            self._route(container)
        except BaseException:
            for endpoint in made:
                self._leave(endpoint)
            raise
        return result

    def connect(self, ref: str, container: str, request: EndpointRequest) -> Endpoint:
        """Join a running container to one more network.

        Raises:
            EndpointExists: it is in it already.
        """
        network = self.inspect(ref)
        with self.lock:
            if network.id in self._sandbox(container).endpoints:
                name = request.name or container[:12]
                raise EndpointExists(
                    f"endpoint with name {name} already exists in network {network.name}"
                )
        endpoint = self.attach(container, [msgspec.structs.replace(request, network=network.id)])[0]
        self._retarget(container)
        return endpoint

    def disconnect(self, ref: str, container: str) -> None:
        """Take a running container out of a network.

        Raises:
            EndpointNotFound: it is not in it.
        """
        network = self.inspect(ref)
        with self.lock:
            sandbox = self._sandboxes.get(container)
            endpoint = sandbox.endpoints.get(network.id) if sandbox else None
        if endpoint is None:
            raise EndpointNotFound(
                f"container {container} is not connected to network {network.name}"
            )
        self._leave(endpoint)
        self._route(container)
        self._retarget(container)

    def containers(self) -> list[str]:
        """Ids of containers that have a sandbox."""
        with self.lock:
            return list(self._sandboxes)

    def of_container(self, container: str) -> list[Endpoint]:
        """A container's endpoints."""
        with self.lock:
            sandbox = self._sandboxes.get(container)
            return list(sandbox.endpoints.values()) if sandbox else []

    def teardown(self, container: str) -> None:
        """Give back all a container has: ports, endpoints, namespace.  None is fine."""
        with self.lock:
            sandbox = self._sandboxes.get(container)
        if sandbox is None:
            namespaces.remove(self._folder / container)
            return
        self._resolver.stop(container)
        self.unpublish(container)
        for endpoint in list(sandbox.endpoints.values()):
            self._leave(endpoint)
        with self.lock:
            self._sandboxes.pop(container, None)
        self.live.forget_container(container)
        namespaces.remove(sandbox.path)

    def _sandbox(self, container: str) -> Sandbox:
        try:
            return self._sandboxes[container]
        except KeyError:
            raise NotFound(f"container {container[:12]} has no network sandbox") from None

    def _join(self, container: str, network: Network, request: EndpointRequest) -> Endpoint:
        driver = self._drivers.get(network.driver)
        if driver is None or network.spec.config_only:
            raise Forbidden(f"container cannot be connected to network {network.name}")
        with self.lock:
            sandbox = self._sandbox(container)
            endpoint = self._plan(container, sandbox, network, request, driver)
            sandbox.endpoints[network.id] = endpoint
            self.live.save_endpoint(endpoint)
        try:
            with NetNamespace.at(sandbox.path) as namespace:
                driver.join(network, endpoint, namespace)
                self._set_sysctls(endpoint, namespace)
        except BaseException:
            self._forget(endpoint)
            raise
        if self._has_names(endpoint):
            self._directory.add(endpoint)
            self._resolve(container)
        self._tell(network, "connect", container=container)
        return endpoint

    def _plan(
        self,
        container: str,
        sandbox: Sandbox,
        network: Network,
        request: EndpointRequest,
        driver: NetworkDriver,
    ) -> Endpoint:
        """Choose addresses and names for a new endpoint."""
        id_ = secrets.token_hex(32)
        four, six = self._take(network, request)
        mac = parse_mac(request.mac) if request.mac else _mac_of(four[0], id_)
        short = container[:12]
        names = [request.name, *request.aliases, short, request.hostname]
        return Endpoint(
            id=id_,
            container=container,
            network=network.id,
            network_name=network.name,
            interface=_interface(sandbox, network, request),
            host_interface=f"{self._prefix}{id_[:8]}",
            ip=four[0],
            prefix=four[1],
            gateway="" if network.spec.internal else four[2],
            ipv6=six[0],
            ipv6_prefix=six[1],
            ipv6_gateway="" if network.spec.internal else six[2],
            mac=mac,
            dns_names=tuple(dict.fromkeys(name for name in names if name)),
            request=request,
        )

    def _take(
        self, network: Network, request: EndpointRequest
    ) -> tuple[tuple[str, int, str], tuple[str, int, str]]:
        """Addresses as (address, prefix length, gateway), one of each family."""
        result = {4: ("", 0, ""), 6: ("", 0, "")}
        enabled = {4: network.spec.enable_ipv4, 6: network.spec.enable_ipv6}
        taken: list[tuple[ipam.AddressSpace, str]] = []
        try:
            for version, wanted in ((4, request.ipv4), (6, request.ipv6)):
                spaces = [s for s in self._spaces[network.id] if s.subnet.version == version]
                if wanted and not spaces:
                    raise InvalidArgument(
                        f"invalid config for network {network.name}: no subnet contains {wanted}"
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

    def _note(self, endpoint: Endpoint) -> None:
        for space in self._spaces.get(endpoint.network, []):
            for address in (endpoint.ip, endpoint.ipv6):
                if address and parse_ip(address) in space.subnet:
                    space.note(address)

    def _leave(self, endpoint: Endpoint) -> None:
        with self.lock:
            network = self._networks.get(endpoint.network)
            sandbox = self._sandboxes.get(endpoint.container)
        if network is not None and sandbox is not None:
            driver = self._drivers[network.driver]
            try:
                namespace = NetNamespace.at(sandbox.path)
            except FileNotFoundError:
                driver.leave(network, endpoint, None)
            else:
                with namespace:
                    driver.leave(network, endpoint, namespace)
        self._forget(endpoint)
        if network is not None:
            self._tell(network, "disconnect", container=endpoint.container)

    def _forget(self, endpoint: Endpoint) -> None:
        self._directory.remove(endpoint)
        with self.lock:
            sandbox = self._sandboxes.get(endpoint.container)
            if sandbox is not None:
                sandbox.endpoints.pop(endpoint.network, None)
            self.live.forget_endpoint(endpoint)
            for space in self._spaces.get(endpoint.network, []):
                for address in (endpoint.ip, endpoint.ipv6):
                    if address and parse_ip(address) in space.subnet:
                        space.give_back(address)

    def _gateway_endpoint(self, container: str) -> Endpoint | None:
        """The endpoint a container's way out goes through, as Docker chooses it."""
        with self.lock:
            sandbox = self._sandboxes.get(container)
            able = (
                [e for e in sandbox.endpoints.values() if e.gateway or e.ipv6_gateway]
                if sandbox
                else []
            )
        return min(able, key=lambda e: (-e.request.gateway_priority, e.network_name), default=None)

    def _route(self, container: str) -> None:
        """Set the default routes of a sandbox."""
        chosen = self._gateway_endpoint(container)
        with self.lock:
            path = self._sandbox(container).path
        with NetNamespace.at(path) as namespace, namespace.entered():
            inside = nl.Netlink()
            index = socket.if_nametoindex(chosen.interface) if chosen else 0
        with inside:
            messages = []
            for family, gateway in (
                (socket.AF_INET, chosen.gateway if chosen else ""),
                (socket.AF_INET6, chosen.ipv6_gateway if chosen else ""),
            ):
                if gateway:
                    messages.append(nl.route_replace(gateway, family=family, index=index))
                else:
                    messages.append(nl.route_delete_default(family))
            inside.run(messages)

    @staticmethod
    def _set_sysctls(endpoint: Endpoint, namespace: NetNamespace) -> None:
        wanted = endpoint.request.driver_opts.get(_SYSCTLS_OPTION, "")
        with namespace.entered():
            for assignment in filter(None, wanted.split(",")):
                key, _, value = assignment.partition("=")
                key = key.strip().replace("IFNAME", endpoint.interface)
                parts = key.split(".")
                if parts[0] != "net" or "" in parts or any("/" in part for part in parts):
                    raise InvalidArgument(f"invalid endpoint sysctl {assignment}")
                sysctl.write("/".join(parts[1:]), value.strip())

    def publish(self, container: str, ports: Sequence[PortRequest]) -> list[PortBinding]:
        """Send host ports to a container, all or none; replaces what it had.

        Fixed host ports are taken before chosen ones.  A container without a way out
        (on internal networks only) publishes nothing.

        Raises:
            PortAllocated: a host port is held by somebody; nothing is left behind.
        """
        self.unpublish(container)
        endpoint = self._gateway_endpoint(container)
        if endpoint is None or not ports:
            return []
        with self.lock:
            default = self._networks[endpoint.network].spec.options.get(OPTION_HOST_ADDRESS, "")
        if default and default != "0.0.0.0":
            ports = [
                port if port.host_ip else msgspec.structs.replace(port, host_ip=default)
                for port in ports
            ]
        held = self._ports.reserve(ports)
        try:
            bindings = [each.binding for each in held]
            forwards = self._forwards(container, bindings)
            with self.lock:
                sandbox = self._sandbox(container)
                self.live.save_ports(container, bindings)
            self._expose(endpoint)
            with self._rules:
                self._firewall.add(forwards)
                with self.lock:
                    sandbox.held, sandbox.forwards = held, forwards
        except BaseException:
            self.live.save_ports(container, [])
            self._ports.release(held)
            raise
        return bindings

    def _expose(self, endpoint: Endpoint) -> None:
        with self.lock:
            driver = self._drivers[self._networks[endpoint.network].driver]
        driver.expose(endpoint)

    def unpublish(self, container: str) -> None:
        """Take a container's host ports back; none is fine."""
        with self.lock:
            sandbox = self._sandboxes.get(container)
        if sandbox is None or not (sandbox.held or sandbox.forwards):
            return
        with self._rules:
            self._firewall.withdraw(sandbox.forwards)
            with self.lock:
                held, sandbox.held, sandbox.forwards = sandbox.held, [], []
        self._ports.release(held)
        self.live.save_ports(container, [])

    def published(self, container: str) -> list[PortBinding]:
        """The ports a container has on the host."""
        with self.lock:
            sandbox = self._sandboxes.get(container)
            return [each.binding for each in sandbox.held] if sandbox else []

    def _forwards(self, container: str, bindings: Sequence[PortBinding]) -> list[Forward]:
        endpoint = self._gateway_endpoint(container)
        if endpoint is None:
            return []
        forwards = []
        for binding in bindings:
            six = ":" in binding.host_ip
            target = endpoint.ipv6 if six else endpoint.ip
            if target and binding.host_ip != "::1":
                anywhere = binding.host_ip in ("0.0.0.0", "::")
                forwards.append(
                    Forward(
                        proto=binding.proto,
                        host_ip="" if anywhere else binding.host_ip,
                        host_port=binding.host_port,
                        target=target,
                        target_port=binding.container_port,
                    )
                )
        return forwards

    def _retarget(self, container: str) -> None:
        """The way out may have changed: send published ports to the right address."""
        with self._rules:
            with self.lock:
                sandbox = self._sandbox(container)
                old = sandbox.forwards
                new = self._forwards(container, [each.binding for each in sandbox.held])
                sandbox.forwards = new
            if old != new:
                endpoint = self._gateway_endpoint(container)
                if endpoint is not None:
                    self._expose(endpoint)
                self._firewall.withdraw(old)
                self._firewall.add(new)

    def resolv_conf(
        self,
        container: str,
        dns: Sequence[str] = (),
        search: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> bytes:
        """The ``/etc/resolv.conf`` for a container as it is attached now.

        The embedded resolver asks the servers given here from then on; ask again after
        :meth:`connect`, which may bring the resolver in.
        """
        with self.lock:
            sandbox = self._sandboxes.get(container)
        if sandbox is not None and sandbox.dns != tuple(dns):
            sandbox.dns = tuple(dns)
            self.live.save_dns(container, list(dns))
        embedded = any(self._has_names(endpoint) for endpoint in self.of_container(container))
        conf = resolvconf.for_container(
            resolvconf.of_host(), embedded=embedded, dns=dns, search=search, options=options
        )
        return conf.render()

    def hosts_entries(self, container: str, hostname: str) -> list[tuple[str, str]]:
        """Lines of ``/etc/hosts`` for a container's own name: (address, names)."""
        entries = []
        for endpoint in self.of_container(container):
            for address in (endpoint.ip, endpoint.ipv6):
                if address:
                    entries.append((address, hostname))
        return entries

    def _resolve(self, container: str) -> None:
        """Serve names to a container that is in a network with names."""
        with self.lock:
            sandbox = self._sandbox(container)
            wanted = any(self._has_names(endpoint) for endpoint in sandbox.endpoints.values())
        if wanted and not self._resolver.serves(container):
            namespace = NetNamespace.at(sandbox.path)
            self._resolver.start(container, namespace, lambda: self._upstream(container))

    def _upstream(self, container: str) -> Upstream:
        """Whom the embedded resolver asks: nobody, for a container without a way out."""
        with self.lock:
            sandbox = self._sandboxes.get(container)
        if sandbox is not None and sandbox.dns:
            return Upstream(sandbox.dns, inside=True)
        if self._gateway_endpoint(container) is None:
            return Upstream()
        return Upstream(resolvconf.of_host().nameservers)

    def _has_names(self, endpoint: Endpoint) -> bool:
        with self.lock:
            network = self._networks.get(endpoint.network)
        return network is not None and network.user_defined

    def _tell(self, network: Network, action: str, **attributes: str) -> None:
        told: Mapping[str, str] = {"name": network.name, "type": network.driver, **attributes}
        self._events.publish("network", action, network.id, told)


def _furnish() -> None:
    """From inside a new namespace: loopback up, IPv6 only where a network has it."""
    with nl.Netlink() as inside:
        inside.run([_LOOPBACK_UP])
    sysctl.write("ipv6/conf/default/disable_ipv6", "1", needed=False)


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


def _mac_of(ip: str, id_: str) -> str:
    """Locally administered, from the IPv4 address as Docker long did: unique with it, and
    the same again for the same address, so that neighbours' tables stay right."""
    tail = parse_ip(ip, 4).packed if ip else bytes.fromhex(id_[:8])
    return "02:42:" + ":".join(f"{byte:02x}" for byte in tail)


def _interface(sandbox: Sandbox, network: Network, request: EndpointRequest) -> str:
    used = {endpoint.interface for endpoint in sandbox.endpoints.values()}
    wanted = request.driver_opts.get(_INTERFACE_OPTION, "")
    if wanted:
        if len(wanted) > 15 or "/" in wanted or wanted in used:
            raise InvalidArgument(f"invalid interface name {wanted}")
        return wanted
    prefix = network.spec.options.get(OPTION_INTERFACE_PREFIX, "eth")
    return next(name for n in range(len(used) + 1) if (name := f"{prefix}{n}") not in used)

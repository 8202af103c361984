"""Networks and the endpoints of containers in them: the service behind the API.

Safe to call from any thread; calls block for the few milliseconds the kernel takes.  What
is decided is recorded before the kernel is asked for it, so that :meth:`recover` can
finish or undo whatever a crash cut short.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from lazarette.runtime.events import EventBus
from lazarette.runtime.networks import namespaces, resolvconf
from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks.background import Background
from lazarette.runtime.networks.bridge import BridgeDriver
from lazarette.runtime.networks.carrier import Carrier
from lazarette.runtime.networks.catalogue import Catalogue
from lazarette.runtime.networks.cluster import Cluster, Record
from lazarette.runtime.networks.contract import NetworkDriver
from lazarette.runtime.networks.directory import Directory
from lazarette.runtime.networks.dns import Resolver, Upstream
from lazarette.runtime.networks.etcd import ClusterConfig
from lazarette.runtime.networks.firewall import Firewall
from lazarette.runtime.networks.macvlan import ParentDriver
from lazarette.runtime.networks.model import (
    OPTION_HOST_ADDRESS,
    PREDEFINED,
    Endpoint,
    EndpointExists,
    EndpointNotFound,
    EndpointRequest,
    Network,
    NetworkInUse,
    NetworkNotFound,
    NetworkSpec,
    PortBinding,
    PortRequest,
    PruneRunning,
    parse_ip,
    parse_mac,
)
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.overlay import OverlayDriver, record_of
from lazarette.runtime.networks.peers import Peers
from lazarette.runtime.networks.ports import HostPorts
from lazarette.runtime.networks.publishing import Publisher
from lazarette.runtime.networks.reaper import LinkReaper
from lazarette.runtime.networks.records import LiveRecords, NetworkRecords
from lazarette.runtime.networks.sandbox import Sandbox, furnish, set_sysctls
from lazarette.runtime.networks.watch import TableWatch
from lazarette.storage.clock import Clock
from lazarette.storage.errors import Forbidden, LazaretteError, NotFound
from lazarette.storage.state import State

log = logging.getLogger(__name__)


class NetworkManager:
    """All networks of one daemon.

    Bridges, table and ports are those of the network namespace it is made in.

    Args:
        state: the daemon's database.
        exec_root: where namespaces are bound and live records kept.
        bridge: name of the default bridge; names the nftables table and links too.
        events: told of networks made and removed, joined and left.
        clock: stamps networks.
        cluster: how to take part in networks over several hosts; None: not at all.
    """

    def __init__(
        self,
        state: State,
        exec_root: Path,
        bridge: str,
        events: EventBus,
        clock: Clock,
        cluster: ClusterConfig | None = None,
    ) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self.host = NetNamespace.current()
        self.netlink = nl.Netlink()
        self._events = events
        self._bridge = bridge
        self._folder = exec_root / "netns"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._prefix = "lz" + hashlib.sha256(bridge.encode()).hexdigest()[:4]
        self.live = LiveRecords(exec_root)
        self._background = Background()
        self._directory = Directory()
        self._resolver = Resolver(self._background, self._directory, self.host)
        self._firewall = Firewall(f"lazarette-{bridge}")
        self._ports = HostPorts(self.host)
        self._publisher = Publisher(
            self._firewall,
            self._ports,
            Carrier(self._background, self.host),
            self.live,
            self._expose,
        )
        overlay = OverlayDriver(self.host, self.netlink)
        self._drivers: dict[str, NetworkDriver] = {
            "overlay": overlay,
            "bridge": BridgeDriver(self.host, self.netlink),
            "macvlan": ParentDriver("macvlan", self.host, self.netlink),
            "ipvlan": ParentDriver("ipvlan", self.host, self.netlink),
        }
        records = NetworkRecords(state)
        self._catalogue = Catalogue(records, self._drivers, self.netlink, clock, self.lock)
        self._sandboxes: dict[str, Sandbox] = {}
        self._cluster: Cluster | None = None
        if cluster is not None:
            host_id = records.host_id()
            self._peers = Peers(
                host_id, self._catalogue, self._directory, overlay, self._in_use, self._rebuild
            )
            self._cluster = overlay.cluster = Cluster(
                cluster, host_id, self.host, self._peers.follow, self._lose
            )
        self._reaper = LinkReaper()
        self._pruning = threading.Lock()

    def recover(self, active: Collection[str]) -> None:
        """Bring the host to what the records say; call once, before anything else.

        Args:
            active: ids of containers that run; sandboxes of all others are removed.
        """
        with self.lock:
            self._catalogue.load(self._bridge)
            for network in self._catalogue.all():
                self._make_again(network)
            self._recover_sandboxes(active)
            self._sweep()
            self._rebuild()
        if self._cluster is not None:
            self._join_cluster(self._cluster)
        watch = TableWatch(lambda port: port == self._firewall.port, self.restore_rules)
        self._background.start(watch.run())

    def close(self, *, take_down: bool = False) -> None:
        """Let go of sockets and files; networks, endpoints and rules stay.

        Args:
            take_down: remove links and rules too, for an engine that ends for good; no
                container may run.  The next start makes them again.
        """
        if self._cluster is not None:
            self._cluster.close()
        self._resolver.close()
        for sandbox in self._sandboxes.values():
            self._publisher.let_go(sandbox)
        self._background.close()
        self._reaper.close()
        self._ports.close()
        if take_down:
            self._take_down()
        self._firewall.close()
        self.netlink.close()
        self.host.close()
        self.live.close()

    def _take_down(self) -> None:
        for network in self._catalogue.all():
            driver = self._driver(network)
            if driver is not None:
                driver.unmake(network)
        self._firewall.remove()

    def _join_cluster(self, cluster: Cluster) -> None:
        shared = [n for n in self._catalogue.all() if self._catalogue.shared(n) is not None]
        self._peers.expect(shared)
        ids = {network.id for network in shared}
        running = [
            record_of(endpoint, cluster)
            for sandbox in self._sandboxes.values()
            for endpoint in sandbox.endpoints.values()
            if endpoint.network in ids
        ]
        cluster.start(running)

    def _lose(self, record: Record) -> None:
        """Another host has an endpoint's address: take it from the container here."""
        for container in self.containers():
            for endpoint in self.of_container(container):
                if endpoint.id == record.endpoint:
                    log.warning(
                        "container %s loses %s in network %s: another host took it over "
                        "while this one was cut off",
                        container[:12],
                        endpoint.ip,
                        endpoint.network_name,
                    )
                    self.disconnect(endpoint.network, container)

    def _in_use(self, network_id: str) -> bool:
        with self.lock:
            return any(network_id in s.endpoints for s in self._sandboxes.values())

    def restore_rules(self) -> None:
        """Put the firewall's table back if somebody flushed or changed it."""
        if not self._firewall.intact():
            log.warning("the firewall table %s was changed; restoring it", self._firewall.name)
            self._rebuild()

    def _make_again(self, network: Network) -> None:
        driver = self._driver(network)
        if driver is None:
            return
        try:
            driver.make(network)
        except LazaretteError as error:
            log.warning("network %s cannot be brought up: %s", network.name, error)

    def _recover_sandboxes(self, active: Collection[str]) -> None:
        for file in self._folder.iterdir():
            if file.name in active and namespaces.is_bound(file):
                self._sandboxes[file.name] = Sandbox(file.name, file)
            else:
                namespaces.remove(file)
        for endpoint in self.live.endpoints():
            sandbox = self._sandboxes.get(endpoint.container)
            if sandbox is None or self._catalogue.get(endpoint.network) is None:
                self.live.forget_container(endpoint.container)
                continue
            sandbox.endpoints[endpoint.network] = endpoint
            self._catalogue.note(endpoint)
            if self._has_names(endpoint):
                self._directory.add(endpoint)
        dns, ports = self.live.dns(), self.live.ports()
        for container, sandbox in self._sandboxes.items():
            sandbox.dns = tuple(dns.get(container, ()))
            self._resolve(sandbox, again=True)
            self._publisher.recover(sandbox, ports.get(container, []))
        for container in ports.keys() - self._sandboxes.keys():
            self.live.forget_container(container)

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
        with self._publisher.rules, self.lock:
            segments = [
                segment
                for network in self._catalogue.all()
                if (driver := self._driver(network)) is not None
                and (segment := driver.segment(network)) is not None
            ]
            forwards = [f for sandbox in self._sandboxes.values() for f in sandbox.forwards]
            self._firewall.replace(segments, forwards)

    def _driver(self, network: Network) -> NetworkDriver | None:
        """Who wires a network; None for those that have no links."""
        return None if network.spec.config_only else self._drivers.get(network.driver)

    def networks(self) -> list[Network]:
        """All networks, oldest first."""
        return self._catalogue.all()

    def inspect(self, ref: str) -> Network:
        """A network by id, name or the beginning of its id.

        Raises:
            NetworkNotFound: there is none.
            InvalidArgument: the beginning fits several.
        """
        return self._catalogue.inspect(ref)

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
        network = self._catalogue.add(spec)
        driver = self._driver(network)
        try:
            if driver is not None:
                driver.make(network)
                self._rebuild()
        except BaseException:
            self._retire(network)
            self._unmake(network)
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
        if not network.user_defined:
            raise NetworkInUse(f"{network.name} is a pre-defined network and cannot be removed")
        shared = self._catalogue.shared(network)
        elsewhere = shared.users(network) if shared is not None else []
        with self.lock:
            here = [e.request.name or e.container[:12] for e in self.endpoints(network.id)]
            users = list(dict.fromkeys([*here, *elsewhere]))
            if users:
                raise NetworkInUse(
                    f"error while removing network: network {network.name} id {network.id} "
                    f"has active endpoints ({', '.join(users)})",
                    hint="disconnect or stop them first",
                )
            self._catalogue.forget(network)
        self._retire(network)
        self._unmake(network)
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

    def _retire(self, network: Network) -> None:
        shared = self._catalogue.shared(network)
        if shared is not None:
            shared.retire(network)

    def _unmake(self, network: Network) -> None:
        self._catalogue.forget(network)
        driver = self._driver(network)
        if driver is not None:
            driver.unmake(network)
            self._rebuild()
        self._catalogue.erase(network)

    def create_sandbox(self, container: str) -> Path:
        """Make a container's network namespace, with ``lo`` up; one it has is kept.

        Returns:
            The file it is bound to.
        """
        path = self._folder / container
        namespaces.create(path, furnish)
        with self.lock:
            self._sandboxes.setdefault(container, Sandbox(container, path))
        return path

    def remove_sandbox(self, container: str) -> None:
        """The same as :meth:`teardown`."""
        self.teardown(container)

    def attach(self, container: str, requests: Sequence[EndpointRequest]) -> list[Endpoint]:
        """Join a sandbox to networks, to all or to none; those it is in are kept.

        Raises:
            NetworkNotFound: one does not exist.
            AddressConflict: an address is taken or none is left.
            InvalidArgument: an address or option is wrong.
        """
        sandbox = self._sandbox(container)
        with sandbox.lock:
            return self._attach(sandbox, requests)

    def _attach(self, sandbox: Sandbox, requests: Sequence[EndpointRequest]) -> list[Endpoint]:
        made: list[Endpoint] = []
        result: list[Endpoint] = []
        try:
            for request in requests:
                network = self.inspect(request.network)
                known = sandbox.endpoints.get(network.id)
                if known is None:
                    known = self._join(sandbox, network, request)
                    made.append(known)
                result.append(known)
            sandbox.set_routes()
        except BaseException:
            for endpoint in made:
                self._leave(sandbox, endpoint)
            raise
        return result

    def connect(self, ref: str, container: str, request: EndpointRequest) -> Endpoint:
        """Join a running container to one more network.

        Raises:
            EndpointExists: it is in it already.
        """
        network = self.inspect(ref)
        sandbox = self._sandbox(container)
        with sandbox.lock:
            if network.id in sandbox.endpoints:
                name = request.name or container[:12]
                raise EndpointExists(
                    f"endpoint with name {name} already exists in network {network.name}"
                )
            wanted = msgspec.structs.replace(request, network=network.id)
            endpoint = self._attach(sandbox, [wanted])[0]
            self._publisher.retarget(sandbox)
        return endpoint

    def disconnect(self, ref: str, container: str) -> None:
        """Take a running container out of a network.

        Raises:
            EndpointNotFound: it is not in it.
        """
        network = self.inspect(ref)
        sandbox = self._sandboxes.get(container)
        missing = EndpointNotFound(
            f"container {container} is not connected to network {network.name}"
        )
        if sandbox is None:
            raise missing
        with sandbox.lock:
            endpoint = sandbox.endpoints.get(network.id)
            if endpoint is None:
                raise missing
            self._leave(sandbox, endpoint)
            sandbox.set_routes()
            self._publisher.retarget(sandbox)

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
        with sandbox.lock:
            self._publisher.unpublish(sandbox)
            self._resolver.stop(container)
            links = [endpoint.host_interface for endpoint in sandbox.endpoints.values()]
            for endpoint in list(sandbox.endpoints.values()):
                self._leave(sandbox, endpoint, ending=True)
            with self.lock:
                self._sandboxes.pop(container, None)
            namespaces.remove(sandbox.path)
            self.live.forget_container(container)
        self._reaper.expect_gone(links)

    def settle(self) -> None:
        """Wait until nothing is left of sandboxes that were torn down."""
        self._reaper.settle()

    def _sandbox(self, container: str) -> Sandbox:
        with self.lock:
            try:
                return self._sandboxes[container]
            except KeyError:
                raise NotFound(f"container {container[:12]} has no network sandbox") from None

    def _join(self, sandbox: Sandbox, network: Network, request: EndpointRequest) -> Endpoint:
        driver = self._driver(network)
        if driver is None:
            raise Forbidden(f"container cannot be connected to network {network.name}")
        endpoint = self._plan(sandbox, network, request)
        with self.lock:
            known = self._catalogue.get(network.id) is not None
            if known:
                sandbox.endpoints[network.id] = endpoint
                self.live.save_endpoint(endpoint)
        if not known:
            raise NetworkNotFound(f"network {network.name} not found")
        try:
            with NetNamespace.at(sandbox.path) as namespace:
                driver.join(network, endpoint, namespace)
                set_sysctls(endpoint, namespace)
            if self._has_names(endpoint):
                self._directory.add(endpoint)
                self._resolve(sandbox)
        except BaseException:
            self._leave(sandbox, endpoint)
            raise
        self._tell(network, "connect", container=sandbox.container)
        return endpoint

    def _plan(self, sandbox: Sandbox, network: Network, request: EndpointRequest) -> Endpoint:
        """Choose names and addresses for a new endpoint."""
        id_ = secrets.token_hex(32)
        interface = sandbox.interface_for(network, request)
        given = parse_mac(request.mac) if request.mac else ""
        four, six = self._catalogue.take(network, request)
        names = (request.name, *request.aliases, sandbox.container[:12], request.hostname)
        return Endpoint(
            id=id_,
            container=sandbox.container,
            network=network.id,
            network_name=network.name,
            interface=interface,
            host_interface=f"{self._prefix}{id_[:8]}",
            ip=four[0],
            prefix=four[1],
            gateway="" if network.spec.internal else four[2],
            ipv6=six[0],
            ipv6_prefix=six[1],
            ipv6_gateway="" if network.spec.internal else six[2],
            mac=given or _mac_of(four[0], id_),
            dns_names=tuple(dict.fromkeys(name for name in names if name)),
            request=request,
        )

    def _leave(self, sandbox: Sandbox, endpoint: Endpoint, *, ending: bool = False) -> None:
        """Undo a join; with ``ending`` the sandbox goes, and its interfaces with it."""
        network = self._catalogue.get(endpoint.network)
        self._directory.remove(endpoint)
        driver = self._driver(network) if network is not None else None
        if network is not None and driver is not None:
            if ending or not namespaces.is_bound(sandbox.path):
                driver.leave(network, endpoint, None)
            else:
                with NetNamespace.at(sandbox.path) as namespace:
                    driver.leave(network, endpoint, namespace)
        with self.lock:
            sandbox.endpoints.pop(endpoint.network, None)
            if not ending:
                self.live.forget_endpoint(endpoint)
        self._catalogue.give_back(endpoint)
        if network is not None:
            self._tell(network, "disconnect", container=sandbox.container)

    def publish(self, container: str, ports: Sequence[PortRequest]) -> list[PortBinding]:
        """Send host ports to a container, all or none; replaces what it had.

        Fixed host ports are taken before chosen ones.  A container without a way out
        (on internal networks only) publishes nothing.

        Raises:
            PortAllocated: a host port is held by somebody; nothing is left behind.
        """
        sandbox = self._sandbox(container)
        endpoint = sandbox.way_out()
        network = self._catalogue.get(endpoint.network) if endpoint else None
        if network is None or not self._publishes(network):
            self._publisher.unpublish(sandbox)
            return []
        address = network.spec.options.get(OPTION_HOST_ADDRESS, "")
        if address not in ("", "0.0.0.0"):
            ports = [
                port if port.host_ip else msgspec.structs.replace(port, host_ip=address)
                for port in ports
            ]
        return self._publisher.publish(sandbox, ports)

    def _publishes(self, network: Network) -> bool:
        driver = self._driver(network)
        return driver is not None and driver.capabilities.publishes

    def unpublish(self, container: str) -> None:
        """Take a container's host ports back; none is fine."""
        with self.lock:
            sandbox = self._sandboxes.get(container)
        if sandbox is not None:
            self._publisher.unpublish(sandbox)

    def published(self, container: str) -> list[PortBinding]:
        """The ports a container has on the host."""
        with self.lock:
            sandbox = self._sandboxes.get(container)
            return [each.binding for each in sandbox.held] if sandbox else []

    def _expose(self, endpoint: Endpoint) -> None:
        network = self._catalogue.get(endpoint.network)
        driver = self._driver(network) if network is not None else None
        if driver is not None:
            driver.expose(endpoint)

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
        return [
            (address, hostname)
            for endpoint in self.of_container(container)
            for address in (endpoint.ip, endpoint.ipv6)
            if address
        ]

    def _resolve(self, sandbox: Sandbox, *, again: bool = False) -> None:
        """Serve names to a container that is in a network with names."""
        wanted = any(self._has_names(endpoint) for endpoint in sandbox.endpoints.values())
        if wanted and not self._resolver.serves(sandbox.container):
            self._resolver.start(
                sandbox.container,
                NetNamespace.at(sandbox.path),
                lambda: _upstream(sandbox),
                again=again,
            )

    def _has_names(self, endpoint: Endpoint) -> bool:
        network = self._catalogue.get(endpoint.network)
        return network is not None and network.user_defined

    def _tell(self, network: Network, action: str, **attributes: str) -> None:
        told: Mapping[str, str] = {"name": network.name, "type": network.driver, **attributes}
        self._events.publish("network", action, network.id, told)


def _upstream(sandbox: Sandbox) -> Upstream:
    """Whom the embedded resolver asks: nobody, for a container without a way out."""
    if sandbox.dns:
        return Upstream(sandbox.dns, inside=True)
    if sandbox.way_out() is None:
        return Upstream()
    return Upstream(resolvconf.of_host().nameservers)


def _mac_of(ip: str, id_: str) -> str:
    """Locally administered, from the IPv4 address as Docker long did: unique with it, and
    the same again for the same address, so that neighbours' tables stay right.
    """
    tail = parse_ip(ip, 4).packed if ip else bytes.fromhex(id_[:8])
    return "02:42:" + ":".join(f"{byte:02x}" for byte in tail)

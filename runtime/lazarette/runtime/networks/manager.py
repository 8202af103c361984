"""Networks and the endpoints of containers in them: the service behind the API.

Safe to call from any thread; calls block for the few milliseconds the kernel takes.  What
is decided is recorded before the kernel is asked for it, so that :meth:`recover` can
finish or undo whatever a crash cut short.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from lazarette.runtime.events import EventBus
from lazarette.runtime.networks import foreign, namespaces
from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks.alone import alone
from lazarette.runtime.networks.background import Background
from lazarette.runtime.networks.bridge import BridgeDriver
from lazarette.runtime.networks.carrier import Carrier
from lazarette.runtime.networks.catalogue import Catalogue
from lazarette.runtime.networks.cluster import Cluster, Record
from lazarette.runtime.networks.contract import NetworkDriver
from lazarette.runtime.networks.directory import Directory
from lazarette.runtime.networks.dns import Resolver
from lazarette.runtime.networks.etcd import ClusterConfig
from lazarette.runtime.networks.firewall import Firewall
from lazarette.runtime.networks.joining import Joiner
from lazarette.runtime.networks.macvlan import ParentDriver
from lazarette.runtime.networks.making import Maker
from lazarette.runtime.networks.model import (
    OPTION_HOST_ADDRESS,
    Endpoint,
    EndpointExists,
    EndpointNotFound,
    EndpointRequest,
    Network,
    NetworkSpec,
    PortBinding,
    PortRequest,
    routed_versions,
)
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.naming import Naming
from lazarette.runtime.networks.overlay import OverlayDriver
from lazarette.runtime.networks.peers import Peers
from lazarette.runtime.networks.ports import HostPorts
from lazarette.runtime.networks.publishing import Publisher
from lazarette.runtime.networks.reaper import LinkReaper
from lazarette.runtime.networks.records import LiveRecords, NetworkRecords
from lazarette.runtime.networks.sandbox import Sandbox, furnish
from lazarette.runtime.networks.takeover import sweep, take_over
from lazarette.runtime.networks.watch import TableWatch
from lazarette.storage.clock import Clock
from lazarette.storage.errors import NotFound
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
        self._firewall = Firewall(f"lazarette-{bridge}")
        self._ports = HostPorts(self.host)
        self._publisher = Publisher(
            self._firewall,
            self._ports,
            Carrier(self._background, self.host),
            self.live,
            self._expose,
        )
        overlay = self._overlay = OverlayDriver(self.host, self.netlink, f"wg-{self._prefix}")
        self._drivers: dict[str, NetworkDriver] = {
            "overlay": overlay,
            "bridge": BridgeDriver(self.host, self.netlink),
            "macvlan": ParentDriver("macvlan", self.host, self.netlink),
            "ipvlan": ParentDriver("ipvlan", self.host, self.netlink),
        }
        records = NetworkRecords(state)
        self._catalogue = Catalogue(records, self._drivers, self.netlink, clock, self.lock)
        self._sandboxes: dict[str, Sandbox] = {}
        resolver = Resolver(self._background, self._directory, self.host)
        self._naming = Naming(self._catalogue, self._directory, resolver, self.live)
        self._joiner = Joiner(
            self._catalogue,
            self._driver,
            self._naming,
            self.live,
            self.lock,
            self._prefix,
            self._tell,
        )
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
        self._maker = Maker(
            self._catalogue, self._driver, self._users, self._rebuild, self.lock, self._tell
        )

    def recover(self, active: Collection[str]) -> None:
        """Bring the host to what the records say; call once, before anything else.

        Args:
            active: ids of containers that run; sandboxes of all others are removed.
        """
        with self.lock:
            with alone():
                self._catalogue.load(self._bridge)
                self._maker.make_again()
            self._sandboxes |= take_over(
                self._folder, active, self._catalogue, self.live, self._naming, self._publisher
            )
            sweep(self.netlink, self._prefix, self._sandboxes)
            self._rebuild()
        for warning in self.warnings():
            log.warning("%s", warning)
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
        self._naming.close()
        for sandbox in self._sandboxes.values():
            self._publisher.let_go(sandbox)
        self._background.close()
        self._reaper.close()
        self._ports.close()
        if take_down:
            self._maker.take_down()
            self._firewall.remove()
        self._firewall.close()
        self.netlink.close()
        self.host.close()
        self.live.close()

    def _join_cluster(self, cluster: Cluster) -> None:
        shared = [n for n in self._catalogue.all() if self._catalogue.shared(n) is not None]
        self._peers.expect(shared)
        by_id = {network.id: network for network in shared}
        running = [
            self._overlay.record(by_id[endpoint.network], endpoint)
            for sandbox in self._sandboxes.values()
            for endpoint in sandbox.endpoints.values()
            if endpoint.network in by_id
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

    def warnings(self) -> list[str]:
        """What an operator should know of this host: firewalls of others in the way."""
        six = any(network.spec.enable_ipv6 for network in self._catalogue.all())
        try:
            found = self._firewall.droppers()
        except nl.NetlinkError as error:
            return [f"networks: {error}"]
        return [foreign.warning(each) for each in found if six or each.family != "ip6"]

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
        return self._maker.create(spec)

    def remove(self, ref: str) -> None:
        """Remove a network without endpoints.

        Raises:
            NetworkNotFound: there is none.
            NetworkInUse: it has endpoints or is predefined.
        """
        self._maker.remove(ref)

    def prune(self, wanted: Collection[str]) -> list[str]:
        """Remove those of the networks with these ids that are user-defined and unused.

        Returns:
            Names of those removed.

        Raises:
            PruneRunning: another prune has not ended.
        """
        return self._maker.prune(wanted)

    def _users(self, network: Network) -> list[str]:
        return [e.request.name or e.container[:12] for e in self.endpoints(network.id)]

    def elsewhere(self, network: Network) -> list[Record]:
        """Endpoints other hosts have in a network, as last heard; none but in overlays."""
        return [] if self._cluster is None else self._cluster.elsewhere(network.id)

    def create_sandbox(self, container: str, new: Path | None = None) -> Path:
        """Make a container's network namespace, with ``lo`` up; one it has is kept.

        Args:
            container: its id.
            new: a new namespace to take for it; None makes one that is the host's.

        Returns:
            The file it is bound to.
        """
        path = self._folder / container
        namespaces.create(path, furnish, new)
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
            return self._joiner.join(sandbox, requests)

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
            endpoint = self._joiner.join(sandbox, [wanted])[0]
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
            self._joiner.leave(sandbox, endpoint)
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
            self._naming.stop(container)
            links = [endpoint.host_interface for endpoint in sandbox.endpoints.values()]
            for endpoint in list(sandbox.endpoints.values()):
                self._joiner.leave(sandbox, endpoint, ending=True)
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
        return self._publisher.publish(sandbox, ports, routed_versions(network))

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
            held = sandbox.held if sandbox else []
            return [each.binding for each in held if each.binding.host_port]

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
        return self._naming.resolv_conf(sandbox, dns, search, options)

    def hosts_entries(self, container: str, hostname: str) -> list[tuple[str, str]]:
        """Lines of ``/etc/hosts`` for a container's own name: (address, names)."""
        return [
            (address, hostname)
            for endpoint in self.of_container(container)
            for address in (endpoint.ip, endpoint.ipv6)
            if address
        ]

    def _tell(self, network: Network, action: str, **attributes: str) -> None:
        told: Mapping[str, str] = {"name": network.name, "type": network.driver, **attributes}
        self._events.publish("network", action, network.id, told)

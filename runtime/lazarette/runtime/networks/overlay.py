"""Networks over several hosts: a bridge on each, joined by VXLAN (RFC 7348).

Nothing is flooded and nothing learned: the VXLAN interface forwards to the hosts the
records in etcd name, and answers ARP for their containers itself.  Each host is the
gateway of its own containers, so ways out and published ports are those of bridges.

With the option ``encrypted`` hosts are reached through the WireGuard tunnel: the VXLAN
interface has a link-local address in it, so that the kernel takes nothing that came
another way.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

import msgspec

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks.bridge import BridgeDriver
from lazarette.runtime.networks.cluster import Cluster, Record
from lazarette.runtime.networks.contract import NetworkCapabilities
from lazarette.runtime.networks.firewall import Segment
from lazarette.runtime.networks.model import Endpoint, Network
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.wireguard import OVERHEAD as TUNNEL_OVERHEAD
from lazarette.runtime.networks.wireguard import Door, Peer, Tunnel, address_of
from lazarette.storage.errors import InternalError, MissingFeature, Unavailable

OPTION_ENCRYPTED = "encrypted"
OPTION_VNI = "com.docker.network.driver.overlay.vxlanid_list"
VXLAN_PORT = 4789
VXLAN_OVERHEAD = 50
"""Outer Ethernet, IPv4, UDP and VXLAN headers, bytes."""
ENCRYPTED_OVERHEAD = VXLAN_OVERHEAD + 20 + TUNNEL_OVERHEAD
"""IPv6 instead of IPv4, within the tunnel."""


class OverlayDriver:
    """See :class:`~lazarette.runtime.networks.contract.NetworkDriver`.

    Args:
        host: the namespace of bridges and VXLAN interfaces.
        netlink: a socket in it.
        tunnel: name of the interface to encrypt by.
    """

    name = "overlay"
    capabilities = NetworkCapabilities(publishes=True, gateway_on_host=True, scope="global")

    def __init__(self, host: NetNamespace, netlink: nl.Netlink, tunnel: str) -> None:
        self._bridge = BridgeDriver(host, netlink, overhead=_overhead)
        self._netlink = netlink
        self._tunnel = Tunnel(host, netlink, tunnel)
        self._encrypted: set[str] = set()
        self._door: Door | None = None
        self._doors: Mapping[str, Peer] | None = None
        self._applied: dict[str, dict[str, Record]] = {}
        self._clean: set[str] = set()
        self.cluster: Cluster | None = None

    def check(self, network: Network) -> None:
        """See the contract."""
        self._joined()
        self._bridge.check(network)
        if _encrypted(network):
            self._tunnel.check()

    def complete(self, network: Network) -> Network:
        """See the contract: registers it with the cluster and notes its VXLAN identifier."""

        def numbered(vni: int) -> Network:
            options = {**network.spec.options, OPTION_VNI: str(vni)}
            spec = msgspec.structs.replace(network.spec, options=options)
            return msgspec.structs.replace(network, spec=spec)

        return self._joined().register(network, numbered)

    def make(self, network: Network) -> None:
        """See the contract."""
        cluster = self._joined()
        if _encrypted(network):
            self._open_tunnel(cluster, network)
        self._bridge.make(network)
        bridge = rt.link_index(self._netlink, network.link)
        name = _vxlan_name(network)
        data: list[tuple[str, object]] = [
            ("IFLA_VXLAN_ID", _vni(network)),
            ("IFLA_VXLAN_PORT", VXLAN_PORT),
            ("IFLA_VXLAN_LEARNING", 0),
            ("IFLA_VXLAN_PROXY", 1),
        ]
        if _encrypted(network):
            data += [
                ("IFLA_VXLAN_LOCAL6", address_of(cluster.host_id)),
                ("IFLA_VXLAN_LINK", self._tunnel.index),
            ]
        else:
            data.append(("IFLA_VXLAN_LOCAL", cluster.config.advertise))
        info = {"attrs": [("IFLA_INFO_KIND", "vxlan"), ("IFLA_INFO_DATA", {"attrs": data})]}
        attributes = [
            ("IFLA_IFNAME", name),
            ("IFLA_MASTER", bridge),
            ("IFLA_MTU", self._bridge.mtu(network)),
            ("IFLA_LINKINFO", info),
        ]
        try:
            exists = frozenset({errno.EEXIST})
            self._netlink.run([rt.link_new(f"make vxlan {name}", attributes, ignore=exists)])
        except nl.NetlinkError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise MissingFeature("the kernel has no VXLAN interfaces") from error
            raise
        index = rt.link_index(self._netlink, name)
        self._netlink.run([rt.link_set(index, f"start vxlan {name}", up=True)])
        self._applied[network.id] = {}
        self._clean.discard(network.id)

    def unmake(self, network: Network) -> None:
        """See the contract."""
        self._applied.pop(network.id, None)
        self._netlink.run([rt.link_delete(_vxlan_name(network))])
        self._bridge.unmake(network)
        if network.id in self._encrypted:
            self._encrypted.discard(network.id)
            if not self._encrypted:
                self._close_tunnel()

    def retire(self, network: Network) -> None:
        """See the contract: takes it from the other hosts too."""
        self._joined().unregister(network, _vni(network))

    def users(self, network: Network) -> list[str]:
        """See the contract: endpoints on any live host."""
        return self._joined().users(network.id)

    def join(self, network: Network, endpoint: Endpoint, sandbox: NetNamespace) -> None:
        """See the contract."""
        cluster = self._joined()
        if _encrypted(network) and network.id not in self._encrypted:
            self.make(network)  # another host's, which could not be made here when it was heard of
        self._bridge.join(network, endpoint, sandbox)
        try:
            cluster.announce(self.record(network, endpoint))
        except BaseException:
            self._bridge.leave(network, endpoint, sandbox)
            raise

    def leave(self, network: Network, endpoint: Endpoint, sandbox: NetNamespace | None) -> None:
        """See the contract."""
        if self.cluster is not None:  # a daemon started without one takes down all the same
            self.cluster.withdraw(network.id, endpoint.id)
        self._bridge.leave(network, endpoint, sandbox)

    def expose(self, endpoint: Endpoint) -> None:
        """See the contract."""
        self._bridge.expose(endpoint)

    def segment(self, network: Network) -> Segment | None:
        """See the contract."""
        return self._bridge.segment(network)

    def claim(self, network: Network, address: str) -> bool:
        """See the contract."""
        return self._joined().claim(network.id, address)

    def release(self, network: Network, address: str) -> None:
        """See the contract."""
        if self.cluster is not None:
            self.cluster.release(network.id, address)

    def avoid(self, network: Network) -> set[str]:
        """See the contract."""
        return self._joined().claimed_elsewhere(network.id)

    def apply(self, network: Network, records: Mapping[str, Record]) -> None:
        """Forward to, and answer ARP for, exactly these endpoints of other hosts.

        Args:
            network: one that was made.
            records: by endpoint id.
        """
        applied = self._applied.get(network.id)
        if applied is None:
            return
        index = rt.link_index(self._netlink, _vxlan_name(network))
        if not index:
            return
        through = self._tunnel.index if network.id in self._encrypted else 0
        messages = []
        if network.id not in self._clean:
            messages = _stale(self._netlink, index, records, through)
        self._clean.add(network.id)
        for endpoint, record in list(applied.items()):
            if records.get(endpoint) != record:
                messages += _entries(index, record, through, delete=True)
                del applied[endpoint]
        for endpoint, record in records.items():
            if endpoint not in applied:
                messages += _entries(index, record, through)
                applied[endpoint] = record
        self._netlink.run(messages)

    def connect(self, doors: Mapping[str, Door], hosts: Mapping[str, str]) -> None:
        """Encrypted networks reach exactly these hosts.

        Args:
            doors: of hosts that have one, by host id; this host's own is left out.
            hosts: addresses of hosts that live, by id.
        """
        mine = self.cluster.host_id if self.cluster is not None else ""
        self._doors = {
            host: Peer(door, hosts[host])
            for host, door in doors.items()
            if host in hosts and host != mine
        }
        if self._door is not None:
            self._tunnel.connect(self._doors)

    def record(self, network: Network, endpoint: Endpoint) -> Record:
        """What other hosts are told of an endpoint."""
        cluster = self._joined()
        tunnelled = _encrypted(network)
        return Record(
            host=cluster.host_id,
            via=address_of(cluster.host_id) if tunnelled else cluster.config.advertise,
            network=endpoint.network,
            endpoint=endpoint.id,
            name=endpoint.request.name or endpoint.container[:12],
            names=endpoint.dns_names,
            ip=endpoint.ip,
            ipv6=endpoint.ipv6,
            mac=endpoint.mac,
        )

    def _open_tunnel(self, cluster: Cluster, network: Network) -> None:
        if self._door is None:
            self._door = self._tunnel.start(cluster.host_id, self._bridge.outer_mtu())
            if self._doors is not None:  # peers of an earlier daemon stay until others are known
                self._tunnel.connect(self._doors)
        self._encrypted.add(network.id)
        cluster.offer(self._door)

    def _close_tunnel(self) -> None:
        self._door = None
        if self.cluster is not None:
            self.cluster.offer(None)
        self._tunnel.stop()

    def _joined(self) -> Cluster:
        if self.cluster is None:
            raise Unavailable(
                "this daemon is not part of a cluster",
                hint="start lazd with --etcd URL and --advertise-address ADDRESS",
            )
        return self.cluster


def _encrypted(network: Network) -> bool:
    """As docker's command line has it: the option is there, whatever its value."""
    return OPTION_ENCRYPTED in network.spec.options


def _overhead(network: Network) -> int:
    return ENCRYPTED_OVERHEAD if _encrypted(network) else VXLAN_OVERHEAD


def _stale(
    netlink: nl.Netlink, index: int, records: Mapping[str, Record], through: int
) -> list[nl.Message]:
    """Removes entries an earlier daemon made for endpoints that are gone."""
    hosts = {(record.mac, record.via) for record in records.values()}
    known = {(r.mac, address) for r in records.values() for address in (r.ip, r.ipv6) if address}
    messages = [
        rt.neighbour(index, mac, destination=via, through=through, delete=True)
        for mac, via in rt.forwarding(netlink, index) - hosts
    ]
    messages += [
        rt.neighbour(index, mac, address=address, delete=True)
        for mac, address in rt.neighbours(netlink, index) - known
    ]
    return messages


def _entries(index: int, record: Record, through: int, *, delete: bool = False) -> list[nl.Message]:
    """Forwarding entry and neighbours of an endpoint elsewhere."""
    where = rt.neighbour(index, record.mac, destination=record.via, through=through, delete=delete)
    messages = [where]
    messages += [
        rt.neighbour(index, record.mac, address=address, delete=delete)
        for address in (record.ip, record.ipv6)
        if address
    ]
    return messages


def _vxlan_name(network: Network) -> str:
    return f"vx-{network.id[:12]}"


def _vni(network: Network) -> int:
    text = network.spec.options.get(OPTION_VNI, "")
    if not text.isdecimal():
        raise InternalError(f"overlay network {network.name} has no VXLAN identifier")
    return int(text)

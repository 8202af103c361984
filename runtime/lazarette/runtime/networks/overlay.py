"""Networks over several hosts: a bridge on each, joined by VXLAN (RFC 7348).

Nothing is flooded and nothing learned: the VXLAN interface forwards to the hosts the
records in etcd name, and answers ARP for their containers itself.  Each host is the
gateway of its own containers, so ways out and published ports are those of bridges.
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
from lazarette.storage.errors import InternalError, MissingFeature, Unavailable

OPTION_VNI = "com.docker.network.driver.overlay.vxlanid_list"
VXLAN_PORT = 4789
VXLAN_OVERHEAD = 50
"""Outer Ethernet, IPv4, UDP and VXLAN headers, bytes."""


class OverlayDriver:
    """See :class:`~lazarette.runtime.networks.contract.NetworkDriver`.

    Args:
        host: the namespace of bridges and VXLAN interfaces.
        netlink: a socket in it.
    """

    name = "overlay"
    capabilities = NetworkCapabilities(publishes=True, gateway_on_host=True, scope="global")

    def __init__(self, host: NetNamespace, netlink: nl.Netlink) -> None:
        self._bridge = BridgeDriver(host, netlink, overhead=VXLAN_OVERHEAD)
        self._netlink = netlink
        self._applied: dict[str, dict[str, Record]] = {}
        self._clean: set[str] = set()
        self.cluster: Cluster | None = None

    def check(self, network: Network) -> None:
        """See the contract."""
        self._joined()
        self._bridge.check(network)
        if "encrypted" in network.spec.options:
            raise MissingFeature(
                "encrypted overlay networks are not supported",
                hint="run the hosts' traffic through WireGuard and advertise its address",
            )

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
        self._bridge.make(network)
        bridge = rt.link_index(self._netlink, network.link)
        name = _vxlan_name(network)
        data = [
            ("IFLA_VXLAN_ID", _vni(network)),
            ("IFLA_VXLAN_LOCAL", cluster.config.advertise),
            ("IFLA_VXLAN_PORT", VXLAN_PORT),
            ("IFLA_VXLAN_LEARNING", 0),
            ("IFLA_VXLAN_PROXY", 1),
        ]
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

    def retire(self, network: Network) -> None:
        """See the contract: takes it from the other hosts too."""
        self._joined().unregister(network, _vni(network))

    def users(self, network: Network) -> list[str]:
        """See the contract: endpoints on any live host."""
        return self._joined().users(network.id)

    def join(self, network: Network, endpoint: Endpoint, sandbox: NetNamespace) -> None:
        """See the contract."""
        cluster = self._joined()
        self._bridge.join(network, endpoint, sandbox)
        try:
            cluster.announce(record_of(endpoint, cluster))
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
        messages = [] if network.id in self._clean else _stale(self._netlink, index, records)
        self._clean.add(network.id)
        for endpoint, record in list(applied.items()):
            if records.get(endpoint) != record:
                messages += _entries(index, record, delete=True)
                del applied[endpoint]
        for endpoint, record in records.items():
            if endpoint not in applied:
                messages += _entries(index, record)
                applied[endpoint] = record
        self._netlink.run(messages)

    def _joined(self) -> Cluster:
        if self.cluster is None:
            raise Unavailable(
                "this daemon is not part of a cluster",
                hint="start lazd with --etcd URL and --advertise-address ADDRESS",
            )
        return self.cluster


def record_of(endpoint: Endpoint, cluster: Cluster) -> Record:
    """What other hosts are told of an endpoint."""
    return Record(
        host=cluster.host_id,
        via=cluster.config.advertise,
        network=endpoint.network,
        endpoint=endpoint.id,
        name=endpoint.request.name or endpoint.container[:12],
        names=endpoint.dns_names,
        ip=endpoint.ip,
        ipv6=endpoint.ipv6,
        mac=endpoint.mac,
    )


def _stale(netlink: nl.Netlink, index: int, records: Mapping[str, Record]) -> list[nl.Message]:
    """Removes entries an earlier daemon made for endpoints that are gone."""
    hosts = {(record.mac, record.via) for record in records.values()}
    known = {(r.mac, address) for r in records.values() for address in (r.ip, r.ipv6) if address}
    messages = [
        rt.neighbour(index, mac, destination=via, delete=True)
        for mac, via in rt.forwarding(netlink, index) - hosts
    ]
    messages += [
        rt.neighbour(index, mac, address=address, delete=True)
        for mac, address in rt.neighbours(netlink, index) - known
    ]
    return messages


def _entries(index: int, record: Record, *, delete: bool = False) -> list[nl.Message]:
    """Forwarding entry and neighbours of an endpoint elsewhere."""
    messages = [rt.neighbour(index, record.mac, destination=record.via, delete=delete)]
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

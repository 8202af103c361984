"""Networks on an interface of the host: macvlan and ipvlan.

Endpoints are neighbours of the host in its own network, with addresses of that network;
the gateway is a router there.  The host itself and its firewall see none of it.  Without a
parent the network is closed: its parent is then a bridge of ours without ports.
"""

from __future__ import annotations

import errno
import socket

from lazarette.runtime.networks import namespaces
from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks.bridge import NAME_LIMIT, configure, mtu_of
from lazarette.runtime.networks.contract import NetworkCapabilities
from lazarette.runtime.networks.firewall import Segment
from lazarette.runtime.networks.model import Endpoint, Network
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.errors import InvalidArgument, MissingFeature

OPTION_PARENT = "parent"
_MODE_OPTIONS = {
    "macvlan": ("macvlan_mode", "IFLA_MACVLAN_MODE"),
    "ipvlan": ("ipvlan_mode", "IFLA_IPVLAN_MODE"),
}
_MODES = {
    "macvlan": {"bridge": 4, "private": 1, "vepa": 2, "passthru": 8},
    "ipvlan": {"l2": 0, "l3": 1, "l3s": 2},
}


class ParentDriver:
    """See :class:`~lazarette.runtime.networks.contract.NetworkDriver`.

    Args:
        kind: ``macvlan`` or ``ipvlan``.
        host: the namespace of the parents.
        netlink: a socket in it.
    """

    capabilities = NetworkCapabilities()

    def __init__(self, kind: str, host: NetNamespace, netlink: nl.Netlink) -> None:
        self.name = kind
        self._host = host
        self._netlink = netlink

    def check(self, network: Network) -> None:
        """See the contract."""
        mtu_of(network, 1500)
        self._mode(network)
        parent = network.spec.options.get(OPTION_PARENT, "")
        if len(parent) > NAME_LIMIT:
            raise InvalidArgument(f"invalid parent interface {parent}")
        if parent and not rt.link_index(self._netlink, parent):
            raise InvalidArgument(
                f"parent interface {parent} of network {network.name} does not exist",
                hint="name an interface of the host with -o parent=NAME",
            )

    def make(self, network: Network) -> None:
        """See the contract."""
        if not network.spec.options.get(OPTION_PARENT):
            name = _closed_parent(network)
            bridge = {"attrs": [("IFLA_INFO_KIND", "bridge")]}
            made = [("IFLA_IFNAME", name), ("IFLA_LINKINFO", bridge)]
            exists = frozenset({errno.EEXIST})
            self._netlink.run([rt.link_new(f"make bridge {name}", made, up=True, ignore=exists)])

    def unmake(self, network: Network) -> None:
        """See the contract."""
        if not network.spec.options.get(OPTION_PARENT):
            self._netlink.run([rt.link_delete(_closed_parent(network))])

    def join(self, network: Network, endpoint: Endpoint, sandbox: NetNamespace) -> None:
        """See the contract."""
        parent = network.spec.options.get(OPTION_PARENT) or _closed_parent(network)
        index = rt.link_index(self._netlink, parent)
        attribute, mode = self._mode(network)
        data = {"attrs": [(attribute, mode)]}
        info = {"attrs": [("IFLA_INFO_KIND", self.name), ("IFLA_INFO_DATA", data)]}
        attributes: list[tuple[str, object]] = [
            ("IFLA_IFNAME", endpoint.interface),
            ("IFLA_LINK", index),
            ("IFLA_NET_NS_FD", sandbox.descriptor),
            ("IFLA_LINKINFO", info),
        ]
        if self.name == "macvlan":
            attributes.append(("IFLA_ADDRESS", endpoint.mac))
        if mtu := mtu_of(network, 0):
            attributes.append(("IFLA_MTU", mtu))
        try:
            self._netlink.run([rt.link_new(f"make {self.name} on {parent}", attributes)])
        except nl.NetlinkError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise MissingFeature(f"the kernel has no {self.name} interfaces") from error
            raise
        try:
            configure(endpoint, sandbox)
        except BaseException:
            self.leave(network, endpoint, sandbox)
            raise

    def leave(self, network: Network, endpoint: Endpoint, sandbox: NetNamespace | None) -> None:
        """See the contract."""
        if sandbox is not None:
            with sandbox.entered():
                inside = nl.Netlink()
            with inside:
                inside.run([rt.link_delete(endpoint.interface)])

    def expose(self, endpoint: Endpoint) -> None:
        """See the contract: ports are reached at the endpoint's own address."""

    def segment(self, network: Network) -> Segment | None:
        """See the contract."""
        return None

    def _mode(self, network: Network) -> tuple[str, object]:
        option, attribute = _MODE_OPTIONS[self.name]
        modes = _MODES[self.name]
        wanted = network.spec.options.get(option) or next(iter(modes))
        if wanted not in modes:
            raise InvalidArgument(
                f"invalid {option} {wanted}", hint=f"one of {', '.join(sorted(modes))}"
            )
        return attribute, wanted if self.name == "macvlan" else modes[wanted]


def _closed_parent(network: Network) -> str:
    return f"dm-{network.id[:12]}"


def supported(kind: str) -> bool:
    """Whether the kernel makes interfaces of that kind: tried in a namespace thrown away."""

    def work() -> bool:
        namespaces.unshare()
        with nl.Netlink() as netlink:
            bridge = {"attrs": [("IFLA_INFO_KIND", "bridge")]}
            netlink.run([rt.link_new("probe", [("IFLA_IFNAME", "p"), ("IFLA_LINKINFO", bridge)])])
            info = {"attrs": [("IFLA_INFO_KIND", kind)]}
            link = [
                ("IFLA_IFNAME", "c"),
                ("IFLA_LINK", socket.if_nametoindex("p")),
                ("IFLA_LINKINFO", info),
            ]
            try:
                netlink.run([rt.link_new("probe", link)])
            except nl.NetlinkError:
                return False
        return True

    return namespaces.in_new_thread(work)

"""Bridge networks: a bridge on the host, a veth pair for each endpoint.

The pair is made in one request with its far end already in the sandbox, named, addressed
and with the near end in the bridge and up; two more requests from inside give addresses
and routes.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks import sysctl
from lazarette.runtime.networks.contract import NetworkCapabilities
from lazarette.runtime.networks.firewall import Segment
from lazarette.runtime.networks.model import (
    OPTION_ICC,
    OPTION_MASQUERADE,
    OPTION_MTU,
    Endpoint,
    GatewayMode,
    Network,
    Pool,
    gateway_mode,
)
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.errors import InvalidArgument

_EXISTS = frozenset({errno.EEXIST})
NAME_LIMIT = 15
_OUR_MAC = "02:6c:7a:"
"""How the hardware addresses of bridges we made begin: locally administered, "lz"."""


class BridgeDriver:
    """See :class:`~lazarette.runtime.networks.contract.NetworkDriver`.

    Args:
        host: the namespace the bridges are in.
        netlink: a socket in it.
        overhead: bytes a frame of a network grows by on its way, off the MTU.
    """

    name = "bridge"
    capabilities = NetworkCapabilities(publishes=True, gateway_on_host=True)

    def __init__(
        self,
        host: NetNamespace,
        netlink: nl.Netlink,
        *,
        overhead: Callable[[Network], int] = lambda _: 0,
    ) -> None:
        self._overhead = overhead
        self._host = host
        self._netlink = netlink
        self._mtus: dict[str, int] = {}

    def check(self, network: Network) -> None:
        """See the contract."""
        mtu_of(network, 1500)
        for version in (4, 6):
            gateway_mode(network, version)
        if len(network.link) > NAME_LIMIT or "/" in network.link:
            raise InvalidArgument(f"invalid bridge name {network.link}: longer than 15 characters")

    def make(self, network: Network) -> None:
        """See the contract."""
        name = network.link
        mtu = self._mtus[network.id] = mtu_of(network, self.outer_mtu() - self._overhead(network))
        self._netlink.run(
            [
                rt.link_new(
                    f"make bridge {name}",
                    [
                        ("IFLA_IFNAME", name),
                        ("IFLA_ADDRESS", bridge_mac(network)),
                        ("IFLA_MTU", mtu),
                        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge")]}),
                    ],
                    ignore=_EXISTS,
                )
            ]
        )
        link = rt.link_named(self._netlink, name)
        if link is None or link.kind != "bridge":
            raise InvalidArgument(f"cannot use {name} for network {network.name}: not a bridge")
        with self._host.entered():
            sysctl.write(f"ipv4/conf/{name}/route_localnet", "1", needed=False)
            sysctl.write(f"ipv6/conf/{name}/accept_ra", "0", needed=False)
        wanted = [
            (pool.gateway, pool.network.prefixlen)
            for pool in network.spec.pools
            if pool.gateway and pool.network.version in _versions(network)
            if gateway_mode(network, pool.network.version) is not GatewayMode.ISOLATED
        ]
        with self._host.entered():
            for version in _versions(network):
                sysctl.forward(version)
            if network.spec.enable_ipv6:
                sysctl.write(f"ipv6/conf/{name}/disable_ipv6", "0", needed=False)
        messages = [rt.address_add(link.index, address, prefix) for address, prefix in wanted]
        if _is_ours(link):
            messages += [
                rt.address_delete(link.index, address, prefix)
                for _, address, prefix in rt.addresses(self._netlink, link.index)
                if (address, prefix) not in wanted and not address.startswith("fe80:")
            ]
            messages.append(rt.link_set(link.index, f"set MTU of {name}", mtu=mtu))
        messages.append(rt.link_set(link.index, f"start bridge {name}", up=True))
        self._netlink.run(messages)

    def unmake(self, network: Network) -> None:
        """See the contract."""
        self._mtus.pop(network.id, None)
        link = rt.link_named(self._netlink, network.link)
        if link is None:
            return
        if _is_ours(link):
            self._netlink.run([rt.link_delete(link.name)])
            return
        pools = [pool for pool in network.spec.pools if pool.gateway]
        self._netlink.run(
            [rt.address_delete(link.index, pool.gateway, pool.network.prefixlen) for pool in pools]
        )

    def join(self, network: Network, endpoint: Endpoint, sandbox: NetNamespace) -> None:
        """See the contract."""
        with self._host.entered():
            bridge = socket.if_nametoindex(network.link)
        mtu = self.mtu(network)
        peer = [
            ("IFLA_IFNAME", endpoint.interface),
            ("IFLA_ADDRESS", endpoint.mac),
            ("IFLA_MTU", mtu),
            ("IFLA_NET_NS_FD", sandbox.descriptor),
        ]
        pair = {"attrs": [("VETH_INFO_PEER", {"attrs": peer})]}
        kind = [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", pair)]
        attributes: list[tuple[str, object]] = [
            ("IFLA_IFNAME", endpoint.host_interface),
            ("IFLA_MASTER", bridge),
            ("IFLA_MTU", mtu),
            ("IFLA_LINKINFO", {"attrs": kind}),
        ]
        what = f"make link {endpoint.host_interface} to {network.link}"
        self._netlink.run([rt.link_new(what, attributes, up=True)])
        try:
            with self._host.entered():  # a port of a bridge speaks for nobody
                sysctl.write(f"ipv6/conf/{endpoint.host_interface}/disable_ipv6", "1", needed=False)
                index = socket.if_nametoindex(endpoint.host_interface)
            if not network.option_on(OPTION_ICC):
                self._set_port(endpoint, index, "IFLA_BRPORT_ISOLATED")
            configure(endpoint, sandbox)
            rt.wait_operational(self._netlink, index)
            rt.wait_operational(self._netlink, bridge)
        except BaseException:
            self._netlink.run([rt.link_delete(endpoint.host_interface)])
            raise

    def mtu(self, network: Network) -> int:
        """The MTU of a network that was made."""
        return self._mtus.get(network.id) or mtu_of(network, 1500)

    def leave(self, network: Network, endpoint: Endpoint, sandbox: NetNamespace | None) -> None:
        """See the contract."""
        if sandbox is not None:
            self._netlink.run([rt.link_delete(endpoint.host_interface)])

    def expose(self, endpoint: Endpoint) -> None:
        """See the contract: where bridged packets pass the firewall, one that is sent back
        to its own container must be let out of the port it came in by.
        """
        with self._host.entered():
            if sysctl.read("bridge/bridge-nf-call-iptables") != "1":
                return
            index = socket.if_nametoindex(endpoint.host_interface)
        self._set_port(endpoint, index, "IFLA_BRPORT_MODE")

    def segment(self, network: Network) -> Segment | None:
        """See the contract."""
        versions = _versions(network)
        pools = [pool for pool in network.spec.pools if pool.network.version in versions]
        return Segment(
            link=network.link,
            subnets=tuple(pool.subnet for pool in pools),
            gateways=tuple(pool.gateway for pool in pools if pool.gateway),
            internal=network.spec.internal,
            masquerade=network.option_on(OPTION_MASQUERADE),
            icc=network.option_on(OPTION_ICC),
            routed=_in_mode(network, pools, GatewayMode.ROUTED),
            unprotected=_in_mode(network, pools, GatewayMode.OPEN),
        )

    def _set_port(self, endpoint: Endpoint, index: int, flag: str) -> None:
        what = f"set {flag} of {endpoint.host_interface}"
        self._netlink.run([rt.port_set(index, what, flag)])

    def outer_mtu(self) -> int:
        """Of the link the default route uses: larger packets would be lost on the way."""
        mtus = {link.index: link.mtu for link in rt.links(self._netlink)}
        for route in rt.routes(self._netlink, socket.AF_INET):
            if route.destination == "0.0.0.0/0" and route.link in mtus:
                return min(1500, mtus[route.link])
        return 1500


def configure(endpoint: Endpoint, sandbox: NetNamespace) -> None:
    """From inside the sandbox: addresses, and the interface up."""
    with sandbox.entered():
        index = socket.if_nametoindex(endpoint.interface)
        if endpoint.ipv6 or any(":" in address for address in endpoint.request.link_local):
            sysctl.write(f"ipv6/conf/{endpoint.interface}/disable_ipv6", "0")
        inside = nl.Netlink()
    with inside:
        messages = []
        if endpoint.ip:
            messages.append(rt.address_add(index, endpoint.ip, endpoint.prefix))
        if endpoint.ipv6:
            messages.append(rt.address_add(index, endpoint.ipv6, endpoint.ipv6_prefix))
        for address in endpoint.request.link_local:
            messages.append(rt.address_add(index, address, 64 if ":" in address else 16))
        messages.append(rt.link_set(index, f"start {endpoint.interface}", up=True))
        inside.run(messages)
        rt.wait_operational(inside, index)


def _in_mode(network: Network, pools: Sequence[Pool], mode: GatewayMode) -> tuple[str, ...]:
    return tuple(p.subnet for p in pools if gateway_mode(network, p.network.version) is mode)


def _versions(network: Network) -> tuple[int, ...]:
    return (4,) * network.spec.enable_ipv4 + (6,) * network.spec.enable_ipv6


def mtu_of(network: Network, default: int) -> int:
    """The MTU a network asks for.

    Raises:
        InvalidArgument: it is not a number an interface can have.
    """
    text = network.spec.options.get(OPTION_MTU, "")
    if not text:
        return default
    if not text.isdecimal() or not 68 <= int(text) <= 65535:
        raise InvalidArgument(f"invalid value for {OPTION_MTU}: {text}")
    return int(text)


def bridge_mac(network: Network) -> str:
    """A hardware address that stays: a bridge without one takes its lowest port's."""
    return _OUR_MAC + ":".join(f"{byte:02x}" for byte in bytes.fromhex(network.id[:6]))


def _is_ours(link: rt.Link) -> bool:
    """Whether we made a bridge: an operator may name one that exists."""
    return link.mac.startswith(_OUR_MAC)

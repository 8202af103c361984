"""The vocabulary of networks: what is asked for, what exists, what can go wrong.

A *network* is a segment with address pools.  A *sandbox* is a network namespace of our
own that outlives the processes in it.  An *endpoint* joins a sandbox to a network: one
interface, its addresses, its names.  A *port binding* sends a port of the host to a
port of a sandbox.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping

import msgspec

from lazarette.storage.errors import Conflict, Forbidden, InvalidArgument, NotFound

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_NETWORK = "bridge"
PREDEFINED = ("bridge", "host", "none")

OPTION_BRIDGE_NAME = "com.docker.network.bridge.name"
OPTION_ICC = "com.docker.network.bridge.enable_icc"
OPTION_MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
OPTION_HOST_ADDRESS = "com.docker.network.bridge.host_binding_ipv4"
OPTION_DEFAULT = "com.docker.network.bridge.default_bridge"
OPTION_GATEWAY_MODES = {
    4: "com.docker.network.bridge.gateway_mode_ipv4",
    6: "com.docker.network.bridge.gateway_mode_ipv6",
}
"""Driver options, by IP version, that say how a bridge network meets the outside."""
OPTION_MTU = "com.docker.network.driver.mtu"
OPTION_INTERFACE_PREFIX = "com.docker.network.container_iface_prefix"


class NetworkNotFound(NotFound):
    """No network of that name or id."""

    number = 340


class NetworkExists(Conflict):
    """A network of that name exists."""

    number = 341


class NetworkInUse(Forbidden):
    """The network has active endpoints, or is predefined."""

    number = 342


class AddressConflict(Forbidden):
    """A pool or an address is taken, on this host or in the network."""

    number = 343


class PortAllocated(Conflict):
    """Somebody holds the host port.  The Engine answers 500 to this."""

    number = 344
    http_status = 500


class EndpointExists(Forbidden):
    """The container is already connected to the network."""

    number = 345


class EndpointNotFound(NotFound):
    """The container is not connected to the network."""

    number = 346


class PruneRunning(Conflict):
    """Networks are being pruned already."""

    number = 348


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """One address pool of a network.

    Attributes:
        subnet: CIDR; empty means chosen when the network is made.
        ip_range: CIDR within the subnet that dynamic addresses come from; empty: all.
        gateway: the address of the host's side; empty means the first one.
        aux: addresses kept for things outside, by name.
    """

    subnet: str = ""
    ip_range: str = ""
    gateway: str = ""
    aux: Mapping[str, str] = {}

    @property
    def network(self) -> IPNetwork:
        """The subnet, parsed."""
        return ipaddress.ip_network(self.subnet)


class NetworkSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for.

    Attributes:
        name: its name, unique on this daemon.
        driver: ``bridge``, ``macvlan``, ``ipvlan``, ``overlay``, ``host`` or ``null``.
        internal: no way out, no published ports.
        attachable: containers may join by hand (an overlay's setting).
        enable_ipv4: give endpoints IPv4 addresses.
        enable_ipv6: give endpoints IPv6 addresses.
        ipam_driver: ``default`` or ``null``.
        ipam_options: kept and shown.
        pools: address pools; those missing are chosen.
        options: of the driver.
        labels: of the user.
        config_only: a template other networks copy.
        config_from: the template to copy.
    """

    name: str
    driver: str = "bridge"
    scope: str = "local"
    internal: bool = False
    attachable: bool = False
    ingress: bool = False
    enable_ipv4: bool = True
    enable_ipv6: bool = False
    ipam_driver: str = "default"
    ipam_options: Mapping[str, str] = {}
    pools: tuple[Pool, ...] = ()
    options: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}
    config_only: bool = False
    config_from: str = ""


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """A network that exists.

    Attributes:
        id: 64 hexadecimal digits.
        created_ns: when, nanoseconds since the epoch.
        spec: what was asked for, with pools filled in.
    """

    id: str
    created_ns: int
    spec: NetworkSpec

    @property
    def name(self) -> str:
        """Its name."""
        return self.spec.name

    @property
    def driver(self) -> str:
        """Its driver."""
        return self.spec.driver

    @property
    def user_defined(self) -> bool:
        """Made by a user, hence with names: all but the predefined ones."""
        return self.spec.name not in PREDEFINED

    @property
    def link(self) -> str:
        """The interface that stands for it on the host."""
        return self.spec.options.get(OPTION_BRIDGE_NAME) or f"br-{self.id[:12]}"

    def option_on(self, key: str, default: bool = True) -> bool:
        """A boolean driver option."""
        value = self.spec.options.get(key)
        return default if value is None else value.lower() in ("1", "t", "true", "yes")


class GatewayMode(enum.Enum):
    """How a bridge network meets the outside, for one IP version.

    ``nat``: the source becomes the host's, host ports are translated.  ``nat-unprotected``:
    the same, and who has a route to a container reaches every port of it.  ``routed``: nothing
    is translated; who has a route reaches published ports by the container's own address.
    ``isolated``: the host has no address in the network; internal networks only.
    """

    NAT = "nat"
    OPEN = "nat-unprotected"
    ROUTED = "routed"
    ISOLATED = "isolated"


def gateway_mode(network: Network, version: int) -> GatewayMode:
    """The mode of a network for an IP version.

    Raises:
        InvalidArgument: there is no such mode, or not for this network.
    """
    text = network.spec.options.get(OPTION_GATEWAY_MODES[version], "") or GatewayMode.NAT.value
    try:
        mode = GatewayMode(text)
    except ValueError:
        known = ", ".join(each.value for each in GatewayMode)
        raise InvalidArgument(f"unknown gateway mode {text}", hint=f"one of {known}") from None
    if mode is GatewayMode.ISOLATED and not network.spec.internal:
        raise InvalidArgument("gateway mode isolated is for internal networks only")
    return mode


def routed_versions(network: Network) -> set[int]:
    """IP versions a network translates nothing for; one it has not goes with the other."""
    enabled = {4: network.spec.enable_ipv4, 6: network.spec.enable_ipv6}
    routed = {v for v in enabled if gateway_mode(network, v) is GatewayMode.ROUTED}
    return routed | {v for v, on in enabled.items() if routed and not on}


class EndpointRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a container wants of one network.

    Attributes:
        network: its id or name.
        name: the container's name, answered by DNS on user-defined networks.
        hostname: answered too when it differs.
        aliases: more names on this network only.
        links: ``CONTAINER:ALIAS``: other containers by names only this one uses.
        ipv4, ipv6: addresses wanted; empty means any.
        mac: hardware address wanted; empty means made from the address.
        link_local: extra addresses for the interface.
        driver_opts: kept and shown; ``com.docker.network.endpoint.ifname`` and
            ``com.docker.network.endpoint.sysctls`` are obeyed.
        gateway_priority: the endpoint with the highest is the way out.
    """

    network: str
    name: str = ""
    hostname: str = ""
    aliases: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    ipv4: str = ""
    ipv6: str = ""
    mac: str = ""
    link_local: tuple[str, ...] = ()
    driver_opts: Mapping[str, str] = {}
    gateway_priority: int = 0


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A container's place in a network.

    Attributes:
        id: 64 hexadecimal digits.
        container: whose.
        network, network_name: where.
        interface: its name in the sandbox.
        host_interface: its peer on the host, if it has one.
        ip, prefix, gateway: IPv4; empty and 0 without.
        ipv6, ipv6_prefix, ipv6_gateway: IPv6; empty and 0 without.
        mac: hardware address.
        dns_names: what DNS answers for it in this network.
        request: what was asked for.
    """

    id: str
    container: str
    network: str
    network_name: str
    interface: str
    host_interface: str = ""
    ip: str = ""
    prefix: int = 0
    gateway: str = ""
    ipv6: str = ""
    ipv6_prefix: int = 0
    ipv6_gateway: str = ""
    mac: str = ""
    dns_names: tuple[str, ...] = ()
    request: EndpointRequest


class PortRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A port to publish.

    Attributes:
        container_port: in the sandbox.
        proto: ``tcp``, ``udp`` or ``sctp``.
        host_ip: address of the host; empty means all, of both families.
        host_port: on the host; 0 means any free one.
        host_port_end: last of a range to choose from; 0 means just ``host_port``.
    """

    container_port: int
    proto: str = "tcp"
    host_ip: str = ""
    host_port: int = 0
    host_port_end: int = 0


class PortBinding(msgspec.Struct, frozen=True, kw_only=True):
    """A port that is published, on one address of the host.

    With ``host_port`` 0 it has none: it is open at the container's own address, of the IP
    version of ``host_ip``.
    """

    container_port: int
    proto: str
    host_ip: str
    host_port: int


def parse_mac(text: str) -> str:
    """A hardware address in its usual form.

    Raises:
        InvalidArgument: it is not one.
    """
    parts = text.replace("-", ":").lower().split(":")
    try:
        if len(parts) == 6 and all(len(part) == 2 and int(part, 16) >= 0 for part in parts):
            return ":".join(parts)
    except ValueError:
        pass
    raise InvalidArgument(f"invalid MAC address: {text}")


def parse_ip(text: str, version: int = 0) -> IPAddress:
    """An address, of that IP version if one is given.

    Raises:
        InvalidArgument: it is not one.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError as bad:
        raise InvalidArgument(f"invalid IP address: {text}") from bad
    if version and address.version != version:
        raise InvalidArgument(f"invalid IPv{version} address: {text}")
    return address

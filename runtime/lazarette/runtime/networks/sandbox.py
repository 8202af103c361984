"""A container's sandbox: its namespace, what it is joined to, and its way out."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks import sysctl
from lazarette.runtime.networks.firewall import Published
from lazarette.runtime.networks.model import (
    OPTION_INTERFACE_PREFIX,
    Endpoint,
    EndpointRequest,
    Network,
)
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.ports import HeldPort
from lazarette.storage.errors import InvalidArgument

OPTION_INTERFACE = "com.docker.network.endpoint.ifname"
OPTION_SYSCTLS = "com.docker.network.endpoint.sysctls"
_LOOPBACK_UP = rt.link_set(1, "start lo", up=True)


@dataclass
class Sandbox:
    """What a container has.

    Attributes:
        container: its id.
        path: the file its namespace is bound to.
        endpoints: by network id, in the order they were made.
        held: host ports held for it.
        forwards: what the firewall does for them.
        dns: resolvers the container was given, instead of the host's.
        lock: held while the sandbox is joined, left or torn down.
    """

    container: str
    path: Path
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    held: list[HeldPort] = field(default_factory=list)
    forwards: list[Published] = field(default_factory=list)
    dns: tuple[str, ...] = ()
    lock: threading.RLock = field(default_factory=threading.RLock)

    def way_out(self) -> Endpoint | None:
        """The endpoint the default routes use, as Docker chooses it: the highest gateway
        priority, then the first name; internal networks never.
        """
        able = [each for each in list(self.endpoints.values()) if each.gateway or each.ipv6_gateway]
        return min(able, key=lambda e: (-e.request.gateway_priority, e.network_name), default=None)

    def interface_for(self, network: Network, request: EndpointRequest) -> str:
        """The name of a new interface.

        Raises:
            InvalidArgument: the one asked for cannot be had.
        """
        used = {endpoint.interface for endpoint in self.endpoints.values()}
        wanted = request.driver_opts.get(OPTION_INTERFACE, "")
        if wanted:
            if len(wanted) > 15 or "/" in wanted or wanted in used:
                raise InvalidArgument(f"invalid interface name {wanted}")
            return wanted
        prefix = network.spec.options.get(OPTION_INTERFACE_PREFIX, "eth")
        return next(name for n in range(len(used) + 1) if (name := f"{prefix}{n}") not in used)

    def set_routes(self) -> None:
        """Make the default routes those of the way out."""
        chosen = self.way_out()
        with NetNamespace.at(self.path) as namespace, namespace.entered():
            inside = nl.Netlink()
            index = socket.if_nametoindex(chosen.interface) if chosen else 0
        with inside:
            messages = []
            for family, gateway in (
                (socket.AF_INET, chosen.gateway if chosen else ""),
                (socket.AF_INET6, chosen.ipv6_gateway if chosen else ""),
            ):
                if gateway:
                    messages.append(rt.route_replace(gateway, family=family, index=index))
                else:
                    messages.append(rt.route_delete_default(family))
            inside.run(messages)


def furnish() -> None:
    """From inside a new namespace: loopback up, IPv6 only where a network has it."""
    with nl.Netlink() as inside:
        inside.run([_LOOPBACK_UP])
    sysctl.write("ipv6/conf/default/disable_ipv6", "1", needed=False)


def set_sysctls(endpoint: Endpoint, namespace: NetNamespace) -> None:
    """Apply the endpoint's own kernel settings (``net.ipv4.conf.IFNAME.…=…``).

    Raises:
        InvalidArgument: one is not of that form.
        InternalError: the kernel refuses one.
    """
    wanted = endpoint.request.driver_opts.get(OPTION_SYSCTLS, "")
    if not wanted:
        return
    with namespace.entered():
        for assignment in filter(None, wanted.split(",")):
            key, _, value = assignment.partition("=")
            parts = key.strip().replace("IFNAME", endpoint.interface).split(".")
            sane = parts[0] == "net" and "" not in parts and not any("/" in p for p in parts)
            if not sane:
                raise InvalidArgument(f"invalid endpoint sysctl {assignment}")
            sysctl.write("/".join(parts[1:]), value.strip())

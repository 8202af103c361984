"""A sandbox's places in networks: planned, recorded, wired, and undone in reverse."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from lazarette.runtime.networks import namespaces
from lazarette.runtime.networks.catalogue import Catalogue
from lazarette.runtime.networks.contract import NetworkDriver
from lazarette.runtime.networks.model import (
    Endpoint,
    EndpointRequest,
    Network,
    NetworkNotFound,
    parse_ip,
    parse_mac,
)
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.naming import Naming
from lazarette.runtime.networks.records import LiveRecords
from lazarette.runtime.networks.sandbox import Sandbox, set_sysctls
from lazarette.storage.errors import Forbidden


class Tell(Protocol):
    """Told of what happens to a network."""

    def __call__(self, network: Network, action: str, **attributes: str) -> None:
        """``action`` happened to ``network``."""
        ...


class Joiner:
    """Joins sandboxes to networks; the caller holds the sandbox's lock.

    Args:
        catalogue: of networks and their addresses.
        driver: who wires a network.
        naming: answers for endpoints.
        live: where endpoints are recorded before they are wired.
        lock: held while records change; the manager's.
        prefix: how the host's interfaces begin.
        tell: told of each join and leave.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        driver: Callable[[Network], NetworkDriver | None],
        naming: Naming,
        live: LiveRecords,
        lock: threading.RLock,
        prefix: str,
        tell: Tell,
    ) -> None:
        self._catalogue = catalogue
        self._driver = driver
        self._naming = naming
        self._live = live
        self._lock = lock
        self._prefix = prefix
        self._tell = tell

    def join(self, sandbox: Sandbox, requests: Sequence[EndpointRequest]) -> list[Endpoint]:
        """Join all of the networks or none; endpoints there are already are kept.

        Raises:
            NetworkNotFound: one does not exist.
            AddressConflict: an address is taken or none is left.
            InvalidArgument: an address or option is wrong.
        """
        made: list[Endpoint] = []
        result: list[Endpoint] = []
        try:
            for request in requests:
                network = self._catalogue.inspect(request.network)
                known = sandbox.endpoints.get(network.id)
                if known is None:
                    known = self._join(sandbox, network, request)
                    made.append(known)
                result.append(known)
            sandbox.set_routes()
        except BaseException:
            for endpoint in made:
                self.leave(sandbox, endpoint)
            raise
        return result

    def _join(self, sandbox: Sandbox, network: Network, request: EndpointRequest) -> Endpoint:
        driver = self._driver(network)
        if driver is None:
            raise Forbidden(f"container cannot be connected to network {network.name}")
        endpoint = self._plan(sandbox, network, request)
        with self._lock:
            known = self._catalogue.get(network.id) is not None
            if known:
                sandbox.endpoints[network.id] = endpoint
                self._live.save_endpoint(endpoint)
        if not known:
            raise NetworkNotFound(f"network {network.name} not found")
        try:
            with NetNamespace.at(sandbox.path) as namespace:
                driver.join(network, endpoint, namespace)
                set_sysctls(endpoint, namespace)
            self._naming.add(endpoint)
            self._naming.serve(sandbox)
        except BaseException:
            self.leave(sandbox, endpoint)
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

    def leave(self, sandbox: Sandbox, endpoint: Endpoint, *, ending: bool = False) -> None:
        """Undo a join; with ``ending`` the sandbox goes, and its interfaces with it."""
        network = self._catalogue.get(endpoint.network)
        self._naming.remove(endpoint)
        driver = self._driver(network) if network is not None else None
        if network is not None and driver is not None:
            if ending or not namespaces.is_bound(sandbox.path):
                driver.leave(network, endpoint, None)
            else:
                with NetNamespace.at(sandbox.path) as namespace:
                    driver.leave(network, endpoint, namespace)
        with self._lock:
            sandbox.endpoints.pop(endpoint.network, None)
            if not ending:
                self._live.forget_endpoint(endpoint)
        self._catalogue.give_back(endpoint)
        if network is not None:
            self._tell(network, "disconnect", container=sandbox.container)


def _mac_of(ip: str, id_: str) -> str:
    """Locally administered, from the IPv4 address as Docker long did: unique with it, and
    the same again for the same address, so that neighbours' tables stay right.
    """
    tail = parse_ip(ip, 4).packed if ip else bytes.fromhex(id_[:8])
    return "02:42:" + ":".join(f"{byte:02x}" for byte in tail)

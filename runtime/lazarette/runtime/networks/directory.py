"""Who is called what, in which network: the names the embedded resolver answers.

1. A name is known to containers that share a user-defined network with its bearer, and to
   nobody else.
2. A name several endpoints bear has the addresses of all of them, their order turning.
3. A change is seen by the next question: nothing is cached, answers live for no time.
"""

from __future__ import annotations

import ipaddress
import itertools
import threading
from dataclasses import dataclass, field

from lazarette.runtime.networks.model import Endpoint


@dataclass(frozen=True)
class Entry:
    """A bearer of names in a network.

    Attributes:
        owner: what it is withdrawn by: an endpoint's id.
        name: the first of its names, which its addresses are called.
        names: all of them, in lower case.
        ipv4, ipv6: its addresses; empty without.
    """

    owner: str
    name: str
    names: tuple[str, ...]
    ipv4: str
    ipv6: str


@dataclass(frozen=True)
class Found:
    """The addresses of a name; one that is known may lack those of a family."""

    ipv4: tuple[str, ...]
    ipv6: tuple[str, ...]


@dataclass
class _Zone:
    """The names of one network."""

    name: str
    entries: dict[str, Entry] = field(default_factory=dict)
    bearers: dict[str, dict[str, Entry]] = field(default_factory=dict)
    addresses: dict[str, Entry] = field(default_factory=dict)


class Directory:
    """Names of all networks; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._zones: dict[str, _Zone] = {}
        self._members: dict[str, list[Endpoint]] = {}
        self._turn = itertools.count()

    def add(self, endpoint: Endpoint) -> None:
        """An endpoint is there, in a network with names."""
        names = tuple(name.lower().rstrip(".") for name in endpoint.dns_names)
        entry = Entry(
            owner=endpoint.id,
            name=names[0] if names else "",
            names=names,
            ipv4=endpoint.ip,
            ipv6=endpoint.ipv6,
        )
        with self._lock:
            self._members.setdefault(endpoint.container, []).append(endpoint)
        self.publish(endpoint.network, endpoint.network_name, entry)

    def remove(self, endpoint: Endpoint) -> None:
        """It is gone."""
        with self._lock:
            members = self._members.get(endpoint.container, [])
            members[:] = [each for each in members if each.id != endpoint.id]
            if not members:
                self._members.pop(endpoint.container, None)
        self.withdraw(endpoint.network, endpoint.id)

    def publish(self, network: str, network_name: str, entry: Entry) -> None:
        """Names of a bearer, here or on another host of an overlay."""
        self.withdraw(network, entry.owner)
        with self._lock:
            zone = self._zones.setdefault(network, _Zone(network_name.lower()))
            zone.entries[entry.owner] = entry
            for name in entry.names:
                zone.bearers.setdefault(name, {})[entry.owner] = entry
            for address in filter(None, (entry.ipv4, entry.ipv6)):
                zone.addresses[address] = entry

    def withdraw(self, network: str, owner: str) -> None:
        """Its names are no longer; unknown is fine."""
        with self._lock:
            zone = self._zones.get(network)
            entry = zone.entries.pop(owner, None) if zone else None
            if zone is None or entry is None:
                return
            for name in entry.names:
                bearers = zone.bearers.get(name, {})
                bearers.pop(owner, None)
                if not bearers:
                    zone.bearers.pop(name, None)
            for address in (entry.ipv4, entry.ipv6):
                if zone.addresses.get(address) == entry:
                    del zone.addresses[address]
            if not zone.entries:
                del self._zones[network]

    def lookup(self, container: str, name: str) -> Found | None:
        """The addresses a container knows by that name, or None.

        Args:
            container: who asks.
            name: without a final dot; ``NAME`` or ``NAME.NETWORK``.
        """
        wanted = name.lower()
        with self._lock:
            for endpoint in self._members.get(container, ()):
                zone = self._zones.get(endpoint.network)
                if zone is None:
                    continue
                linked = _link(endpoint, wanted)
                bearers = zone.bearers.get(linked or wanted)
                if not bearers and wanted.endswith(f".{zone.name}"):
                    bearers = zone.bearers.get(wanted.removesuffix(f".{zone.name}"))
                if bearers:
                    entries = list(bearers.values())
                    shift = next(self._turn) % len(entries)
                    entries = entries[shift:] + entries[:shift]
                    return Found(
                        ipv4=tuple(e.ipv4 for e in entries if e.ipv4),
                        ipv6=tuple(e.ipv6 for e in entries if e.ipv6),
                    )
        return None

    def reverse(self, container: str, address: str) -> str | None:
        """The name a container knows an address by, with its network's name, or None."""
        with self._lock:
            for endpoint in self._members.get(container, ()):
                zone = self._zones.get(endpoint.network)
                entry = zone.addresses.get(address) if zone else None
                if zone is not None and entry is not None:
                    return f"{entry.name}.{zone.name}"
        return None


def _link(endpoint: Endpoint, wanted: str) -> str:
    for link in endpoint.request.links:
        target, _, alias = link.partition(":")
        if (alias or target).lower() == wanted:
            return target.lower()
    return ""


def reverse_address(name: str) -> str | None:
    """The address in a name under ``in-addr.arpa`` or ``ip6.arpa``, or None."""
    labels = name.lower().split(".")
    try:
        if labels[-2:] == ["in-addr", "arpa"] and len(labels) == 6:
            return str(ipaddress.IPv4Address(".".join(reversed(labels[:4]))))
        if labels[-2:] == ["ip6", "arpa"] and len(labels) == 34:
            digits = "".join(reversed(labels[:32]))
            return str(ipaddress.IPv6Address(bytes.fromhex(digits)))
    except ValueError:
        return None
    return None

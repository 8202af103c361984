"""Drivers of networks: how endpoints of one kind of network are wired.

Vocabulary
    *link*: an interface of the host that stands for the network (a bridge, a parent).
    *join*: give a sandbox an interface in the network.  *leave*: take it away.

A network: ``make`` → (``join`` ⇄ ``leave``)* → ``unmake``.

Semantics every driver keeps:

1. ``make`` is idempotent and is called again at every start of the daemon: what a crash or
   a boot took is put back, what is there is left running.
2. ``join`` makes the interface under the names the endpoint carries, with all addresses,
   up, without routes beyond its subnets.  If it fails nothing is left.
3. ``leave`` of an endpoint that has no interface any more is fine.  An interface in a
   sandbox that ends is left to the kernel, which removes many at once.
4. ``unmake`` removes what ``make`` made, fine if it is gone.  A link the driver did not
   make is never removed.
5. A driver keeps no records; the manager does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lazarette.runtime.networks.firewall import Segment
from lazarette.runtime.networks.model import Endpoint, Network
from lazarette.runtime.networks.namespaces import NetNamespace


@dataclass(frozen=True)
class NetworkCapabilities:
    """What a driver's networks can do.

    Attributes:
        names: endpoints have names in DNS.
        publishes: host ports reach endpoints through the host's firewall.
        gateway_on_host: the host itself is the gateway and holds its address.
        scope: ``local`` or ``global``.
    """

    names: bool = True
    publishes: bool = False
    gateway_on_host: bool = False
    scope: str = "local"


class NetworkDriver(Protocol):
    """See the module for what each method must keep."""

    name: str
    capabilities: NetworkCapabilities

    def check(self, network: Network) -> None:
        """Refuse options it cannot keep.

        Raises:
            InvalidArgument: an option is wrong.
            MissingFeature: the kernel lacks what it needs.
        """
        ...

    def make(self, network: Network) -> None:
        """Make the network's link."""
        ...

    def unmake(self, network: Network) -> None:
        """Remove what ``make`` made."""
        ...

    def join(self, network: Network, endpoint: Endpoint, sandbox: NetNamespace) -> None:
        """Give the sandbox its interface."""
        ...

    def leave(self, network: Network, endpoint: Endpoint, sandbox: NetNamespace | None) -> None:
        """Take the interface away; without a sandbox it ends by itself, with the sandbox."""
        ...

    def expose(self, endpoint: Endpoint) -> None:
        """The endpoint is about to get published ports."""
        ...

    def segment(self, network: Network) -> Segment | None:
        """What the firewall must know; None if its traffic does not pass there."""
        ...


@runtime_checkable
class SharedNetworkDriver(NetworkDriver, Protocol):
    """A driver whose networks several hosts share (``scope`` is ``global``).

    An address is used only after :meth:`claim` gave it; it belongs to one host then.
    """

    def complete(self, network: Network) -> Network:
        """Make a network known to all hosts, before it is recorded here.

        Raises:
            NetworkExists: the name is taken on some host.
            AddressConflict: its subnet is.
            Unavailable: the hosts' store cannot be reached.
        """
        ...

    def retire(self, network: Network) -> None:
        """Take it from all hosts."""
        ...

    def users(self, network: Network) -> list[str]:
        """Names of its endpoints on all hosts."""
        ...

    def claim(self, network: Network, address: str) -> bool:
        """Whether this host has the address now."""
        ...

    def release(self, network: Network, address: str) -> None:
        """Give it back; fine if it is not this host's."""
        ...

    def avoid(self, network: Network) -> set[str]:
        """Addresses not worth claiming while there are others."""
        ...

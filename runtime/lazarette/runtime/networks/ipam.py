"""Addresses: which pool a network gets, and who holds which address in it.

1. A pool that is chosen overlaps no route of the host, no resolver's address and no pool
   of another network; one that is asked for overlaps no other network's.
2. The network's and the broadcast address, the gateway and auxiliary addresses are given
   to nobody.
3. The lowest free address goes first, but one given back rests for a while: switches and
   neighbours still know it.
4. The holder of an address is an endpoint's record; this module only remembers.
"""

from __future__ import annotations

import hashlib
import ipaddress
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from lazarette.runtime.networks.model import (
    AddressConflict,
    IPAddress,
    IPNetwork,
    Pool,
    parse_ip,
)
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import InvalidArgument

REST_NS = 3 * NANOSECONDS
"""How long an address given back is passed over, unless no other is left."""


def default_pools() -> Iterator[IPNetwork]:
    """Candidates for a local network, in order: those Docker uses."""
    for second in range(17, 32):
        yield ipaddress.IPv4Network(f"172.{second}.0.0/16")
    yield from ipaddress.IPv4Network("192.168.0.0/16").subnets(new_prefix=20)


def overlay_pools() -> Iterator[IPNetwork]:
    """Candidates for a network over several hosts."""
    yield from ipaddress.IPv4Network("10.0.0.0/8").subnets(new_prefix=24)


def unique_local_pool(seed: str) -> IPNetwork:
    """A /64 of fd00::/8 that belongs to ``seed`` alone (RFC 4193)."""
    digest = hashlib.sha256(seed.encode()).digest()
    packed = b"\xfd" + digest[:7] + bytes(8)
    return ipaddress.IPv6Network((packed, 64))


def choose(candidates: Iterable[IPNetwork], taken: Sequence[IPNetwork]) -> IPNetwork:
    """The first candidate that overlaps nothing taken.

    Raises:
        AddressConflict: none is left.
    """
    for candidate in candidates:
        if not any(overlap(candidate, other) for other in taken):
            return candidate
    raise AddressConflict(
        "could not find an available, non-overlapping address pool among the defaults "
        "to assign to the network",
        hint="remove unused networks, or name a subnet",
    )


def overlap(one: IPNetwork, other: IPNetwork) -> bool:
    """Whether two subnets share an address."""
    if isinstance(one, ipaddress.IPv4Network) and isinstance(other, ipaddress.IPv4Network):
        return one.overlaps(other)
    if isinstance(one, ipaddress.IPv6Network) and isinstance(other, ipaddress.IPv6Network):
        return one.overlaps(other)
    return False


def completed(pool: Pool) -> Pool:
    """A pool with its subnet in canonical form and a gateway.

    Raises:
        InvalidArgument: a part is not an address, or outside the subnet.
    """
    try:
        subnet = ipaddress.ip_network(pool.subnet)
    except ValueError as bad:
        raise InvalidArgument(f"invalid subnet {pool.subnet}: {bad}") from bad
    inner = ""
    if pool.ip_range:
        try:
            given = ipaddress.ip_network(pool.ip_range, strict=False)
        except ValueError as bad:
            raise InvalidArgument(f"invalid ip-range {pool.ip_range}: {bad}") from bad
        if not overlap(subnet, given) or given.prefixlen < subnet.prefixlen:
            raise InvalidArgument(
                f"invalid ip-range {pool.ip_range}: not within subnet {pool.subnet}"
            )
        inner = str(given)
    gateway = pool.gateway
    if gateway:
        gateway = str(_inside(gateway.partition("/")[0], subnet, "gateway"))
    else:
        first = ipaddress.ip_network(inner) if inner else subnet
        offset = 1 if first.num_addresses > 2 or subnet.version == 6 else 0
        gateway = str(first[0] + offset if first[0] == subnet[0] else first[0])
    aux = {name: str(_inside(text, subnet, "auxiliary")) for name, text in pool.aux.items()}
    return Pool(subnet=str(subnet), ip_range=inner, gateway=gateway, aux=aux)


def _inside(text: str, subnet: IPNetwork, what: str) -> IPAddress:
    address = parse_ip(text)
    if address not in subnet:
        raise InvalidArgument(f"invalid {what} address {text}: not within subnet {subnet}")
    return address


class Claims(Protocol):
    """Who else gives addresses of the same pool: other hosts."""

    def claim(self, address: str) -> bool:
        """Whether it is this host's now."""
        ...

    def release(self, address: str) -> None:
        """Give it back."""
        ...

    def avoid(self) -> set[str]:
        """Those to try last."""
        ...


class AddressSpace:
    """The addresses of one pool.

    Args:
        pool: complete.
        clock: for how long a returned address has rested.
        claims: to be asked for each address; None when this host is the only one.
    """

    def __init__(self, pool: Pool, clock: Clock, claims: Claims | None = None) -> None:
        self._claims = claims
        self._lock = threading.Lock()
        self.pool = pool
        self.subnet = pool.network
        self._clock = clock
        self._range = ipaddress.ip_network(pool.ip_range) if pool.ip_range else self.subnet
        self._kept = {int(parse_ip(text)) for text in (pool.gateway, *pool.aux.values()) if text}
        if self.subnet.prefixlen < self.subnet.max_prefixlen - 1:
            self._kept.add(int(self.subnet[0]))
            if self.subnet.version == 4:
                self._kept.add(int(self.subnet[-1]))
        self._taken: set[int] = set()
        self._rested: dict[int, int] = {}

    @property
    def used(self) -> int:
        """How many are held."""
        return len(self._taken)

    def free(self) -> Iterator[IPAddress]:
        """Addresses that may be given, best first."""
        now = self._clock.monotonic_ns()
        for number in [n for n, since in self._rested.items() if now - since >= REST_NS]:
            del self._rested[number]
        resting = sorted(self._rested, key=lambda number: self._rested[number])
        first, last = int(self._range[0]), int(self._range[-1])
        build = ipaddress.IPv4Address if self.subnet.version == 4 else ipaddress.IPv6Address
        for number in range(first, last + 1):
            if not (number in self._taken or number in self._kept or number in self._rested):
                yield build(number)
        for number in resting:
            if number not in self._taken and first <= number <= last:
                yield build(number)

    def take(self, wanted: str = "") -> str:
        """Give an address: that one, or the best free one.

        Raises:
            InvalidArgument: it is not in this pool.
            AddressConflict: it is held by somebody, or none is left.
        """
        with self._lock:
            return self._take_wanted(wanted) if wanted else self._take_free()

    def _take_free(self) -> str:
        avoid = self._claims.avoid() if self._claims else set()
        for last_resort in (False, True) if avoid else (False,):
            for address in self.free():
                if (str(address) in avoid) == last_resort and self._claimed(str(address)):
                    self._taken.add(int(address))
                    return str(address)
        raise AddressConflict(
            f"no available addresses on this pool: {self.subnet}",
            hint="disconnect containers, or make a network with a larger subnet",
        )

    def _take_wanted(self, wanted: str) -> str:
        address = parse_ip(wanted, self.subnet.version)
        if address not in self.subnet:
            raise InvalidArgument(
                f"invalid address {wanted}: it does not belong to any of this network's subnets"
            )
        held = int(address) in self._taken or int(address) in self._kept
        if held or not self._claimed(str(address)):
            raise AddressConflict("Address already in use")
        self._taken.add(int(address))
        return str(address)

    def note(self, address: str) -> None:
        """Remember that it is held (a record was found)."""
        self._taken.add(int(parse_ip(address)))

    def give_back(self, address: str) -> None:
        """Nobody holds it any more."""
        number = int(parse_ip(address))
        with self._lock:
            if number not in self._taken:
                return
            self._taken.discard(number)
            self._rested[number] = self._clock.monotonic_ns()
        if self._claims is not None:
            self._claims.release(address)

    def _claimed(self, address: str) -> bool:
        return self._claims is None or self._claims.claim(address)

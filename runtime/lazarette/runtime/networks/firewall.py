"""The daemon's one nftables table: what may pass, what is translated.

Semantics, of which packets can be sure:

1. A container reaches out through its networks unless they are internal; its source
   becomes the host's on the way (masquerade).
2. Nothing from outside a network reaches a container but answers and what was sent to a
   published port.  Networks do not reach one another.
3. A published port answers on every address asked for, from outside, from the host's own
   loopback and from containers, its own included (hairpin).  The source is kept unless the
   answer could not find its way back: loopback, and sources in the container's own subnet.
4. What containers of one network send one another is not tracked: where bridged packets
   pass here at all, they pass at little cost.
5. The table is replaced in one transaction.  Other tables are left alone; one that drops
   what this accepts wins, as nftables has it.

Chains of a network are few and rebuilt with the table; published ports are elements of
maps, added and removed by themselves, so that their number costs packets nothing.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lazarette.runtime.networks import foreign, nft
from lazarette.runtime.networks.conntrack import forget_datagrams
from lazarette.runtime.networks.netlink import (
    NETLINK_NETFILTER,
    Message,
    Netlink,
    NetlinkError,
)

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
_LOOPBACK = "127.0.0.0/8"


@dataclass(frozen=True)
class Segment:
    """A network as the table knows it.

    Attributes:
        link: the bridge's name.
        subnets: its addresses, CIDR.
        gateways: the host's addresses in them.
        internal: nothing in or out.
        masquerade: give what leaves the host's address.
        icc: its containers may reach one another.
        routed: subnets whose addresses are good outside: nothing of them is translated.
        unprotected: subnets of which every port may be reached by its own address.
    """

    link: str
    subnets: tuple[str, ...]
    gateways: tuple[str, ...] = ()
    internal: bool = False
    masquerade: bool = True
    icc: bool = True
    routed: tuple[str, ...] = ()
    unprotected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forward:
    """A port of the host (on one address, or on all if empty) sent to a container."""

    proto: str
    host_ip: str
    host_port: int
    target: str
    target_port: int

    @property
    def map(self) -> str:
        """The map it is an element of."""
        six = ":" in self.target
        return ("dnat6" if six else "dnat4") + ("" if self.host_ip else "any")

    def element(self) -> tuple[bytes, bytes | dict[str, object]]:
        """Its key and data in that map."""
        key = b"" if not self.host_ip else ipaddress.ip_address(self.host_ip).packed
        key += struct.pack("!B3xH2x", PROTOCOLS[self.proto], self.host_port)
        data = ipaddress.ip_address(self.target).packed + struct.pack("!H2x", self.target_port)
        return key, data


@dataclass(frozen=True)
class Opening:
    """A port of a container that may be reached by the container's own address."""

    proto: str
    target: str
    target_port: int

    @property
    def map(self) -> str:
        """The set it is an element of."""
        return "open6" if ":" in self.target else "open4"

    def element(self) -> tuple[bytes, bytes | dict[str, object]]:
        """Itself, and no data."""
        port = struct.pack("!B3xH2x", PROTOCOLS[self.proto], self.target_port)
        return ipaddress.ip_address(self.target).packed + port, b""


Published = Forward | Opening


class Firewall:
    """The table, in the network namespace the socket was made in.

    Args:
        table: its name, unique among daemons of the host.
    """

    def __init__(self, table: str) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._table = nft.Table(table)
        self.name = table
        self.rules = 0

    @property
    def port(self) -> int:
        """The netlink port our own changes come from."""
        return self._netlink.port

    def close(self) -> None:
        """Give the socket back; the table stays."""
        self._netlink.close()

    def replace(self, segments: Sequence[Segment], forwards: Iterable[Published]) -> None:
        """Make the table exactly this, in one step.

        Raises:
            NetlinkError: the kernel refused; the old table stands.
        """
        table = self._table
        rules = _rules(table, segments)
        jumps = [
            (nft.interface_name(segment.link), nft.jump_data(_chain(segment)))
            for segment in segments
        ]
        messages = [table.make(), table.remove(), table.make(), *_sets(table, segments), *rules]
        if jumps:
            messages.append(table.elements("inside", jumps))
        by_map: dict[str, list[tuple[bytes, bytes | dict[str, object]]]] = {}
        for forward in forwards:
            by_map.setdefault(forward.map, []).append(forward.element())
        messages += [table.elements(name, entries) for name, entries in by_map.items()]
        nft.commit(self._netlink, messages)
        self.rules = sum(1 for message in rules if message.type & 0xFF == nft.MSG_NEWRULE)

    def intact(self) -> bool:
        """Whether the table still has its rules."""
        return nft.count_rules(self._netlink, self.name) == self.rules

    def droppers(self) -> list[foreign.Dropper]:
        """Chains of others that may drop what this table accepts."""
        return foreign.droppers(self._netlink, self.name)

    def remove(self) -> None:
        """Remove the table; none is fine."""
        nft.commit(self._netlink, [self._table.make(), self._table.remove()])

    def add(self, forwards: Sequence[Published]) -> None:
        """Publish ports, all or none.

        Raises:
            NetlinkError: one is published already (``EEXIST``), or the table is gone.
        """
        if forwards:
            nft.commit(self._netlink, [self._element(each, delete=False) for each in forwards])
            self._forget_flows(forwards)

    def withdraw(self, forwards: Sequence[Published]) -> None:
        """Publish them no longer; those that are not are fine."""
        for each in forwards:
            try:
                nft.commit(self._netlink, [self._element(each, delete=True)])
            except NetlinkError as error:
                if error.errno != errno.ENOENT:  # the table was flushed, the entry with it
                    raise
        self._forget_flows(forwards)

    def _forget_flows(self, forwards: Sequence[Published]) -> None:
        translated = [each for each in forwards if isinstance(each, Forward)]
        for port in {each.host_port for each in translated if each.proto == "udp"}:
            forget_datagrams(self._netlink, port)

    def _element(self, forward: Published, *, delete: bool) -> Message:
        return self._table.elements(forward.map, [forward.element()], delete=delete)


def _sets(table: nft.Table, segments: Sequence[Segment]) -> list[Message]:
    names: list[tuple[bytes, bytes | dict[str, object]]] = [
        (nft.interface_name(segment.link), b"") for segment in segments
    ]
    return [*_empty_sets(table), *([table.elements("links", names)] if names else [])]


@functools.cache
def _empty_sets(table: nft.Table) -> tuple[Message, ...]:
    port = [(nft.TYPE_PROTO, 1), (nft.TYPE_SERVICE, 2)]
    four, six = (nft.TYPE_IPV4, 4), (nft.TYPE_IPV6, 16)
    service = (nft.TYPE_SERVICE, 2)
    return (
        table.set(1, "links", [(nft.TYPE_IFNAME, 16)]),
        table.map(2, "dnat4", [four, *port], [four, service]),
        table.map(3, "dnat4any", port, [four, service]),
        table.map(4, "dnat6", [six, *port], [six, service]),
        table.map(5, "dnat6any", port, [six, service]),
        table.verdicts(6, "inside", (nft.TYPE_IFNAME, 16)),
        table.set(7, "open4", [four, *port]),
        table.set(8, "open6", [six, *port]),
    )


def _rules(table: nft.Table, segments: Sequence[Segment]) -> list[Message]:
    """Chains, then their rules; all but the order is kept from the last time."""
    last = _last_of_forward(table)
    own = [message for segment in segments for message in _of_segment(table, segment)]
    return [*_fixed(table), *own, *last]


@functools.cache
def _fixed(table: nft.Table) -> tuple[Message, ...]:
    nat, filter_ = "nat", "filter"
    known = nft.state_in(nft.CT_ESTABLISHED | nft.CT_RELATED)
    ours = [nft.meta(nft.META_OIFNAME), nft.lookup("links")]
    return (
        table.chain("raw", kind=filter_, hook=nft.PREROUTING, priority=nft.PRIORITY_RAW),
        table.chain("prerouting", kind=nat, hook=nft.PREROUTING, priority=nft.PRIORITY_DNAT),
        table.chain("output", kind=nat, hook=nft.OUTPUT, priority=nft.PRIORITY_DNAT),
        table.chain("postrouting", kind=nat, hook=nft.POSTROUTING, priority=nft.PRIORITY_SNAT),
        table.chain("forward", kind=filter_, hook=nft.FORWARD, priority=nft.PRIORITY_FILTER),
        table.chain("publish"),
        *_loopback_guard(table),
        *_publishing(table),
        table.rule("postrouting", nft.address_in("saddr", _LOOPBACK), ours, nft.masquerade()),
        table.rule("forward", known, nft.accept()),
        *_openings(table),
    )


def _openings(table: nft.Table) -> list[Message]:
    """Ports that are published at their containers' own addresses."""
    first = nft.REGISTER
    return [
        table.rule(
            "forward",
            nft.family_is(family),
            nft.payload(nft.NETWORK, offset, size),
            nft.meta(nft.META_L4PROTO, first + size // 4),
            nft.payload(nft.TRANSPORT, 2, 2, first + size // 4 + 1),
            nft.lookup(name),
            nft.accept(),
        )
        for family, offset, size, name in ((nft.IPV4, 16, 4, "open4"), (nft.IPV6, 24, 16, "open6"))
    ]


def _loopback_guard(table: nft.Table) -> list[Message]:
    """``route_localnet`` is on for our links: keep containers off the host's loopback."""
    ours = [nft.meta(nft.META_IIFNAME), nft.lookup("links")]
    return [
        table.rule("raw", nft.address_in("daddr", _LOOPBACK), ours, nft.drop()),
        table.rule("raw", nft.meta(nft.META_IIFNAME), nft.lookup_verdict("inside")),
    ]


def _chain(segment: Segment) -> str:
    return f"inside-{segment.link}"


def _publishing(table: nft.Table) -> list[Message]:
    local = nft.destination_type_local()
    messages = [
        # a neighbour may send to 127.0.0.1 by our hardware address; it gets no port
        table.rule("prerouting", nft.address_in("daddr", _LOOPBACK), nft.back()),
        table.rule("prerouting", local, nft.jump("publish")),
        # nothing may leave the host with ::1 as its source; the holder of the port serves it
        table.rule("output", nft.address_in("daddr", "::1/128"), nft.back()),
        table.rule("output", local, nft.jump("publish")),
    ]
    first = nft.REGISTER
    for family, offset, size in ((nft.IPV4, 16, 4), (nft.IPV6, 24, 16)):
        name = "dnat4" if family == nft.IPV4 else "dnat6"
        words = size // 4
        send = nft.destination_nat(family, first, first + words)
        messages.append(
            table.rule(
                "publish",
                nft.family_is(family),
                nft.payload(nft.NETWORK, offset, size),
                nft.meta(nft.META_L4PROTO, first + words),
                nft.payload(nft.TRANSPORT, 2, 2, first + words + 1),
                nft.lookup(name, into=first),
                send,
            )
        )
        messages.append(
            table.rule(
                "publish",
                nft.family_is(family),
                nft.meta(nft.META_L4PROTO),
                nft.payload(nft.TRANSPORT, 2, 2, first + 1),
                nft.lookup(f"{name}any", into=first),
                send,
            )
        )
    return messages


@functools.lru_cache(maxsize=1024)
def _of_segment(table: nft.Table, segment: Segment) -> tuple[Message, ...]:
    """A network's own rules: what is masqueraded, what may pass."""
    messages = [table.chain(_chain(segment))]
    for subnet in segment.subnets:
        ends = [*nft.address_in("saddr", subnet), *nft.address_in("daddr", subnet)]
        four = ":" not in subnet
        for gateway in segment.gateways:
            if (":" not in gateway) == four:
                ends += nft.address_in("daddr", f"{gateway}/{32 if four else 128}", inside=False)
        messages.append(table.rule(_chain(segment), ends, nft.untracked()))
    inside = nft.interface(nft.META_OIFNAME, segment.link)
    away = nft.interface(nft.META_OIFNAME, segment.link, equal=False)
    same = nft.interface(nft.META_IIFNAME, segment.link)
    other = nft.interface(nft.META_IIFNAME, segment.link, equal=False)
    for subnet in segment.subnets:
        source = nft.address_in("saddr", subnet)
        back = [*nft.address_in("daddr", subnet), *nft.status_has(nft.STATUS_DNAT)]
        messages.append(table.rule("postrouting", source, back, nft.masquerade()))
        if segment.masquerade and not segment.internal and subnet not in segment.routed:
            messages.append(table.rule("postrouting", source, away, nft.masquerade()))
    if segment.icc:
        messages.append(table.rule("forward", inside, same, nft.accept()))
    if not segment.internal:
        for subnet in segment.routed:
            ping = nft.compare(bytes([58 if ":" in subnet else 1]))
            reached = nft.address_in("daddr", subnet)
            echo = [nft.meta(nft.META_L4PROTO), ping]
            messages.append(table.rule("forward", inside, reached, echo, nft.accept()))
        for subnet in segment.unprotected:
            reached = nft.address_in("daddr", subnet)
            messages.append(table.rule("forward", inside, reached, nft.accept()))
    if segment.internal:
        messages.append(table.rule("forward", inside, other, nft.drop()))
        messages.append(table.rule("forward", same, away, nft.drop()))
    return tuple(messages)


@functools.cache
def _last_of_forward(table: nft.Table) -> tuple[Message, ...]:
    """What was published may come in, all else may not."""
    towards = [nft.meta(nft.META_OIFNAME), nft.lookup("links")]
    published = nft.status_has(nft.STATUS_DNAT)
    return (
        table.rule("forward", towards, published, nft.accept()),
        table.rule("forward", towards, nft.drop()),
    )

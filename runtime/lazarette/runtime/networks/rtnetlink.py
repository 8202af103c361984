"""Links, addresses, routes and neighbours: rtnetlink's messages, and what it lists."""

from __future__ import annotations

import errno
import functools
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from lazarette.runtime.networks.netlink import (
    HEADER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Attributes,
    Message,
    Netlink,
    encode,
)

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
IFF_UP = 1
IF_OPER_UP = 6
NUD_PERMANENT = 0x80


def link_set(index: int, what: str, *, up: bool | None = None, mtu: int = 0) -> Message:
    """Start or stop an interface, or change its MTU."""
    return Message(what, RTM_NEWLINK, 0, _of_link(_link_body(up, mtu), index))


def port_set(index: int, what: str, flag: str) -> Message:
    """Set a flag (``IFLA_BRPORT_``…) of a port of a bridge."""
    return Message(what, RTM_NEWLINK, 0, _of_link(_port_body(flag), index))


@functools.lru_cache(maxsize=64)
def _link_body(up: bool | None, mtu: int) -> bytes:
    fields = {} if up is None else {"flags": IFF_UP if up else 0, "change": IFF_UP}
    return encode(ifinfmsg, fields, [("IFLA_MTU", mtu)] if mtu else [])


@functools.lru_cache(maxsize=8)
def _port_body(flag: str) -> bytes:
    slave = [
        ("IFLA_INFO_SLAVE_KIND", "bridge"),
        ("IFLA_INFO_SLAVE_DATA", {"attrs": [(flag, 1)]}),
    ]
    return encode(ifinfmsg, {}, [("IFLA_LINKINFO", {"attrs": slave})])


def _of_link(body: bytes, index: int) -> bytes:
    """A body with the index put in: it is the second word of ``struct ifinfomsg``."""
    return body[:4] + struct.pack("=i", index) + body[8:]


def link_new(
    what: str, attributes: Attributes, *, up: bool = False, ignore: frozenset[int] = frozenset()
) -> Message:
    """Make an interface."""
    fields = {"flags": IFF_UP, "change": IFF_UP} if up else {}
    flags = NLM_F_CREATE | NLM_F_EXCL
    return Message(what, RTM_NEWLINK, flags, encode(ifinfmsg, fields, attributes), ignore)


def link_delete(name: str) -> Message:
    """Remove an interface; one that is gone is fine."""
    body = encode(ifinfmsg, {}, [("IFLA_IFNAME", name)])
    return Message(f"remove link {name}", RTM_DELLINK, 0, body, frozenset({errno.ENODEV}))


def address_add(index: int, address: str, prefix: int) -> Message:
    """Give an interface an address, usable at once (no duplicate detection)."""
    six = ":" in address
    body = encode(
        ifaddrmsg,
        {
            "family": socket.AF_INET6 if six else socket.AF_INET,
            "prefixlen": prefix,
            "index": index,
            "flags": 0x02 if six else 0,  # IFA_F_NODAD
        },
        [("IFA_LOCAL", address), ("IFA_ADDRESS", address)],
    )
    flags = NLM_F_CREATE | NLM_F_REPLACE
    return Message(f"add address {address}", RTM_NEWADDR, flags, body, frozenset({errno.EEXIST}))


def address_delete(index: int, address: str, prefix: int) -> Message:
    """Take an address away."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    body = encode(
        ifaddrmsg,
        {"family": family, "prefixlen": prefix, "index": index},
        [("IFA_LOCAL", address), ("IFA_ADDRESS", address)],
    )
    gone = frozenset({errno.EADDRNOTAVAIL, errno.ENODEV})
    return Message(f"remove address {address}", RTM_DELADDR, 0, body, gone)


def route_replace(
    gateway: str, *, family: int, index: int = 0, destination: str = "", prefix: int = 0
) -> Message:
    """Set the route of a destination (the default route without one)."""
    attributes: list[tuple[str, object]] = []
    if destination:
        attributes.append(("RTA_DST", destination))
    if gateway:
        attributes.append(("RTA_GATEWAY", gateway))
    if index:
        attributes.append(("RTA_OIF", index))
    fields = {
        "family": family,
        "dst_len": prefix,
        "table": 254,
        "proto": 4,
        "scope": 0 if gateway else 253,
        "type": 1,
    }
    what = f"set route {destination or 'default'} by {gateway or index}"
    return Message(
        what, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, encode(rtmsg, fields, attributes)
    )


@functools.lru_cache(maxsize=2)
def route_delete_default(family: int) -> Message:
    """Remove the default route; none is fine."""
    body = encode(rtmsg, {"family": family, "table": 254, "scope": 0, "type": 1}, [])
    gone = frozenset({errno.ESRCH, errno.ENOENT})
    return Message("remove default route", RTM_DELROUTE, 0, body, gone)


def link_index(netlink: Netlink, name: str) -> int:
    """The index of an interface, 0 if there is none of that name."""
    body = encode(ifinfmsg, {}, [("IFLA_IFNAME", name)])
    found = netlink.get(Message(f"find link {name}", RTM_GETLINK, 0, body), ifinfmsg)
    return 0 if found is None else int(found["index"])


@dataclass(frozen=True)
class Link:
    """An interface as a listing shows it."""

    index: int
    name: str
    kind: str
    mtu: int
    master: int
    mac: str = ""


def link_named(netlink: Netlink, name: str) -> Link | None:
    """The interface of that name, or None."""
    body = encode(ifinfmsg, {}, [("IFLA_IFNAME", name)])
    found = netlink.get(Message(f"find link {name}", RTM_GETLINK, 0, body), ifinfmsg)
    return None if found is None else _link(found)


def links(netlink: Netlink) -> list[Link]:
    """Every interface."""
    body = encode(ifinfmsg, {}, [("IFLA_EXT_MASK", 8)])  # without statistics
    request = Message("list links", RTM_GETLINK, 0, body)
    return [_link(found) for found in netlink.dump(request, ifinfmsg)]


def _link(found: Any) -> Link:
    info = found.get_attr("IFLA_LINKINFO")
    return Link(
        index=int(found["index"]),
        name=str(found.get_attr("IFLA_IFNAME")),
        kind=str((info.get_attr("IFLA_INFO_KIND") if info else "") or ""),
        mtu=int(found.get_attr("IFLA_MTU") or 0),
        master=int(found.get_attr("IFLA_MASTER") or 0),
        mac=str(found.get_attr("IFLA_ADDRESS") or ""),
    )


@dataclass(frozen=True)
class Route:
    """A route: where to (``0.0.0.0/0`` for the default one) and through which link."""

    destination: str
    link: int
    gateway: str


def routes(netlink: Netlink, family: int) -> list[Route]:
    """Every unicast route of a family, of all tables."""
    body = encode(rtmsg, {"family": family}, [])
    found = []
    for route in netlink.dump(Message("list routes", RTM_GETROUTE, 0, body), rtmsg):
        if route["type"] != 1:
            continue
        nothing = "::" if family == socket.AF_INET6 else "0.0.0.0"
        found.append(
            Route(
                destination=f"{route.get_attr('RTA_DST') or nothing}/{route['dst_len']}",
                link=int(route.get_attr("RTA_OIF") or 0),
                gateway=str(route.get_attr("RTA_GATEWAY") or ""),
            )
        )
    return found


def addresses(netlink: Netlink, index: int = 0) -> list[tuple[int, str, int]]:
    """Addresses as (link, address, prefix), of one link or of all."""
    body = encode(ifaddrmsg, {}, [])
    found = []
    for entry in netlink.dump(Message("list addresses", RTM_GETADDR, 0, body), ifaddrmsg):
        if not index or entry["index"] == index:
            text = entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS")
            found.append((int(entry["index"]), str(text), int(entry["prefixlen"])))
    return found


def wait_operational(netlink: Netlink, index: int, seconds: float = 0.5) -> bool:
    """Wait until an interface carries packets; False if it takes longer than that.

    The kernel notices in a worker of its own that a link came up.  Until then a bridge
    drops frames of the port, and a lost ARP request costs its sender a second.  The worker
    and this request take the same lock, so what follows from the state has happened too.
    """
    request = Message(
        f"look at link {index}", RTM_GETLINK, 0, struct.pack("=BxHiII", 0, 0, index, 0, 0)
    )
    deadline = time.monotonic() + seconds
    while True:
        found = netlink.get(request, _LinkState)
        if found is not None and found.state == IF_OPER_UP:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0003)


class _LinkState:
    """The operational state of a link (RFC 2863), which is all that is decoded."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.state = 0

    def decode(self) -> None:
        """Find ``IFLA_OPERSTATE``."""
        offset = HEADER.size + 16
        while offset + 4 <= len(self._data):
            length, kind = struct.unpack_from("=HH", self._data, offset)
            if length < 4:
                break
            if kind == 16:
                self.state = self._data[offset + 4]
                break
            offset += (length + 3) & ~3


def neighbour(
    index: int,
    mac: str,
    *,
    address: str = "",
    destination: str = "",
    through: int = 0,
    delete: bool = False,
) -> Message:
    """An entry of a link's neighbour table (``address``) or forwarding table
    (``destination``: where a VXLAN link finds the hardware address, ``through``: by which
    interface, if it is not for routes to say), replaced or removed.
    """
    attributes: list[tuple[str, object]] = [("NDA_LLADDR", mac)]
    fields: dict[str, object] = {"ifindex": index, "state": NUD_PERMANENT, "flags": 0}
    if address:
        fields["family"] = socket.AF_INET6 if ":" in address else socket.AF_INET
        attributes.append(("NDA_DST", address))
    else:
        fields |= {"family": socket.AF_BRIDGE, "flags": 0x02}  # NTF_SELF
        attributes.append(("NDA_DST", destination))
        if through:
            attributes.append(("NDA_IFINDEX", through))
    what = f"{'remove' if delete else 'set'} neighbour {address or mac}"
    body = encode(ndmsg, fields, attributes)
    if delete:
        return Message(what, RTM_DELNEIGH, 0, body, frozenset({errno.ENOENT, errno.ENODEV}))
    return Message(what, RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body)


def forwarding(netlink: Netlink, index: int) -> set[tuple[str, str]]:
    """Where a VXLAN link sends to: (hardware address, host) of its forwarding table."""
    return {
        (mac, where)
        for mac, where in _neighbours(netlink, index, socket.AF_BRIDGE)
        if mac != "00:00:00:00:00:00"
    }


def neighbours(netlink: Netlink, index: int) -> set[tuple[str, str]]:
    """The permanent neighbours of a link: (hardware address, address), both families."""
    return _neighbours(netlink, index, socket.AF_INET) | _neighbours(
        netlink, index, socket.AF_INET6
    )


def _neighbours(netlink: Netlink, index: int, family: int) -> set[tuple[str, str]]:
    body = encode(ndmsg, {"family": family, "ifindex": index}, [])
    found = set()
    for entry in netlink.dump(Message("list neighbours", RTM_GETNEIGH, 0, body), ndmsg):
        mac, where = entry.get_attr("NDA_LLADDR"), entry.get_attr("NDA_DST")
        if entry["ifindex"] == index and entry["state"] & NUD_PERMANENT and mac and where:
            found.add((str(mac), str(where)))
    return found

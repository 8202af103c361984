"""The encrypted way between hosts: one WireGuard interface for all encrypted overlays.

The private key is made here and lives in the kernel only: it is as old as the interface,
which survives the daemon and ends with the boot.  Each host's address in the tunnel
follows from its id, so that nobody has to hand any out; WireGuard takes nothing with that
address as its source but what that host's key signed.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pyroute2.netlink.generic import ctrlmsg
from pyroute2.netlink.generic.wireguard import wgmsg

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks import sysctl
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.errors import MissingFeature

PORT = 51820
"""Where others reach the tunnel; another if somebody has it."""
OVERHEAD = 60
"""IPv4 and UDP headers, WireGuard's own, and its tag: bytes."""

_GENERIC = 16
_CONTROL, _GET_FAMILY = 16, 3
_GET_DEVICE, _SET_DEVICE = 0, 1
_REPLACE_PEERS, _REMOVE, _REPLACE_ADDRESSES = 1, 1, 2
_BATCH = 200
"""Peers of one message: an attribute has at most 64 KiB."""


class Door(msgspec.Struct, frozen=True):
    """What other hosts need to send to one through the tunnel.

    Attributes:
        key: its public key, base64.
        port: UDP, at the address it advertises.
    """

    key: str
    port: int


@dataclass(frozen=True)
class Peer:
    """Another host: its door, and the address that is at."""

    door: Door
    address: str


def address_of(host_id: str) -> str:
    """A host's address in the tunnel: link-local (RFC 4291), so that nothing else routes it."""
    low = int.from_bytes(hashlib.sha256(host_id.encode()).digest()[:8], "big")
    return str(ipaddress.IPv6Address((0xFE80 << 112) | low))


def supported(host: NetNamespace) -> bool:
    """Whether the kernel has WireGuard; asking loads its module where there is one."""
    with host.entered():
        socket_ = nl.Netlink(_GENERIC)
    with socket_:
        return _family(socket_) is not None


class Tunnel:
    """This host's end, in a network namespace.

    Args:
        host: the namespace.
        netlink: a socket in it.
        name: of the interface.
    """

    def __init__(self, host: NetNamespace, netlink: nl.Netlink, name: str) -> None:
        self._host = host
        self._netlink = netlink
        self._name = name
        self._peers: dict[str, Peer] | None = None

    def check(self) -> None:
        """See whether there can be one.

        Raises:
            MissingFeature: the kernel has no WireGuard, or no IPv6.
        """
        if not supported(self._host):
            raise MissingFeature(
                "encrypted overlay networks need WireGuard, which this kernel does not have",
                hint="load the module wireguard, or advertise an address that is inside a tunnel",
            )
        with self._host.entered():
            if not sysctl.read("ipv6/conf/all/forwarding"):
                raise MissingFeature(
                    "encrypted overlay networks need IPv6, which this kernel does not have"
                )

    def start(self, host_id: str, mtu: int) -> Door:
        """Make the interface, or take over what an earlier daemon made.

        Args:
            host_id: this host's.
            mtu: of the link outside.
        """
        self.check()
        info = {"attrs": [("IFLA_INFO_KIND", "wireguard")]}
        attributes = [
            ("IFLA_IFNAME", self._name),
            ("IFLA_MTU", mtu - OVERHEAD),
            ("IFLA_LINKINFO", info),
        ]
        exists = frozenset({errno.EEXIST})
        what = f"make tunnel {self._name}"
        self._netlink.run([rt.link_new(what, attributes, ignore=exists)])
        index = rt.link_index(self._netlink, self._name)
        with self._host.entered():
            sysctl.write(f"ipv6/conf/{self._name}/disable_ipv6", "0", needed=False)
            socket_ = nl.Netlink(_GENERIC)
        with socket_:
            found = self._device(socket_)
            new = found.key == _NO_KEY
            if new:
                secret = ("WGDEVICE_A_PRIVATE_KEY", _new_key())
                self._set(socket_, "set the key", [secret])
            up = rt.link_set(index, f"start tunnel {self._name}", up=True)
            self._netlink.run([rt.address_add(index, address_of(host_id), 64), up])
            if new:
                try:
                    self._set(socket_, "listen", [("WGDEVICE_A_LISTEN_PORT", PORT)])
                except nl.NetlinkError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise  # otherwise it stays where the kernel put it when it came up
            return self._device(socket_)

    def connect(self, peers: Mapping[str, Peer]) -> None:
        """Exchange packets with exactly these hosts.

        Args:
            peers: by host id.
        """
        if self._peers == peers:
            return
        with self._host.entered():
            socket_ = nl.Netlink(_GENERIC)
        with socket_:
            before = self._peers
            flags = _REPLACE_PEERS if before is None else 0
            listed = [
                {"attrs": [("WGPEER_A_PUBLIC_KEY", old.door.key), ("WGPEER_A_FLAGS", _REMOVE)]}
                for host_id, old in (before or {}).items()
                if host_id not in peers or peers[host_id].door.key != old.door.key
            ]
            listed += [
                {"attrs": _peer(host_id, peer)}
                for host_id, peer in sorted(peers.items())
                if before is None or before.get(host_id) != peer
            ]
            for start in range(0, max(1, len(listed)), _BATCH):
                part = ("WGDEVICE_A_PEERS", listed[start : start + _BATCH])
                self._set(socket_, "set peers", [("WGDEVICE_A_FLAGS", flags), part])
                flags = 0
        self._peers = dict(peers)

    def stop(self) -> None:
        """Remove the interface and forget the key; none is fine."""
        self._peers = None
        self._netlink.run([rt.link_delete(self._name)])

    @property
    def index(self) -> int:
        """The interface's index, 0 without one."""
        return rt.link_index(self._netlink, self._name)

    def _device(self, socket_: nl.Netlink) -> Door:
        body = nl.encode(wgmsg, {"cmd": _GET_DEVICE, "version": 1}, self._named([]))
        request = nl.Message(f"look at tunnel {self._name}", self._number(socket_), 0, body)
        found = next(iter(socket_.dump(request, wgmsg)))
        key = found.get_attr("WGDEVICE_A_PUBLIC_KEY")
        text = bytes(key).decode() if key is not None else _NO_KEY
        return Door(text, int(found.get_attr("WGDEVICE_A_LISTEN_PORT") or 0))

    def _set(self, socket_: nl.Netlink, what: str, attributes: list[tuple[str, object]]) -> None:
        body = nl.encode(wgmsg, {"cmd": _SET_DEVICE, "version": 1}, self._named(attributes))
        text = f"{what} of tunnel {self._name}"
        socket_.run([nl.Message(text, self._number(socket_), 0, body)])

    def _named(self, attributes: list[tuple[str, object]]) -> list[tuple[str, object]]:
        return [("WGDEVICE_A_IFNAME", self._name), *attributes]

    def _number(self, socket_: nl.Netlink) -> int:
        number = _family(socket_)
        if number is None:
            raise MissingFeature("the kernel has lost WireGuard")
        return number


_NO_KEY = ""


def _family(socket_: nl.Netlink) -> int | None:
    attributes = [("CTRL_ATTR_FAMILY_NAME", "wireguard")]
    body = nl.encode(ctrlmsg, {"cmd": _GET_FAMILY, "version": 1}, attributes)
    found = socket_.get(nl.Message("look for WireGuard", _CONTROL, 0, body), ctrlmsg)
    return None if found is None else int(found.get_attr("CTRL_ATTR_FAMILY_ID"))


def _new_key() -> str:
    raw = X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )
    return base64.b64encode(raw).decode()


def _peer(host_id: str, peer: Peer) -> list[tuple[str, object]]:
    inner = ipaddress.IPv6Address(address_of(host_id)).packed
    allowed = [
        ("WGALLOWEDIP_A_FAMILY", socket.AF_INET6),
        ("WGALLOWEDIP_A_IPADDR", inner),
        ("WGALLOWEDIP_A_CIDR_MASK", 128),
    ]
    return [
        ("WGPEER_A_PUBLIC_KEY", peer.door.key),
        ("WGPEER_A_FLAGS", _REPLACE_ADDRESSES),
        ("WGPEER_A_ENDPOINT", {"addr": peer.address, "port": peer.door.port}),
        ("WGPEER_A_ALLOWEDIPS", [{"attrs": allowed}]),
    ]

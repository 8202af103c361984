"""Hosts made of network namespaces, and programs that speak inside them."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks.namespaces import NetNamespace, unshare

T = TypeVar("T")
_names = itertools.count()


@contextmanager
def own_namespace() -> Iterator[NetNamespace]:
    """Run the block, in this thread, in a fresh network namespace with ``lo`` up."""
    with NetNamespace.current() as home:
        unshare()
        try:
            with nl.Netlink() as inside:
                inside.run([rt.link_set(1, "start lo", up=True)])
            with NetNamespace.current() as here:
                yield here
        finally:
            home.enter()


def new_namespace() -> NetNamespace:
    """A namespace nobody is in, with ``lo`` up; the caller closes it."""
    made: list[NetNamespace] = []

    def work() -> None:
        unshare()
        with nl.Netlink() as inside:
            inside.run([rt.link_set(1, "start lo", up=True)])
        made.append(NetNamespace.current())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return made[0]


def cable(
    one: NetNamespace, one_ip: str, other: NetNamespace, other_ip: str, prefix: int = 24
) -> str:
    """Join two namespaces by a veth pair; the interface has this name in both."""
    name = f"cable{next(_names)}"
    with one.entered(), nl.Netlink() as netlink:
        peer = [("IFLA_IFNAME", name), ("IFLA_NET_NS_FD", other.descriptor)]
        data = {"attrs": [("VETH_INFO_PEER", {"attrs": peer})]}
        info = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}
        netlink.run([rt.link_new("cable", [("IFLA_IFNAME", name), ("IFLA_LINKINFO", info)])])
    for namespace, address in ((one, one_ip), (other, other_ip)):
        with namespace.entered(), nl.Netlink() as netlink:
            index = socket.if_nametoindex(name)
            netlink.run([rt.address_add(index, address, prefix), rt.link_set(index, "up", up=True)])
    for namespace in (one, other):
        with namespace.entered(), nl.Netlink() as netlink:
            assert rt.wait_operational(netlink, socket.if_nametoindex(name), 5)
    return name


def inside(path: Path | NetNamespace, work: Callable[[], T]) -> T:
    """The result of ``work`` in a namespace."""
    namespace = NetNamespace.at(path) if isinstance(path, Path) else path
    try:
        with namespace.entered():
            return work()
    finally:
        if isinstance(path, Path):
            namespace.close()


class Server:
    """Tells each client its address as seen here; TCP or UDP.

    Args:
        where: the namespace it listens in.
        port: to listen on.
        kind: ``tcp`` or ``udp``.
        address: to listen on.
    """

    def __init__(
        self, where: Path | NetNamespace, port: int, kind: str = "tcp", address: str = "0.0.0.0"
    ) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        type_ = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM

        def open_() -> socket.socket:
            made = socket.socket(family, type_)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((address, port))
            if kind == "tcp":
                made.listen()
            made.settimeout(0.1)
            return made

        self._socket = inside(where, open_)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._streams if kind == "tcp" else self._datagrams, daemon=True
        )
        self._thread.start()

    def _streams(self) -> None:
        while not self._stop.is_set():
            try:
                client, peer = self._socket.accept()
            except TimeoutError:
                continue
            with client:
                client.sendall(str(peer[0]).encode())

    def _datagrams(self) -> None:
        while not self._stop.is_set():
            try:
                _, peer = self._socket.recvfrom(2048)
            except TimeoutError:
                continue
            self._socket.sendto(str(peer[0]).encode(), peer)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(
    where: Path | NetNamespace, address: str, port: int, kind: str = "tcp", timeout: float = 1.0
) -> str:
    """The caller's address as a :class:`Server` sees it; empty if it cannot be reached."""

    def work() -> str:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        type_ = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
        with socket.socket(family, type_) as asking:
            asking.settimeout(timeout)
            try:
                asking.connect((address, port))
                if kind == "udp":
                    asking.send(b"?")
                return asking.recv(100).decode()
            except OSError:
                return ""

    return inside(where, work)

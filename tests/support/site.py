"""Hosts made of network namespaces at one switch, with a real etcd and links that can fail."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.support.daemon import Daemon
from tests.support.etcd import Etcd
from tests.support.netns import new_namespace

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.process import run


class Site:
    """Hosts at a switch, 192.0.2.N each; number 1 runs etcd."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self._switch = stack.enter_context(new_namespace())
        with self._switch.entered(), nl.Netlink() as netlink:
            kind = {"attrs": [("IFLA_INFO_KIND", "bridge")]}
            made = [("IFLA_IFNAME", "switch"), ("IFLA_LINKINFO", kind)]
            netlink.run([rt.link_new("make switch", made, up=True)])
        self.etcd = stack.enter_context(Etcd(folder / "etcd", self.plug(1), "192.0.2.1"))

    def plug(self, number: int) -> NetNamespace:
        """A namespace at the switch."""
        made = self.stack.enter_context(new_namespace())
        with self._switch.entered(), nl.Netlink() as netlink:
            peer = [("IFLA_IFNAME", "eth0"), ("IFLA_NET_NS_FD", made.descriptor)]
            data = {"attrs": [("VETH_INFO_PEER", {"attrs": peer})]}
            info = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}
            port = [
                ("IFLA_IFNAME", f"port{number}"),
                ("IFLA_MASTER", socket.if_nametoindex("switch")),
                ("IFLA_LINKINFO", info),
            ]
            netlink.run([rt.link_new("plug", port, up=True)])
        with made.entered(), nl.Netlink() as netlink:
            index = socket.if_nametoindex("eth0")
            netlink.run(
                [
                    rt.address_add(index, f"192.0.2.{number}", 24),
                    rt.link_set(index, "up", up=True),
                    rt.route_replace("192.0.2.1", family=socket.AF_INET, index=index),
                ]
            )
            assert rt.wait_operational(netlink, index, 5)
        return made

    def cut(self, number: int, *, heal: bool = False) -> None:
        """Unplug a host, or plug it in again."""
        with self._switch.entered(), nl.Netlink() as netlink:
            index = socket.if_nametoindex(f"port{number}")
            netlink.run([rt.link_set(index, "cut", up=heal)])

    def lose(self, number: int, percent: int) -> None:
        """Throw away that share of what a host sends and receives; 0 is a good link again."""
        port = f"port{number}"
        with self._switch.entered():
            run(["nft", "add", "table", "netdev", f"lossy-{port}"])
            run(["nft", "delete", "table", "netdev", f"lossy-{port}"])
            if percent:
                table = f"netdev lossy-{port}"
                rules = f"add table {table}\n"
                chance = "" if percent >= 100 else f"numgen random mod 100 < {percent} "
                for hook in ("ingress", "egress"):
                    place = f"type filter hook {hook} device {port} priority 0;"
                    rules += f"add chain {table} at-{hook} {{ {place} }}\n"
                    rules += f"add rule {table} at-{hook} {chance}drop\n"
                run(["nft", "-f", "-"], stdin=rules.encode())


@dataclass
class HostDaemon(Daemon):
    """A daemon on a host of its own; its socket is reached from everywhere."""

    where: NetNamespace | None = None

    def start(self) -> None:
        assert self.where is not None
        with self.where.entered():
            super().start()

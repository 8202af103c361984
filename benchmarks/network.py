"""What a network of ours costs against a bare veth pair on a bare bridge.

Run as root: ``python benchmarks/network.py [--seconds N] [--rounds N]``.  Everything
happens in network namespaces of its own.  Rows are measured in turn, round after round;
printed are the medians of the rate and of the gigabytes moved for a second of processor
time (sender and receiver, which on these links do all the kernel's work), and the latter's
share of the floor's: on a machine others use too, the rate says little.

- ``bare``: two namespaces on a bridge without rules, the floor.
- ``network``: two containers on a user-defined network.
- ``published``: a container's published port, from a host next door.
- ``routed``: the same by plain routing, without any rule: the floor of ``published``.
- ``iptables``: the same with the rules dockerd makes for one container (its nat and filter
  chains, by ``iptables-nft``), where that program is installed.
- ``start``: namespace, endpoint and one published port of a container, milliseconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.netns import cable, new_namespace, own_namespace
from tests.support.network_host import NetworkHost

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks import sysctl
from lazarette.runtime.networks.model import NetworkSpec, PortRequest
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.process import run

BLOCK = 1 << 18
PORT = 5001


@contextmanager
def sink(where: NetNamespace) -> Iterator[int]:
    """A process that takes in all that is sent to it."""
    with where.entered():
        listening = socket.create_server(("0.0.0.0", PORT))
    child = os.fork()
    if child == 0:
        buffer = bytearray(BLOCK)
        while True:
            client, _ = listening.accept()
            while client.recv_into(buffer):
                pass
            client.close()
    listening.close()
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def running(process: int) -> float:
    """Seconds a process has been on a processor."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9


def throughput(
    where: NetNamespace, address: str, port: int, receiver: int, seconds: float
) -> tuple[float, float]:
    """Gigabytes from a namespace to a :func:`sink`: a second, and a processor's second."""
    with where.entered(), socket.create_connection((address, port), timeout=10) as sending:
        data = memoryview(bytes(BLOCK))
        sent, began = 0, time.perf_counter()
        spent = time.process_time() + running(receiver)
        while (now := time.perf_counter()) - began < seconds:
            sent += sending.send(data)
        spent = time.process_time() + running(receiver) - spent
        return sent / (now - began) / 1e9, sent / spent / 1e9


def bare_bridge(stack: ExitStack) -> tuple[NetNamespace, NetNamespace]:
    """Two namespaces at a bridge in a third, 10.200.0.2 and 10.200.0.3."""
    middle = stack.enter_context(new_namespace())
    ends = [stack.enter_context(new_namespace()) for _ in range(2)]
    with middle.entered(), nl.Netlink() as netlink:
        kind = {"attrs": [("IFLA_INFO_KIND", "bridge")]}
        bridge = [("IFLA_IFNAME", "bare"), ("IFLA_LINKINFO", kind)]
        netlink.run([rt.link_new("bridge", bridge, up=True)])
        for number, end in enumerate(ends):
            peer = [("IFLA_IFNAME", "eth0"), ("IFLA_NET_NS_FD", end.descriptor)]
            data = {"attrs": [("VETH_INFO_PEER", {"attrs": peer})]}
            info = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}
            port = [
                ("IFLA_IFNAME", f"port{number}"),
                ("IFLA_MASTER", socket.if_nametoindex("bare")),
                ("IFLA_LINKINFO", info),
            ]
            netlink.run([rt.link_new("port", port, up=True)])
    for number, end in enumerate(ends):
        address(end, "eth0", f"10.200.0.{number + 2}")
    return ends[0], ends[1]


def address(where: NetNamespace, name: str, ip: str, gateway: str = "") -> None:
    """Address an interface and start it."""
    with where.entered(), nl.Netlink() as netlink:
        index = socket.if_nametoindex(name)
        netlink.run([rt.address_add(index, ip, 24), rt.link_set(index, "up", up=True)])
        if gateway:
            netlink.run([rt.route_replace(gateway, family=socket.AF_INET, index=index)])
        rt.wait_operational(netlink, index, 5)


def routed(stack: ExitStack, rules: bool) -> tuple[NetNamespace, NetNamespace]:
    """A host with a bridge and one end at it, and a host next door: (end, next door)."""
    host = stack.enter_context(new_namespace())
    end = stack.enter_context(new_namespace())
    door = stack.enter_context(new_namespace())
    with host.entered(), nl.Netlink() as netlink:
        sysctl.forward(4)
        kind = {"attrs": [("IFLA_INFO_KIND", "bridge")]}
        bridge = [("IFLA_IFNAME", "br0"), ("IFLA_LINKINFO", kind)]
        netlink.run([rt.link_new("bridge", bridge, up=True)])
        peer = [("IFLA_IFNAME", "eth0"), ("IFLA_NET_NS_FD", end.descriptor)]
        data = {"attrs": [("VETH_INFO_PEER", {"attrs": peer})]}
        info = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}
        master = socket.if_nametoindex("br0")
        port = [("IFLA_IFNAME", "port"), ("IFLA_MASTER", master), ("IFLA_LINKINFO", info)]
        netlink.run([rt.link_new("port", port, up=True)])
    address(host, "br0", "10.201.0.1")
    address(end, "eth0", "10.201.0.2", "10.201.0.1")
    name = cable(host, "10.202.0.1", door, "10.202.0.2")
    with door.entered(), nl.Netlink() as netlink:
        index = socket.if_nametoindex(name)
        netlink.run([rt.route_replace("10.202.0.1", family=socket.AF_INET, index=index)])
    if rules:
        with host.entered():
            _dockerd_rules()
    return end, door


def _dockerd_rules() -> None:
    """What dockerd 26 makes for a bridge with one container and one published port."""
    for rule in (
        "-t nat -N DOCKER",
        "-t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        "-t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER",
        "-t nat -A POSTROUTING -s 10.201.0.0/16 ! -o br0 -j MASQUERADE",
        "-t nat -A POSTROUTING -s 10.201.0.2/32 -d 10.201.0.2/32 -p tcp --dport 5001 -j MASQUERADE",
        "-t nat -A DOCKER -i br0 -j RETURN",
        "-t nat -A DOCKER ! -i br0 -p tcp --dport 5001 -j DNAT --to-destination 10.201.0.2:5001",
        "-N DOCKER",
        "-N DOCKER-ISOLATION-STAGE-1",
        "-N DOCKER-ISOLATION-STAGE-2",
        "-N DOCKER-USER",
        "-P FORWARD DROP",
        "-A FORWARD -j DOCKER-USER",
        "-A FORWARD -j DOCKER-ISOLATION-STAGE-1",
        "-A FORWARD -o br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A FORWARD -o br0 -j DOCKER",
        "-A FORWARD -i br0 ! -o br0 -j ACCEPT",
        "-A FORWARD -i br0 -o br0 -j ACCEPT",
        "-A DOCKER -d 10.201.0.2/32 ! -i br0 -o br0 -p tcp --dport 5001 -j ACCEPT",
        "-A DOCKER-ISOLATION-STAGE-1 -i br0 ! -o br0 -j DOCKER-ISOLATION-STAGE-2",
        "-A DOCKER-ISOLATION-STAGE-1 -j RETURN",
        "-A DOCKER-ISOLATION-STAGE-2 -o br0 -j DROP",
        "-A DOCKER-ISOLATION-STAGE-2 -j RETURN",
        "-A DOCKER-USER -j RETURN",
    ):
        run(["iptables-nft", *rule.split()])


def starts(host: NetworkHost, count: int) -> list[float]:
    """Milliseconds each of ``count`` containers takes to get its network."""
    took = []
    for number in range(count):
        began = time.perf_counter()
        container = host.start(f"s{number}", ports=[PortRequest(container_port=80)])
        took.append((time.perf_counter() - began) * 1e3)
        container.stop()
    return took


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    with ExitStack() as stack:
        here = stack.enter_context(own_namespace())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="laz-bench-")))
        host = NetworkHost(folder)
        stack.callback(host.close)
        host.manager.create(NetworkSpec(name="net"))
        one, other = host.start("one", "net"), host.start("other", "net")
        web = host.start("web", "net", ports=[PortRequest(container_port=PORT, host_port=PORT)])
        ends = bare_bridge(stack)
        plain, plain_door = routed(stack, False)
        door = stack.enter_context(new_namespace())
        cable(here, "10.203.0.1", door, "10.203.0.2")
        spaces = {c: stack.enter_context(NetNamespace.at(c.path)) for c in (one, other, web)}
        rows = {
            "bare": (ends[0], "10.200.0.3", ends[1]),
            "network": (spaces[one], other.ip, spaces[other]),
            "published": (door, "10.203.0.1", spaces[web]),
            "routed": (plain_door, "10.201.0.2", plain),
        }
        if shutil.which("iptables-nft"):
            docked, docked_door = routed(stack, True)
            rows["iptables"] = (docked_door, "10.202.0.1", docked)
        sinks = {name: stack.enter_context(sink(row[2])) for name, row in rows.items()}
        rates: dict[str, list[float]] = {name: [] for name in rows}
        costs: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(given.rounds):
            for name, (sender, ip, _) in rows.items():
                rate, cost = throughput(sender, ip, PORT, sinks[name], given.seconds)
                rates[name].append(rate)
                costs[name].append(cost)
        floors = {"network": "bare", "published": "iptables" if "iptables" in rows else "routed"}
        for name in rows:
            floor = floors.get(name, name)
            share = statistics.median(
                mine / base for mine, base in zip(costs[name], costs[floor], strict=True)
            )
            print(
                f"{name:10} {statistics.median(rates[name]):6.2f} GB/s "
                f"{statistics.median(costs[name]):6.2f} GB/cpu-s  {share:5.2f} of {floor}"
            )
        took = sorted(starts(host, 30))
        print(f"start      {took[15]:6.1f} ms median, {took[0]:.1f} ms best")


if __name__ == "__main__":
    main()

"""Networks over several hosts: namespaces joined by a switch, with a real etcd.

Hosts are told dead after two seconds here instead of six.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.asking import addresses
from tests.support.netns import Server, ask, inside
from tests.support.network_host import Container, NetworkHost
from tests.support.site import Site

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks.etcd import ClusterConfig, ClusterUnavailable
from lazarette.runtime.networks.model import (
    AddressConflict,
    EndpointRequest,
    NetworkExists,
    NetworkInUse,
    NetworkSpec,
    PortRequest,
)
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.errors import MissingFeature, Unavailable

TTL = 2
OVERLAY = NetworkSpec(name="over", driver="overlay", attachable=True)


class Hosts(Site):
    """A site whose daemons are network managers of this process."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__(folder, stack)
        self.hosts: dict[int, NetworkHost] = {}

    def host(self, number: int) -> NetworkHost:
        """A daemon on a host of its own."""
        config = ClusterConfig((self.etcd.url,), f"192.0.2.{number}", ttl=TTL)
        with self.plug(number).entered():
            made = NetworkHost(self.folder / f"host{number}", cluster=config)
        self.hosts[number] = made
        self.stack.callback(made.close)
        return made


@pytest.fixture
def site(namespace: NetNamespace, tmp_path: Path) -> Iterator[Hosts]:
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed")
    with ExitStack() as stack:
        yield Hosts(tmp_path, stack)


def soon(check: Callable[[], object], seconds: float = 10) -> None:
    """It becomes true within that long."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def knows(host: NetworkHost, name: str = "over") -> Callable[[], bool]:
    return lambda: any(network.name == name for network in host.manager.networks())


def reach(one: Container, other: Container) -> Callable[[], bool]:
    return lambda: ask(one.path, other.ip, 80, timeout=0.5) == one.ip


def test_a_database_on_one_host_its_client_on_another(site: Hosts) -> None:
    first, second = site.host(2), site.host(3)
    network = first.manager.create(OVERLAY)
    assert network.spec.scope == "swarm"
    soon(knows(second))
    assert second.manager.inspect("over").id == network.id
    db = first.start("db", EndpointRequest(network="over", name="db", aliases=("postgres",)))
    client = second.start("client", "over")
    assert db.ip != client.ip
    with Server(db.path, 80):
        soon(lambda: addresses(client, "db") == [db.ip])
        assert addresses(client, "postgres") == [db.ip]
        soon(reach(client, db), 2)
        with pytest.raises(NetworkInUse):
            second.manager.remove("over")
        with pytest.raises(NetworkExists):
            second.manager.create(OVERLAY)
        db.stop()
        soon(lambda: addresses(client, "db") == [])
    client.stop()
    soon(lambda: not first.manager.endpoints("over"))
    soon(lambda: _removed(second))
    soon(lambda: not knows(first)())
    soon(lambda: not _links(first))


def _links(host: NetworkHost) -> list[str]:
    names = [link.name for link in rt.links(host.manager.netlink)]
    return [name for name in names if name.startswith(("vx-", "br-"))]


def _removed(host: NetworkHost) -> bool:
    try:
        host.manager.remove("over")
    except NetworkInUse:
        return False
    return True


def test_ways_out_and_published_ports(site: Hosts) -> None:
    first, second = site.host(2), site.host(3)
    first.manager.create(OVERLAY)
    soon(knows(second))
    web = first.start("web", "over", ports=[PortRequest(container_port=80, host_port=8080)])
    client = second.start("client", "over")
    with Server(web.path, 80), Server(site.hosts[2].manager.host, 90):
        assert ask(client.path, "192.0.2.2", 8080) == "192.0.2.3"
        assert ask(client.path, "192.0.2.2", 90) == "192.0.2.3"


def test_no_address_twice(site: Hosts) -> None:
    hosts = [site.host(number) for number in (2, 3, 4)]
    hosts[0].manager.create(OVERLAY)
    for host in hosts:
        soon(knows(host))
    ips = [host.start(f"c{n}", "over").ip for n in range(4) for host in hosts]
    assert len(set(ips)) == len(ips)
    with pytest.raises(AddressConflict):
        hosts[1].start("thief", EndpointRequest(network="over", ipv4=ips[0]))


def test_no_address_twice_while_links_and_etcd_fail(site: Hosts) -> None:
    """Four hosts start containers all the while; each has its own address, known to all."""
    hosts = {number: site.host(number) for number in (2, 3, 4, 5)}
    hosts[2].manager.create(OVERLAY)
    for host in hosts.values():
        soon(knows(host))

    def start(number: int) -> list[str]:
        found: list[str] = []
        deadline = time.monotonic() + 120
        while len(found) < 6:
            assert time.monotonic() < deadline, "etcd was never there again"
            try:
                found.append(hosts[number].start(f"h{number}c{len(found)}", "over").ip)
            except Unavailable:
                time.sleep(0.2)
            time.sleep(0.3)
        return found

    with ThreadPoolExecutor(4) as pool:
        started = {number: pool.submit(start, number) for number in hosts}
        site.lose(3, 20)
        time.sleep(0.5)
        site.etcd.kill()
        time.sleep(1)
        site.etcd.start()
        site.cut(4)
        time.sleep(TTL + 1)
        site.cut(4, heal=True)
        site.lose(3, 0)
        ips = {number: each.result() for number, each in started.items()}
    everyone = sorted(ip for each in ips.values() for ip in each)
    assert len(set(everyone)) == len(everyone) == 24
    for number, host in hosts.items():
        others = sorted(ip for each in ips if each != number for ip in ips[each])
        network = host.manager.inspect("over")
        soon(
            lambda host=host, others=others, network=network: (
                sorted(record.ip for record in host.manager.elsewhere(network)) == others
            ),
            30,
        )


def test_a_daemon_that_restarts(site: Hosts) -> None:
    first, second = site.host(2), site.host(3)
    first.manager.create(OVERLAY)
    soon(knows(second))
    db, client = first.start("db", "over"), second.start("client", "over")
    with Server(db.path, 80):
        soon(reach(client, db))
        first.stop_daemon()
        assert reach(client, db)()
        first.start_daemon(db)
        time.sleep(TTL + 1)
        assert reach(client, db)()
        assert addresses(client, "db") == [db.ip]
        second.restart(client)
        soon(reach(client, db))
        soon(lambda: addresses(client, "db") == [db.ip])
    gone = (first.manager.of_container(db.id)[0].mac, db.ip)
    index = rt.link_index(second.manager.netlink, f"vx-{first.manager.inspect('over').id[:12]}")
    netlink = second.manager.netlink
    assert gone in rt.neighbours(netlink, index)
    assert (gone[0], "192.0.2.2") in rt.forwarding(netlink, index)
    second.stop_daemon()
    db.stop()
    second.start_daemon(client)
    soon(lambda: gone not in rt.neighbours(second.manager.netlink, index))
    soon(lambda: not rt.forwarding(second.manager.netlink, index))


def test_etcd_dies_and_comes_back(site: Hosts) -> None:
    first, second = site.host(2), site.host(3)
    first.manager.create(OVERLAY)
    soon(knows(second))
    db, client = first.start("db", "over"), second.start("client", "over")
    with Server(db.path, 80):
        soon(reach(client, db))
        site.etcd.kill()
        time.sleep(TTL + 1)
        assert reach(client, db)()
        assert addresses(client, "db") == [db.ip]
        with pytest.raises(ClusterUnavailable):
            second.start("late", "over")
        local = second.start("local")  # other networks do not care
        assert local.ip
        site.etcd.start()
        soon(lambda: _started(second, "late"))
        assert reach(client, db)()


def _started(host: NetworkHost, name: str) -> bool:
    try:
        host.start(name, "over")
    except Unavailable:
        return False
    return True


def test_a_host_that_dies_loses_its_names_and_addresses(site: Hosts) -> None:
    first, second = site.host(2), site.host(3)
    first.manager.create(OVERLAY)
    soon(knows(second))
    db, client = first.start("db", "over"), second.start("client", "over")
    soon(lambda: addresses(client, "db") == [db.ip])
    dead = db.ip
    site.cut(2)
    soon(lambda: addresses(client, "db") == [])
    fresh = second.start("fresh", "over")
    assert fresh.ip != dead  # given last
    second.start("heir", EndpointRequest(network="over", name="db", ipv4=dead))
    assert addresses(client, "db") == [dead]


def test_cut_off_and_healed(site: Hosts) -> None:
    first, second = site.host(2), site.host(3)
    first.manager.create(OVERLAY)
    soon(knows(second))
    kept, lost = first.start("kept", "over"), first.start("lost", "over")
    client = second.start("client", "over")
    with Server(kept.path, 80):
        soon(reach(client, kept))
        address = lost.ip
        site.cut(2)
        assert ask(lost.path, kept.ip, 80) == address  # local traffic goes on
        soon(lambda: addresses(client, "lost") == [])
        heir = second.start("heir", EndpointRequest(network="over", name="heir", ipv4=address))
        site.cut(2, heal=True)
        soon(lambda: first.manager.of_container(lost.id) == [])
        soon(reach(client, kept))
        soon(lambda: addresses(client, "kept") == [kept.ip])
        assert addresses(client, "lost") == []
        assert addresses(client, "heir") == [heir.ip]


def test_refusals(site: Hosts, host: NetworkHost) -> None:
    with pytest.raises(Unavailable):
        host.manager.create(OVERLAY)
    first = site.host(2)
    with pytest.raises(MissingFeature):
        first.manager.create(NetworkSpec(name="over", driver="overlay", options={"encrypted": ""}))


def test_mtu_leaves_room(site: Hosts) -> None:
    first = site.host(2)
    first.manager.create(OVERLAY)
    container = first.start("one", "over")

    def mtu() -> int:
        with nl.Netlink() as netlink:
            return next(link.mtu for link in rt.links(netlink) if link.name == "eth0")

    assert inside(container.path, mtu) == 1450

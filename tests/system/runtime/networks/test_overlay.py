"""Networks over several hosts: namespaces joined by a switch, with a real etcd.

Hosts are told dead after two seconds here instead of six.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from tests.support.asking import addresses
from tests.support.netns import Server, ask, inside
from tests.support.network_host import Container, NetworkHost
from tests.support.site import Site

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks import wireguard
from lazarette.runtime.networks.etcd import ClusterConfig, ClusterUnavailable, EtcdStore
from lazarette.runtime.networks.model import (
    AddressConflict,
    EndpointRequest,
    Network,
    NetworkExists,
    NetworkInUse,
    NetworkSpec,
    Pool,
    PortRequest,
)
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.overlay import OPTION_VNI, VXLAN_PORT
from lazarette.storage.errors import MissingFeature, Unavailable

PATIENCE = int(os.environ.get("LAZARETTE_PATIENCE", "1"))
TTL = 2 * PATIENCE
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

    def _store(self) -> EtcdStore:
        config = ClusterConfig((self.etcd.url,), "192.0.2.2")
        return EtcdStore(config, self.hosts[2].manager.host)

    def values(self) -> dict[str, bytes]:
        """What etcd has."""
        return dict(self._store().snapshot().values)

    def put(self, key: str, value: bytes) -> None:
        """Write a key, as another host would."""
        self._store().change([], {key: value})


@pytest.fixture
def site(namespace: NetNamespace, tmp_path: Path) -> Iterator[Hosts]:
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed")
    with ExitStack() as stack:
        yield Hosts(tmp_path, stack)


def soon(check: Callable[[], object], seconds: float = 10) -> None:
    """It becomes true within that long (times ``LAZARETTE_PATIENCE``, for emulated kernels)."""
    deadline = time.monotonic() + seconds * PATIENCE
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


# ---- encrypted

ENCRYPTED = NetworkSpec(name="over", driver="overlay", options={"encrypted": ""})


def _needs_wireguard(site: Hosts) -> None:
    if not wireguard.supported(site.hosts[2].manager.host):
        pytest.skip("this kernel has no WireGuard")


def _tunnels(host: NetworkHost) -> list[str]:
    return [link.name for link in rt.links(host.manager.netlink) if link.kind == "wireguard"]


class Listener:
    """Everything that leaves a host or comes to it by its link outside."""

    def __init__(self, where: NetNamespace) -> None:
        with where.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self._socket.bind(("eth0", 3))
        self._socket.setblocking(False)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def heard(self) -> list[bytes]:
        """Frames since the last time."""
        found = []
        while True:
            try:
                found.append(self._socket.recv(65536))
            except BlockingIOError:
                return found


def _udp_port(frame: bytes) -> int:
    """Where an IPv4 datagram goes to; 0 for other frames."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 17:
        return 0
    return int.from_bytes(frame[36:38], "big")


def test_encrypted(site: Hosts) -> None:
    """Needs a kernel with WireGuard: nothing between the hosts can be read or forged."""
    first, second = site.host(2), site.host(3)
    _needs_wireguard(site)
    first.manager.create(ENCRYPTED)
    soon(knows(second))
    db, client = first.start("db", "over"), second.start("client", "over")
    with Server(db.path, 80), Listener(first.manager.host) as listener:
        soon(lambda: addresses(client, "db") == [db.ip])
        soon(reach(client, db))
        ports = {_udp_port(frame) for frame in listener.heard()}
        assert wireguard.PORT in ports and VXLAN_PORT not in ports
        assert not any(db.ip.encode() in frame for frame in listener.heard())
        second.restart(client)  # the tunnel and its key stay
        assert reach(client, db)()
        soon(knows(second))
        late = second.start("late", "over")
        soon(reach(late, db))
        _forge(site, db)
        site.cut(3)
        soon(lambda: not reach(client, db)(), 20)
        site.cut(3, heal=True)
        soon(reach(client, db), 20)
    assert len(_tunnels(first)) == 1
    for container in (db, client, late):
        container.stop()
    soon(lambda: _removed(second), 20)
    soon(lambda: not knows(first)())
    soon(lambda: not _links(first) and not _tunnels(first) and not _tunnels(second))


def _forge(site: Hosts, target: Container) -> None:
    """A stranger at the switch sends the network's own frames, not encrypted."""
    network = site.hosts[2].manager.inspect("over")
    vni = int(network.spec.options[OPTION_VNI])
    heard: list[bytes] = []

    def listen() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        made.bind(("eth0", 3))
        made.settimeout(0.5)
        return made

    frame = b"\xff" * 6 + b"\x02" * 6 + b"\x88\xb5" + b"forged" * 10
    packet = bytes([8, 0, 0, 0]) + (vni << 8).to_bytes(4, "big") + frame

    def send() -> None:
        for family, where in ((socket.AF_INET, "192.0.2.2"), (socket.AF_INET6, "2001:db8::2")):
            with socket.socket(family, socket.SOCK_DGRAM) as sending:
                sending.sendto(packet, (where, VXLAN_PORT))

    with site.hosts[2].manager.host.entered(), nl.Netlink() as netlink:
        netlink.run([rt.address_add(socket.if_nametoindex("eth0"), "2001:db8::2", 64)])
    stranger = site.plug(9)
    with stranger.entered(), nl.Netlink() as netlink:
        netlink.run([rt.address_add(socket.if_nametoindex("eth0"), "2001:db8::9", 64)])
    with inside(target.path, listen) as listening:
        inside(stranger, send)
        try:
            while True:
                heard.append(listening.recv(2000))
        except TimeoutError:
            pass
    assert not any(b"forged" in frame for frame in heard)


def _mtu() -> int:
    with nl.Netlink() as netlink:
        return next(link.mtu for link in rt.links(netlink) if link.name == "eth0")


def test_mtu_leaves_room_for_the_tunnel(site: Hosts) -> None:
    first = site.host(2)
    _needs_wireguard(site)
    first.manager.create(ENCRYPTED)
    container = first.start("one", "over")
    assert inside(container.path, _mtu) == 1370


def test_encrypted_without_wireguard(site: Hosts) -> None:
    first = site.host(2)
    if wireguard.supported(first.manager.host):
        pytest.skip("this kernel has WireGuard")
    with pytest.raises(MissingFeature, match="WireGuard") as refused:
        first.manager.create(ENCRYPTED)
    assert "module wireguard" in refused.value.hint
    assert not knows(first)() and not _links(first)


def test_a_host_without_wireguard_never_sends_in_the_clear(site: Hosts) -> None:
    """Another host made an encrypted network: it is known here, and joining it is refused."""
    first, second = site.host(2), site.host(3)
    if wireguard.supported(first.manager.host):
        pytest.skip("this kernel has WireGuard")
    first.manager.create(OVERLAY)
    soon(knows(second))
    key = next(key for key in site.values() if key.startswith("/networks/"))
    known = msgspec.json.decode(site.values()[key], type=Network)
    options = {**known.spec.options, "encrypted": "", OPTION_VNI: "5000"}
    pools = (Pool(subnet="10.77.0.0/24", gateway="10.77.0.1"),)
    spec = msgspec.structs.replace(known.spec, name="secret", options=options, pools=pools)
    id_ = "5ec" + known.id[3:]
    secret = msgspec.structs.replace(known, id=id_, spec=spec)
    site.put(f"/networks/{id_}", msgspec.json.encode(secret))
    soon(knows(second, "secret"))
    with pytest.raises(MissingFeature, match="WireGuard"):
        second.start("one", "secret")
    assert not [name for name in _links(second) if name.endswith(id_[:12])]


def test_mtu_leaves_room(site: Hosts) -> None:
    first = site.host(2)
    first.manager.create(OVERLAY)
    container = first.start("one", "over")
    assert inside(container.path, _mtu) == 1450

"""The embedded resolver, asked from inside containers (case A32)."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import dnslib
import pytest
from tests.support.asking import addresses, query
from tests.support.nameserver import NameServer
from tests.support.netns import cable, inside, new_namespace
from tests.support.network_host import NetworkHost

from lazarette.runtime.networks.model import EndpointRequest, NetworkSpec
from lazarette.runtime.networks.namespaces import NetNamespace


@pytest.fixture
def net(host: NetworkHost) -> Iterator[NetworkHost]:
    host.manager.create(NetworkSpec(name="net", enable_ipv6=True))
    yield host


def test_names(net: NetworkHost) -> None:
    asker = net.start("asker", "net")
    request = EndpointRequest(network="net", name="db", hostname="inner", aliases=("Postgres",))
    db = net.start("db", request)
    for name in ("db", "DB", "postgres", "inner", db.id[:12], "db.net", "db."):
        assert addresses(asker, name) == [db.ip], name
    assert addresses(asker, "db", "AAAA") == [db.ipv6]
    other = query(asker, "db", "MX")
    assert (other.header.rcode, other.rr) == (0, [])
    assert addresses(asker, "asker") == [asker.ip]


def test_reverse(net: NetworkHost) -> None:
    asker, db = net.start("asker", "net"), net.start("db", "net")
    backwards = ".".join(reversed(db.ip.split(".")))
    assert addresses(asker, f"{backwards}.in-addr.arpa", "PTR") == ["db.net."]


def test_one_alias_of_two(net: NetworkHost) -> None:
    asker = net.start("asker", "net")
    both = [
        net.start(f"db{n}", EndpointRequest(network="net", name=f"db{n}", aliases=("db",)))
        for n in range(2)
    ]
    first, second = addresses(asker, "db"), addresses(asker, "db")
    assert set(first) == {both[0].ip, both[1].ip}
    assert second == first[::-1]
    both[0].stop()
    assert addresses(asker, "db") == [both[1].ip]
    net.manager.disconnect("net", both[1].id)
    with new_namespace() as upstream:
        with NameServer(net, upstream):
            answer = query(asker, "db")
    assert (answer.header.rcode, answer.rr) == (dnslib.RCODE.NXDOMAIN, [])


def test_other_networks_stay_unknown(net: NetworkHost) -> None:
    net.manager.create(NetworkSpec(name="secret", internal=True))
    net.manager.create(NetworkSpec(name="inner", internal=True))
    net.start("db", "secret")
    asker = net.start("asker", "inner")
    assert query(asker, "db").header.rcode == dnslib.RCODE.NXDOMAIN
    assert query(asker, "db.secret").header.rcode == dnslib.RCODE.NXDOMAIN
    net.manager.connect("secret", asker.id, EndpointRequest(network="secret", name="asker"))
    assert len(addresses(asker, "db")) == 1
    net.manager.disconnect("secret", asker.id)
    assert query(asker, "db").header.rcode == dnslib.RCODE.NXDOMAIN


def test_links(net: NetworkHost) -> None:
    db = net.start("db", "net")
    asker = net.start("asker", EndpointRequest(network="net", name="asker", links=("db:mine",)))
    other = net.start("other", EndpointRequest(network="net", name="other"))
    assert addresses(asker, "mine") == [db.ip]
    net.manager.disconnect("net", other.id)
    assert addresses(other, "db") == []


def test_tcp_and_edns(net: NetworkHost) -> None:
    asker = net.start("asker", "net")
    many = [
        net.start(f"db{n}", EndpointRequest(network="net", name=f"db{n}", aliases=("db",)))
        for n in range(40)
    ]
    wanted = {container.ip for container in many}
    short = query(asker, "db")
    assert (short.header.tc, short.rr) == (1, [])
    assert {str(r.rdata) for r in query(asker, "db", tcp=True).rr} == wanted
    large = query(asker, "db", edns=1232)
    assert {str(r.rdata) for r in large.rr} == wanted
    assert [record.rtype for record in large.ar] == [dnslib.QTYPE.OPT]


def test_the_rest_is_passed_on(net: NetworkHost) -> None:
    asker = net.start("asker", "net")
    with new_namespace() as upstream, NameServer(net, upstream):
        assert addresses(asker, "example.test") == ["192.0.2.1"]
        assert [str(r.rdata) for r in query(asker, "example.test", tcp=True).rr] == ["192.0.2.1"]
        assert query(asker, "nowhere.test").header.rcode == dnslib.RCODE.NXDOMAIN
        text = query(asker, "example.test", "TXT")
        assert (text.header.rcode, text.rr) == (0, [])


def test_resolvers_of_the_container(net: NetworkHost, namespace: NetNamespace) -> None:
    asker = net.start("asker", "net")
    with new_namespace() as upstream:
        cable(namespace, "198.51.100.1", upstream, "198.51.100.2")
        with NameServer(None, upstream):
            conf = net.manager.resolv_conf(asker.id, dns=["198.51.100.2"], search=["lan"])
            assert conf == b"nameserver 127.0.0.11\nsearch lan\noptions ndots:0\n"
            assert addresses(asker, "example.test") == ["192.0.2.1"]
            net.restart(asker)
            assert addresses(asker, "example.test") == ["192.0.2.1"]


def test_survives_a_restart(net: NetworkHost) -> None:
    asker, db = net.start("asker", "net"), net.start("db", "net")
    net.restart(asker, db)
    assert addresses(asker, "db") == [db.ip]
    db.stop()
    assert addresses(asker, "db") == []


def test_nonsense_is_refused(net: NetworkHost) -> None:
    asker = net.start("asker", "net")

    def work() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(2)
            asking.connect(("127.0.0.11", 53))
            asking.send(b"\x12\x34" + b"\x01\x00" + b"\x00\x01" + bytes(6) + b"\xff" * 3)
            return asking.recv(512)

    answer = inside(asker.path, work)
    assert answer[:2] == b"\x12\x34" and answer[3] & 0xF == dnslib.RCODE.FORMERR


def test_port_53_is_the_containers(net: NetworkHost) -> None:
    asker, db = net.start("asker", "net"), net.start("db", "net")

    def bind() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind(("0.0.0.0", 53))
        return made

    with inside(asker.path, bind):
        assert addresses(asker, "db") == [db.ip]


def test_within_a_millisecond(net: NetworkHost) -> None:
    asker = net.start("asker", "net")
    net.start("db", "net")
    question = dnslib.DNSRecord.question("db").pack()

    def work() -> list[float]:
        took = []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(2)
            asking.connect(("127.0.0.11", 53))
            for _ in range(100):
                began = time.perf_counter()
                asking.send(question)
                asking.recv(512)
                took.append(time.perf_counter() - began)
        return sorted(took)

    assert inside(asker.path, work)[10] < 0.001  # of a machine others use too


def test_default_network_has_no_names(net: NetworkHost) -> None:
    plain = net.start("plain")
    assert b"127.0.0.11" not in net.manager.resolv_conf(plain.id)
    net.manager.connect("net", plain.id, EndpointRequest(network="net", name="plain"))
    assert b"nameserver 127.0.0.11" in net.manager.resolv_conf(plain.id)
    assert addresses(plain, "plain") != []

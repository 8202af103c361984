"""Published ports: from everywhere, exclusively, and gone without a trace (case A31)."""

from __future__ import annotations

import socket

import pytest
from tests.support.netns import Server, ask, cable, inside, new_namespace
from tests.support.network_host import NetworkHost

from lazarette.runtime.networks.model import (
    EndpointRequest,
    NetworkSpec,
    PortAllocated,
    PortRequest,
)
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.ports import ephemeral_range


def port(container_port: int, host_port: int = 0, **more: object) -> PortRequest:
    return PortRequest(container_port=container_port, host_port=host_port, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_reached_from_everywhere(host: NetworkHost, namespace: NetNamespace, kind: str) -> None:
    host.manager.create(NetworkSpec(name="a"))
    web = host.start("web", "a", ports=[port(80, 8080, proto=kind)])
    neighbour, stranger = host.start("neighbour", "a"), host.start("stranger")
    gateway = host.manager.of_container(web.id)[0].gateway
    with new_namespace() as outside, Server(web.path, 80, kind):
        cable(namespace, "198.51.100.1", outside, "198.51.100.2")
        assert ask(outside, "198.51.100.1", 8080, kind) == "198.51.100.2"  # source is kept
        assert ask(namespace, "127.0.0.1", 8080, kind) == gateway
        assert ask(namespace, "198.51.100.1", 8080, kind) != ""
        assert ask(neighbour.path, "198.51.100.1", 8080, kind) != ""
        assert ask(neighbour.path, gateway, 8080, kind) != ""
        assert ask(stranger.path, "198.51.100.1", 8080, kind) != ""
        assert ask(web.path, "198.51.100.1", 8080, kind) != ""  # itself
        web.stop()
        assert ask(outside, "198.51.100.1", 8080, kind, timeout=0.3) == ""


def test_loopback_only(host: NetworkHost, namespace: NetNamespace) -> None:
    web = host.start("web", ports=[port(80, 8080, host_ip="127.0.0.1")])
    stranger = host.start("stranger")
    with new_namespace() as outside, Server(web.path, 80):
        cable(namespace, "198.51.100.1", outside, "198.51.100.2")
        assert ask(namespace, "127.0.0.1", 8080) != ""
        assert ask(outside, "198.51.100.1", 8080, timeout=0.3) == ""
        assert ask(stranger.path, "172.17.0.1", 8080, timeout=0.3) == ""


def test_ipv6(host: NetworkHost, namespace: NetNamespace) -> None:
    host.manager.create(NetworkSpec(name="six", enable_ipv6=True))
    web = host.start("web", "six", ports=[port(80, 8080)])
    with new_namespace() as outside, Server(web.path, 80, address="::"):
        cable(namespace, "2001:db8::1", outside, "2001:db8::2", 64)
        # a link that has just come up loses its first neighbour solicitation
        assert ask(outside, "2001:db8::1", 8080, timeout=5) == "2001:db8::2"


def test_fixed_before_chosen(host: NetworkHost) -> None:
    low, _ = ephemeral_range()
    web = host.start("web", ports=[port(80), port(8080, low), port(81)])
    by_port = {b.container_port: b.host_port for b in web.bindings}
    assert by_port[8080] == low
    assert len(set(by_port.values())) == 3
    assert [b.container_port for b in web.bindings] == [80, 80, 8080, 8080, 81, 81]


def test_taken_by_another_container(host: NetworkHost, namespace: NetNamespace) -> None:
    first = host.start("first", ports=[port(80, 8080)])
    with pytest.raises(PortAllocated, match="port is already allocated"):
        host.start("second", ports=[port(80, 8081), port(80, 8080, host_ip="127.0.0.1")])
    for kind in ("", "127.0.0.1"):  # nothing half-open is left of the one that could start
        with socket.create_server((kind, 8081)):
            pass
    first.stop()
    second = host.start("second", ports=[port(80, 8080, host_ip="127.0.0.1")])
    with Server(second.path, 80):
        assert ask(namespace, "127.0.0.1", 8080) != ""


def test_taken_by_a_program(host: NetworkHost) -> None:
    with socket.create_server(("0.0.0.0", 8080)):
        with pytest.raises(PortAllocated):
            host.start("web", ports=[port(80, 8080)])
    host.start("web", ports=[port(80, 8080)])
    with pytest.raises(OSError):
        socket.create_server(("0.0.0.0", 8080))


def test_ranges(host: NetworkHost) -> None:
    wanted = port(80, 9000, host_port_end=9002)
    got = [host.start(f"web{n}", ports=[wanted]).bindings[0].host_port for n in range(3)]
    assert got == [9000, 9001, 9002]
    with pytest.raises(PortAllocated):
        host.start("web3", ports=[wanted])


def test_sctp_is_translated(host: NetworkHost) -> None:
    web = host.start("web", ports=[port(80, 9000, proto="sctp")])
    assert {(b.proto, b.host_port) for b in web.bindings} == {("sctp", 9000)}
    with pytest.raises(PortAllocated):
        host.start("other", ports=[port(80, 9000, proto="sctp")])


def test_internal_networks_publish_nothing(host: NetworkHost) -> None:
    host.manager.create(NetworkSpec(name="inner", internal=True))
    assert host.start("web", "inner", ports=[port(80, 8080)]).bindings == []


def test_follows_the_way_out(host: NetworkHost, namespace: NetNamespace) -> None:
    host.manager.create(NetworkSpec(name="z"))
    web = host.start("web", "z", ports=[port(80, 8080)])
    with Server(web.path, 80):
        host.manager.connect("bridge", web.id, EndpointRequest(network="bridge"))
        host.manager.disconnect("z", web.id)
        assert ask(namespace, "127.0.0.1", 8080) == "172.17.0.1"


def test_a_sender_that_never_pauses(host: NetworkHost, namespace: NetNamespace) -> None:
    with new_namespace() as outside:
        cable(namespace, "198.51.100.1", outside, "198.51.100.2")

        def open_() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.settimeout(1)
            made.connect(("198.51.100.1", 8080))
            return made

        def answered(sender: socket.socket) -> bool:
            try:
                sender.send(b"?")
                return sender.recv(100) == b"198.51.100.2"
            except OSError:
                return False

        with inside(outside, open_) as sender:
            assert not answered(sender)
            for name in ("first", "second"):
                web = host.start(name, ports=[port(80, 8080, proto="udp")])
                with Server(web.path, 80, "udp"):
                    assert answered(sender) or answered(sender)
                web.stop()


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_what_the_firewall_cannot_translate_is_carried(
    host: NetworkHost, namespace: NetNamespace, kind: str
) -> None:
    web = host.start("web", ports=[port(80, 8080, proto=kind)])
    with new_namespace() as outside, Server(web.path, 80, kind):
        cable(namespace, "2001:db8::1", outside, "2001:db8::2", 64)
        assert ask(namespace, "::1", 8080, kind) == "172.17.0.1"
        assert ask(outside, "2001:db8::1", 8080, kind, timeout=5) == "172.17.0.1"
        host.restart(web)
        assert ask(namespace, "::1", 8080, kind) == "172.17.0.1"
        web.stop()
        assert ask(namespace, "::1", 8080, kind, timeout=0.3) == ""

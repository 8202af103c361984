"""How a bridge network meets the outside: translated, unprotected, routed, isolated."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from tests.support.netns import Server, ask, cable, new_namespace
from tests.support.network_host import NetworkHost

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks.model import (
    OPTION_GATEWAY_MODES,
    NetworkSpec,
    Pool,
    PortRequest,
)
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.errors import InvalidArgument

POOLS = (Pool(subnet="203.0.113.0/24"), Pool(subnet="2001:db8:7::/64"))
UNREACHED = 0.3


def spec(four: str, six: str = "", **more: object) -> NetworkSpec:
    modes = {4: four, 6: six}
    options = {OPTION_GATEWAY_MODES[version]: mode for version, mode in modes.items() if mode}
    return NetworkSpec(name="net", options=options, pools=POOLS, enable_ipv6=True, **more)  # type: ignore[arg-type]


@pytest.fixture
def outside(host: NetworkHost, namespace: NetNamespace) -> Iterator[NetNamespace]:
    """Another host, with routes to containers through this one."""
    with new_namespace() as made:
        name = cable(namespace, "198.51.100.1", made, "198.51.100.2")
        with namespace.entered(), nl.Netlink() as netlink:
            index = socket.if_nametoindex(name)
            netlink.run([rt.address_add(index, "2001:db8:1::1", 64)])
        with made.entered(), nl.Netlink() as netlink:
            index = socket.if_nametoindex(name)
            netlink.run(
                [
                    rt.address_add(index, "2001:db8:1::2", 64),
                    rt.route_replace("198.51.100.1", family=socket.AF_INET, index=index),
                    rt.route_replace("2001:db8:1::1", family=socket.AF_INET6, index=index),
                ]
            )
        yield made


def test_routed(host: NetworkHost, outside: NetNamespace) -> None:
    host.manager.create(spec("routed", "routed"))
    ports = [PortRequest(container_port=80, host_port=each) for each in (8080, 8081)]
    web = host.start("web", "net", ports=ports)
    assert web.bindings == host.manager.published(web.id) == []
    with Server(web.path, 80), Server(web.path, 81), Server(outside, 90):
        assert ask(outside, web.ip, 80) == "198.51.100.2"
        assert ask(outside, web.ip, 81, timeout=UNREACHED) == ""
        assert ask(outside, "198.51.100.1", 8080, timeout=UNREACHED) == ""
        assert ask(web.path, "198.51.100.2", 90) == web.ip  # not masqueraded
        host.restart(web)
        assert ask(outside, web.ip, 80) == "198.51.100.2"
        host.manager.unpublish(web.id)
        assert ask(outside, web.ip, 80, timeout=UNREACHED) == ""
    with Server(web.path, 80, address="::"):
        host.manager.publish(web.id, ports)
        assert ask(outside, web.ipv6, 80, timeout=5) == "2001:db8:1::2"


def test_routed_for_one_version(host: NetworkHost, outside: NetNamespace) -> None:
    host.manager.create(spec("nat", "routed"))
    web = host.start("web", "net", ports=[PortRequest(container_port=80, host_port=8080)])
    assert [(b.host_ip, b.host_port) for b in web.bindings] == [("0.0.0.0", 8080)]
    with Server(web.path, 80):
        assert ask(outside, "198.51.100.1", 8080) == "198.51.100.2"
        assert ask(outside, web.ip, 80, timeout=UNREACHED) == ""
    with Server(web.path, 80, address="::"):
        assert ask(outside, web.ipv6, 80, timeout=5) == "2001:db8:1::2"


def test_unprotected(host: NetworkHost, outside: NetNamespace) -> None:
    host.manager.create(spec("nat-unprotected"))
    web = host.start("web", "net", ports=[PortRequest(container_port=80, host_port=8080)])
    with Server(web.path, 80), Server(web.path, 81), Server(outside, 90):
        assert ask(outside, web.ip, 81) == "198.51.100.2"
        assert ask(outside, "198.51.100.1", 8080) == "198.51.100.2"
        assert ask(web.path, "198.51.100.2", 90) == "198.51.100.1"  # masqueraded


def test_isolated(host: NetworkHost, namespace: NetNamespace) -> None:
    network = host.manager.create(spec("isolated", "isolated", internal=True))
    index = rt.link_index(host.manager.netlink, network.link)
    found = [address for _, address, _ in rt.addresses(host.manager.netlink, index)]
    assert all(address.startswith("fe80:") for address in found)
    one, two = host.start("one", "net"), host.start("two", "net")
    with Server(two.path, 80), Server(namespace, 80):
        assert ask(one.path, two.ip, 80) == one.ip
        assert ask(one.path, "203.0.113.1", 80, timeout=UNREACHED) == ""


@pytest.mark.parametrize("mode", ["isolated", "bridged"])
def test_refusals(host: NetworkHost, mode: str) -> None:
    with pytest.raises(InvalidArgument):
        host.manager.create(spec(mode))

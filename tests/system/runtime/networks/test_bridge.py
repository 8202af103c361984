"""Bridges: who reaches whom, addresses, connecting and leaving while running."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from tests.support.netns import Server, ask, cable, inside, new_namespace
from tests.support.network_host import NetworkHost

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks.model import (
    OPTION_BRIDGE_NAME,
    OPTION_ICC,
    OPTION_MTU,
    AddressConflict,
    EndpointExists,
    EndpointNotFound,
    EndpointRequest,
    NetworkExists,
    NetworkInUse,
    NetworkNotFound,
    NetworkSpec,
    Pool,
)
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.errors import Forbidden, InvalidArgument


def test_containers_of_one_network_reach_each_other(host: NetworkHost) -> None:
    one, other = host.start("one"), host.start("other")
    with Server(other.path, 80):
        assert ask(one.path, other.ip, 80) == one.ip


def test_networks_are_kept_apart(host: NetworkHost) -> None:
    host.manager.create(NetworkSpec(name="a"))
    host.manager.create(NetworkSpec(name="b"))
    one, other = host.start("one", "a"), host.start("other", "b")
    with Server(other.path, 80):
        assert ask(one.path, other.ip, 80, timeout=0.3) == ""
        host.manager.connect("b", one.id, EndpointRequest(network="b"))
        assert ask(one.path, other.ip, 80) != ""
        host.manager.disconnect("b", one.id)
        assert ask(one.path, other.ip, 80, timeout=0.3) == ""


def test_the_outside_sees_the_host(host: NetworkHost, namespace: NetNamespace) -> None:
    container = host.start("one")
    with new_namespace() as outside:
        cable(namespace, "198.51.100.1", outside, "198.51.100.2")
        with Server(outside, 80):
            assert ask(container.path, "198.51.100.2", 80) == "198.51.100.1"


def test_the_outside_does_not_reach_in(host: NetworkHost, namespace: NetNamespace) -> None:
    container = host.start("one")
    with new_namespace() as outside:
        name = cable(namespace, "198.51.100.1", outside, "198.51.100.2")
        with outside.entered(), nl.Netlink() as netlink:
            index = socket.if_nametoindex(name)
            netlink.run([rt.route_replace("198.51.100.1", family=socket.AF_INET, index=index)])
        with Server(container.path, 80):
            assert ask(outside, container.ip, 80, timeout=0.3) == ""


def test_internal_network_has_no_way_out(host: NetworkHost, namespace: NetNamespace) -> None:
    host.manager.create(NetworkSpec(name="inner", internal=True))
    one, other = host.start("one", "inner"), host.start("other", "inner")
    with new_namespace() as outside:
        cable(namespace, "198.51.100.1", outside, "198.51.100.2")
        with Server(outside, 80), Server(other.path, 80):
            assert ask(one.path, "198.51.100.2", 80, timeout=0.3) == ""
            assert ask(one.path, other.ip, 80) == one.ip


def test_ipv6(host: NetworkHost) -> None:
    network = host.manager.create(NetworkSpec(name="six", enable_ipv6=True))
    one, other = host.start("one", "six"), host.start("other", "six")
    assert one.ipv6 and network.spec.pools[1].subnet.endswith("::/64")
    with Server(other.path, 80, address="::"):
        assert ask(one.path, other.ipv6, 80) == one.ipv6


def test_ipv6_only_where_a_network_has_it(host: NetworkHost) -> None:
    container = host.start("one")
    with pytest.raises(OSError):
        inside(container.path, lambda: socket.create_connection(("fe80::1%eth0", 1), 0.1))


def test_inter_container_traffic_off(host: NetworkHost) -> None:
    host.manager.create(NetworkSpec(name="quiet", options={OPTION_ICC: "false"}))
    one, other = host.start("one", "quiet"), host.start("other", "quiet")
    gateway = host.manager.of_container(one.id)[0].gateway
    with Server(other.path, 80), Server(host.manager.host, 81):
        assert ask(one.path, other.ip, 80, timeout=0.3) == ""
        assert ask(one.path, gateway, 81) == one.ip


def test_several_networks_and_the_way_out(host: NetworkHost) -> None:
    host.manager.create(NetworkSpec(name="a"))
    host.manager.create(NetworkSpec(name="b"))
    container = host.start("one", "b", "a")
    first, second = host.manager.of_container(container.id)
    assert (first.interface, second.interface) == ("eth0", "eth1")

    def default() -> str:
        with nl.Netlink() as netlink:
            found = rt.routes(netlink, socket.AF_INET)
        return next(route.gateway for route in found if route.destination == "0.0.0.0/0")

    assert inside(container.path, default) == second.gateway
    host.manager.disconnect("a", container.id)
    assert inside(container.path, default) == first.gateway
    host.manager.connect("a", container.id, EndpointRequest(network="a", gateway_priority=-1))
    assert inside(container.path, default) == first.gateway


def test_static_addresses(host: NetworkHost) -> None:
    pools = (Pool(subnet="10.77.0.0/24"), Pool(subnet="fd77::/64"))
    host.manager.create(NetworkSpec(name="a", enable_ipv6=True, pools=pools))
    wanted = EndpointRequest(
        network="a", ipv4="10.77.0.50", ipv6="fd77::50", mac="02:11:22:33:44:55"
    )
    container = host.start("one", wanted)
    endpoint = host.manager.of_container(container.id)[0]
    assert (endpoint.ip, endpoint.ipv6, endpoint.mac) == (
        "10.77.0.50",
        "fd77::50",
        "02:11:22:33:44:55",
    )
    with pytest.raises(AddressConflict):
        host.start("two", wanted)
    with pytest.raises(InvalidArgument):
        host.start("two", EndpointRequest(network="a", ipv4="10.78.0.1"))
    container.stop()
    host.start("three", wanted)


def test_pools(host: NetworkHost, namespace: NetNamespace) -> None:
    pool = Pool(subnet="10.77.0.0/24", ip_range="10.77.0.128/29", aux={"x": "10.77.0.129"})
    network = host.manager.create(NetworkSpec(name="a", pools=(pool,)))
    assert network.spec.pools[0].gateway == "10.77.0.128"
    assert host.start("one", "a").ip == "10.77.0.130"
    with pytest.raises(AddressConflict):
        host.manager.create(NetworkSpec(name="b", pools=(Pool(subnet="10.77.0.0/16"),)))
    with pytest.raises(InvalidArgument):
        host.manager.create(NetworkSpec(name="b", pools=(Pool(subnet="10.78.0.1/16"),)))
    with new_namespace() as outside:
        cable(namespace, "172.18.3.1", outside, "172.18.3.2")
        chosen = host.manager.create(NetworkSpec(name="c"))
        assert chosen.spec.pools[0].subnet == "172.19.0.0/16"


def test_names_of_networks(host: NetworkHost) -> None:
    network = host.manager.create(NetworkSpec(name="my net"))
    assert host.manager.inspect(network.id[:10]) == network
    assert host.manager.inspect("my net") == network
    with pytest.raises(NetworkExists):
        host.manager.create(NetworkSpec(name="my net"))
    with pytest.raises(InvalidArgument):
        host.manager.create(NetworkSpec(name="-x"))
    with pytest.raises(Forbidden):
        host.manager.create(NetworkSpec(name="host"))
    host.manager.remove("my net")
    with pytest.raises(NetworkNotFound):
        host.manager.inspect("my net")


def test_networks_in_use_stay(host: NetworkHost) -> None:
    host.manager.create(NetworkSpec(name="a"))
    container = host.start("one", "a")
    with pytest.raises(NetworkInUse):
        host.manager.remove("a")
    with pytest.raises(NetworkInUse):
        host.manager.remove("bridge")
    with pytest.raises(EndpointExists):
        host.manager.connect("a", container.id, EndpointRequest(network="a"))
    with pytest.raises(EndpointNotFound):
        host.manager.disconnect("bridge", container.id)
    everything = {network.id for network in host.manager.networks()}
    assert host.manager.prune(everything) == []
    container.stop()
    assert host.manager.prune(everything) == ["a"]


def test_mtu(host: NetworkHost) -> None:
    host.manager.create(NetworkSpec(name="a", options={OPTION_MTU: "1380"}))
    container = host.start("one", "a")
    with NetNamespace.at(container.path) as sandbox, sandbox.entered(), nl.Netlink() as netlink:
        assert {link.name: link.mtu for link in rt.links(netlink)}["eth0"] == 1380
    with pytest.raises(InvalidArgument):
        host.manager.create(NetworkSpec(name="b", options={OPTION_MTU: "many"}))


def test_a_bridge_of_the_operator_is_kept(host: NetworkHost) -> None:
    kind = {"attrs": [("IFLA_INFO_KIND", "bridge")]}
    made = [("IFLA_IFNAME", "lan0"), ("IFLA_LINKINFO", kind)]
    host.manager.netlink.run([rt.link_new("make lan0", made)])
    index = rt.link_index(host.manager.netlink, "lan0")
    host.manager.netlink.run([rt.address_add(index, "10.55.0.1", 24)])
    options = {OPTION_BRIDGE_NAME: "lan0"}
    host.manager.create(NetworkSpec(name="lan", options=options))
    one, other = host.start("one", "lan"), host.start("other", "lan")
    with Server(other.path, 80):
        assert ask(one.path, other.ip, 80) == one.ip
    one.stop()
    other.stop()
    host.manager.remove("lan")
    kept = [address for _, address, _ in rt.addresses(host.manager.netlink, index)]
    assert [address for address in kept if ":" not in address] == ["10.55.0.1"]
    with pytest.raises(InvalidArgument):
        host.manager.create(NetworkSpec(name="lan", options={OPTION_BRIDGE_NAME: "lo"}))


def test_a_failed_attach_leaves_nothing(host: NetworkHost) -> None:
    host.manager.create(NetworkSpec(name="a"))
    before = {link.name for link in rt.links(host.manager.netlink)}
    with pytest.raises(NetworkNotFound):
        host.start("one", "a", "nowhere")
    assert host.manager.endpoints("a") == []
    assert {link.name for link in rt.links(host.manager.netlink)} == before
    assert list((host.folder / "exec" / "netns").iterdir()) == []


def test_what_is_told(host: NetworkHost) -> None:
    network = host.manager.create(NetworkSpec(name="a"))
    container = host.start("one", "a")
    container.stop()
    host.manager.remove("a")
    told = [(e.action, e.attributes) for e in host.events() if e.id == network.id]
    kind = {"name": "a", "type": "bridge"}
    assert told == [
        ("create", kind),
        ("connect", kind | {"container": container.id}),
        ("disconnect", kind | {"container": container.id}),
        ("destroy", kind),
    ]


def test_two_daemons_side_by_side(host: NetworkHost, tmp_path: Path) -> None:
    second = NetworkHost(tmp_path / "second", bridge="lazt1")
    try:
        subnets = [h.manager.inspect("bridge").spec.pools[0].subnet for h in (host, second)]
        assert subnets == ["172.17.0.0/16", "172.18.0.0/16"]
        one, other = host.start("one"), second.start("other")
        with Server(other.path, 80):
            assert ask(one.path, other.ip, 80, timeout=0.3) == ""
    finally:
        second.close()

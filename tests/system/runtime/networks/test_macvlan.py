"""Networks on an interface of the host."""

from __future__ import annotations

import pytest
from tests.support.netns import Server, ask, cable, new_namespace
from tests.support.network_host import NetworkHost

from lazarette.runtime.networks.macvlan import supported
from lazarette.runtime.networks.model import NetworkSpec, Pool, PortRequest
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.errors import InvalidArgument, MissingFeature


@pytest.mark.parametrize("kind", ["macvlan", "ipvlan"])
def test_neighbours_of_the_host(host: NetworkHost, namespace: NetNamespace, kind: str) -> None:
    with new_namespace() as outside:
        name = cable(namespace, "198.51.100.1", outside, "198.51.100.2")
        pools = (
            Pool(subnet="198.51.100.0/24", gateway="198.51.100.2", ip_range="198.51.100.64/28"),
        )
        host.manager.create(
            NetworkSpec(name="lan", driver=kind, pools=pools, options={"parent": name})
        )
        if not supported(kind):
            with pytest.raises(MissingFeature):
                host.start("one", "lan")
            return
        one, two = host.start("one", "lan"), host.start("two", "lan")
        with Server(outside, 80), Server(two.path, 80):
            assert ask(one.path, "198.51.100.2", 80) == one.ip == "198.51.100.64"
            assert ask(outside, two.ip, 80) == "198.51.100.2"
            assert ask(one.path, two.ip, 80) == one.ip
            host.manager.disconnect("lan", two.id)
            assert ask(outside, "198.51.100.65", 80, timeout=0.3) == ""


def test_without_parent_it_is_closed(host: NetworkHost) -> None:
    host.manager.create(NetworkSpec(name="lan", driver="macvlan"))
    one, two = host.start("one", "lan"), host.start("two", "lan")
    with Server(two.path, 80):
        assert ask(one.path, two.ip, 80) == one.ip
    ports = [PortRequest(container_port=80, host_port=8080)]
    assert host.start("three", "lan", ports=ports).bindings == []


def test_options(host: NetworkHost) -> None:
    with pytest.raises(InvalidArgument):
        host.manager.create(
            NetworkSpec(name="lan", driver="macvlan", options={"parent": "nowhere"})
        )
    with pytest.raises(InvalidArgument):
        host.manager.create(
            NetworkSpec(name="lan", driver="macvlan", options={"macvlan_mode": "x"})
        )

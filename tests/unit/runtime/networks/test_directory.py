from __future__ import annotations

import pytest

from lazarette.runtime.networks.directory import Directory, Entry, Found, reverse_address
from lazarette.runtime.networks.model import Endpoint, EndpointRequest


def endpoint(container: str, network: str, ip: str, *names: str, **request: object) -> Endpoint:
    return Endpoint(
        id=f"{container}-{network}",
        container=container,
        network=network,
        network_name=network.upper(),
        interface="eth0",
        ip=ip,
        dns_names=names,
        request=EndpointRequest(network=network, **request),  # type: ignore[arg-type]
    )


def test_only_members_know() -> None:
    names = Directory()
    names.add(endpoint("a", "one", "10.0.0.2", "a"))
    names.add(endpoint("b", "two", "10.0.1.2", "b"))
    assert names.lookup("a", "A") == Found(("10.0.0.2",), ())
    assert names.lookup("a", "a.one") == Found(("10.0.0.2",), ())
    assert names.lookup("a", "b") is None
    assert names.lookup("a", "b.two") is None
    assert names.lookup("stranger", "a") is None
    assert names.reverse("a", "10.0.0.2") == "a.one"
    assert names.reverse("b", "10.0.0.2") is None


def test_the_first_network_wins() -> None:
    names = Directory()
    names.add(endpoint("a", "one", "10.0.0.2", "a"))
    names.add(endpoint("a", "two", "10.0.1.2", "a"))
    names.add(endpoint("x", "two", "10.0.1.3", "db"))
    names.add(endpoint("y", "one", "10.0.0.3", "db"))
    assert names.lookup("a", "db") == Found(("10.0.0.3",), ())
    assert names.lookup("a", "db.two") == Found(("10.0.1.3",), ())


def test_turns() -> None:
    names = Directory()
    names.add(endpoint("a", "one", "10.0.0.2", "a", "db"))
    names.add(endpoint("b", "one", "10.0.0.3", "b", "db"))
    names.publish("one", "one", Entry("far", "c", ("c", "db"), "10.0.0.4", ""))
    seen = [found.ipv4 for _ in range(3) if (found := names.lookup("a", "db"))]
    assert len(set(seen)) == 3 and {address for order in seen for address in order} == {
        "10.0.0.2",
        "10.0.0.3",
        "10.0.0.4",
    }
    names.withdraw("one", "far")
    names.remove(endpoint("b", "one", "10.0.0.3", "b", "db"))
    assert names.lookup("a", "db") == Found(("10.0.0.2",), ())


def test_links_are_ones_own() -> None:
    names = Directory()
    names.add(endpoint("a", "one", "10.0.0.2", "a", links=("b:mine",)))
    names.add(endpoint("b", "one", "10.0.0.3", "b"))
    assert names.lookup("a", "mine") == Found(("10.0.0.3",), ())
    assert names.lookup("b", "mine") is None


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("4.3.2.1.in-addr.arpa", "1.2.3.4"),
        (f"{'0.' * 31}f.ip6.arpa", "f000::"),
        ("3.2.1.in-addr.arpa", None),
        ("x.3.2.1.in-addr.arpa", None),
        ("example.com", None),
    ],
)
def test_reverse_names(name: str, address: str | None) -> None:
    assert reverse_address(name) == address

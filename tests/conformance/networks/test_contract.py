"""What every network driver keeps, by the numbers of its contract."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from tests.support.etcd import Etcd
from tests.support.netns import Server, ask, new_namespace, own_namespace

from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks.bridge import BridgeDriver
from lazarette.runtime.networks.catalogue import Catalogue
from lazarette.runtime.networks.cluster import Cluster
from lazarette.runtime.networks.contract import NetworkDriver, SharedNetworkDriver
from lazarette.runtime.networks.etcd import ClusterConfig
from lazarette.runtime.networks.macvlan import ParentDriver, supported
from lazarette.runtime.networks.model import Endpoint, EndpointRequest, Network, NetworkSpec
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.overlay import OverlayDriver
from lazarette.runtime.networks.records import NetworkRecords
from lazarette.storage.clock import SystemClock
from lazarette.storage.errors import LazaretteError
from lazarette.storage.state import State

DRIVERS = ["bridge", "macvlan", "overlay"]
if os.geteuid() == 0 and supported("ipvlan"):  # its absence is tested where containers join
    DRIVERS.append("ipvlan")


class Subject:
    """A driver with a network of it."""

    def __init__(self, driver: NetworkDriver, netlink: nl.Netlink, folder: Path) -> None:
        self.driver = driver
        self.netlink = netlink
        self.state = State(folder / "state.db")
        catalogue = Catalogue(
            NetworkRecords(self.state),
            {driver.name: driver},
            netlink,
            SystemClock(),
            threading.RLock(),
        )
        self.before = self.links()
        self.network: Network = catalogue.add(NetworkSpec(name="net", driver=driver.name))
        self.catalogue = catalogue

    def links(self) -> set[str]:
        return {link.name for link in rt.links(self.netlink)}

    def endpoint(self, number: int, **changes: object) -> Endpoint:
        four, _ = self.catalogue.take(self.network, EndpointRequest(network="net"))
        made = Endpoint(
            id=f"{number:064x}",
            container=f"{number:064x}",
            network=self.network.id,
            network_name="net",
            interface="eth0",
            host_interface=f"lztest{number}",
            ip=four[0],
            prefix=four[1],
            gateway=four[2],
            mac=f"02:00:00:00:00:{number:02x}",
            request=EndpointRequest(network="net", name=f"c{number}"),
        )
        return msgspec.structs.replace(made, **changes)


@pytest.fixture(params=DRIVERS)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    kind: str = request.param
    with ExitStack() as stack:
        host = stack.enter_context(own_namespace())
        netlink = stack.enter_context(nl.Netlink())
        makers: dict[str, Callable[[], NetworkDriver]] = {
            "bridge": lambda: BridgeDriver(host, netlink),
            "macvlan": lambda: ParentDriver("macvlan", host, netlink),
            "ipvlan": lambda: ParentDriver("ipvlan", host, netlink),
            "overlay": lambda: _overlay(stack, host, netlink, tmp_path),
        }
        made = Subject(makers[kind](), netlink, tmp_path)
        stack.callback(made.state.close)
        yield made


def _overlay(
    stack: ExitStack, host: NetNamespace, netlink: nl.Netlink, folder: Path
) -> NetworkDriver:
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed")
    etcd = stack.enter_context(Etcd(folder / "etcd", host, "127.0.0.1"))
    driver = OverlayDriver(host, netlink, "wg-test")
    config = ClusterConfig((etcd.url,), "127.0.0.1")
    driver.cluster = Cluster(config, "here", host, lambda view: None, lambda record: None)
    driver.cluster.start([])
    stack.callback(driver.cluster.close)
    return driver


def test_1_make_again_changes_nothing(subject: Subject) -> None:
    subject.driver.make(subject.network)
    made = subject.links()
    with new_namespace() as sandbox:
        subject.driver.join(subject.network, subject.endpoint(1), sandbox)
        running = subject.links()
        subject.driver.make(subject.network)
        assert subject.links() == running >= made


def test_2_join_makes_a_working_interface(subject: Subject) -> None:
    subject.driver.make(subject.network)
    with new_namespace() as one, new_namespace() as other:
        first, second = subject.endpoint(1), subject.endpoint(2)
        subject.driver.join(subject.network, first, one)
        subject.driver.join(subject.network, second, other)
        with Server(other, 80):
            assert ask(one, second.ip, 80) == first.ip


def test_2_a_failed_join_leaves_nothing(subject: Subject) -> None:
    subject.driver.make(subject.network)
    before = subject.links()
    with new_namespace() as sandbox:
        broken = subject.endpoint(1, ip="999.0.0.1")
        with pytest.raises((LazaretteError, OSError)):
            subject.driver.join(subject.network, broken, sandbox)
        with sandbox.entered(), nl.Netlink() as inside:
            assert {link.name for link in rt.links(inside)} == {"lo"}
    assert subject.links() == before


def test_3_leave_twice(subject: Subject) -> None:
    subject.driver.make(subject.network)
    before = subject.links()
    endpoint = subject.endpoint(1)
    with new_namespace() as sandbox:
        subject.driver.join(subject.network, endpoint, sandbox)
        subject.driver.leave(subject.network, endpoint, sandbox)
        subject.driver.leave(subject.network, endpoint, sandbox)
        subject.driver.leave(subject.network, endpoint, None)
        with sandbox.entered(), nl.Netlink() as inside:
            assert {link.name for link in rt.links(inside)} == {"lo"}
    assert subject.links() == before


def test_4_unmake_twice(subject: Subject) -> None:
    subject.driver.make(subject.network)
    assert subject.links() > subject.before
    for _ in range(2):
        subject.driver.unmake(subject.network)
        assert subject.links() == subject.before


def test_shared_networks_are_known_until_retired(subject: Subject) -> None:
    if not isinstance(subject.driver, SharedNetworkDriver):
        assert subject.driver.capabilities.scope == "local"
        return
    driver, network = subject.driver, subject.network
    assert driver.capabilities.scope == "global"
    assert driver.claim(network, "10.9.9.9") and driver.claim(network, "10.9.9.9")
    driver.release(network, "10.9.9.9")
    assert driver.users(network) == []
    driver.retire(network)
    assert driver.complete(network).name == network.name

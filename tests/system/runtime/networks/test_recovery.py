"""What a restart, a crash, a boot or a flush of the rules leaves: what should be there."""

from __future__ import annotations

import json
import socket

from tests.support.netns import Server, ask
from tests.support.network_host import NetworkHost
from tests.support.waiting import until

from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks.model import EndpointRequest, NetworkSpec, PortRequest
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.process import run


def test_a_restart_changes_nothing(host: NetworkHost, namespace: NetNamespace) -> None:
    host.manager.create(NetworkSpec(name="a", enable_ipv6=True))
    ports = [PortRequest(container_port=80, host_port=8080)]
    web = host.start("web", EndpointRequest(network="a", aliases=("www",)), ports=ports)
    gone = host.start("gone", "a")
    before = host.manager.of_container(web.id)
    with Server(web.path, 80):
        host.restart(web)
        assert host.manager.of_container(web.id) == before
        assert list(host.manager.published(web.id)) == list(web.bindings)
        assert ask(namespace, "127.0.0.1", 8080) != ""
        assert host.manager.of_container(gone.id) == []
        assert [path.name for path in web.path.parent.iterdir()] == [web.id]
        other = host.start("other", "a")
        assert other.ip not in {endpoint.ip for endpoint in before}
        web.stop()
        assert ask(namespace, "127.0.0.1", 8080, timeout=0.3) == ""


def test_a_restart_sweeps_links_of_nobody(host: NetworkHost) -> None:
    container = host.start("one")
    endpoint = host.manager.of_container(container.id)[0]
    host.restart()
    names = {link.name for link in rt.links(host.manager.netlink)}
    assert endpoint.host_interface not in names


def test_a_boot_voids_the_records(host: NetworkHost) -> None:
    container = host.start("one")
    host.manager.live.expire("another boot")
    host.restart(container)
    assert host.manager.of_container(container.id) == []
    assert host.start("two").ip == "172.17.0.2"


def test_a_lost_bridge_is_made_again(host: NetworkHost) -> None:
    host.manager.create(NetworkSpec(name="a"))
    link = host.manager.inspect("a").link
    host.manager.netlink.run([rt.link_delete(link)])
    host.restart()
    assert host.start("one", "a").ip == "172.18.0.2"


def test_other_tables_are_left_alone(host: NetworkHost) -> None:
    run(["nft", "add", "table", "ip", "others"])
    host.manager.create(NetworkSpec(name="a"))
    host.restart()
    tables = json.loads(run(["nft", "-j", "list", "tables"]).stdout)["nftables"]
    assert {"others", "lazarette-lazt0"} <= {t["table"]["name"] for t in tables if "table" in t}


def test_firewalls_in_the_way_are_told(host: NetworkHost) -> None:
    """As dockerd and ufw leave them (policy), and firewalld (a last rule)."""
    assert host.manager.warnings() == []
    for table, chain, settings in (
        ("ip filter", "FORWARD", "hook forward priority 0; policy drop"),
        ("ip6 filter", "FORWARD", "hook forward priority 0; policy drop"),
        ("inet firewalld", "filter_FORWARD", "hook forward priority 10"),
        ("inet fine", "forward", "hook forward priority 0; policy accept"),
        ("inet other", "input", "hook input priority 0; policy drop"),
    ):
        rules = f"add table {table}\nadd chain {table} {chain} {{ type filter {settings}; }}\n"
        run(["nft", "-f", "-"], stdin=rules.encode())
    told = host.manager.warnings()
    assert len(told) == 2, told
    assert "ip filter FORWARD" in told[0]
    assert "inet firewalld filter_FORWARD" in told[1]
    host.manager.create(NetworkSpec(name="six", enable_ipv6=True))
    assert any("ip6 filter FORWARD" in each for each in host.manager.warnings())


def test_flushed_rules_come_back(host: NetworkHost, namespace: NetNamespace) -> None:
    host.manager.create(NetworkSpec(name="a"))
    web = host.start("web", ports=[PortRequest(container_port=80, host_port=8080)])
    before = rules()
    with Server(web.path, 80):
        for damage in (
            ["flush", "ruleset"],
            ["flush", "chain", "inet", "lazarette-lazt0", "forward"],
            ["delete", "table", "inet", "lazarette-lazt0"],
        ):
            run(["nft", *damage])
            until(lambda: rules() == before)
        assert ask(namespace, "127.0.0.1", 8080) == "172.17.0.1"


def rules() -> list[str]:
    """The rules of the host, sets in no order."""
    return sorted(run(["nft", "list", "ruleset"]).stdout.decode().split())


def test_the_socket_survives_nothing_else_does(host: NetworkHost) -> None:
    """Ports are free for others once the daemon and the container are gone."""
    web = host.start("web", ports=[PortRequest(container_port=80, host_port=8080)])
    host.restart()
    assert host.manager.of_container(web.id) == []
    with socket.create_server(("0.0.0.0", 8080)):
        pass

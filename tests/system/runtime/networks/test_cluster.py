"""Four whole daemons, each on a host of its own, with a real etcd between them.

A PostgreSQL runs on one host and is asked by name from another while links lose packets,
hosts are cut off, daemons and etcd are killed, and all of it heals.  Every wait has a minute;
with ``LAZARETTE_STRICT`` set, the ten seconds that names, addresses and traffic may take.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.postgres import IMAGE, archive
from tests.support.site import HostDaemon, Site
from tests.support.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cluster")]

NUMBERS = (2, 3, 4, 5)
PATIENCE = 10.0 if os.environ.get("LAZARETTE_STRICT") else 60.0
SERVE = 'echo "$0" > /index.html; trap exit TERM; httpd -f -p 80 -h / & wait'


class Cluster(Site):
    """A site whose hosts run ``lazd``."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__(folder, stack)
        self.daemons: dict[int, Daemon] = {}
        for number in NUMBERS:
            joined = ("--etcd", self.etcd.url, "--advertise-address", f"192.0.2.{number}")
            where = self.plug(number)
            made = HostDaemon(folder / f"host{number}", arguments=joined, where=where)
            stack.callback(made.end)
            self.daemons[number] = made
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._start, NUMBERS))

    def _start(self, number: int) -> None:
        self.daemons[number].start()
        self.daemons[number].laz("load", "-q", "-i", str(busybox_archive()))

    def serve(self, number: int, name: str) -> str:
        """A container that serves its own name by HTTP; its address."""
        daemon = self.daemons[number]
        daemon.docker(
            "run", "-d", "--name", name, "--network", "over", "busybox", "sh", "-c", SERVE, name
        )
        return self.address(number, name)

    def address(self, number: int, name: str) -> str:
        """A container's address in the network."""
        shown = "{{.NetworkSettings.Networks.over.IPAddress}}"
        return self.daemons[number].docker("inspect", "-f", shown, name).stdout.decode().strip()

    def asks(self, number: int, one: str, other: str) -> str:
        """What a container on a host gets from another one, by its name."""
        ask = ("timeout", "3", "wget", "-q", "-O", "-", f"http://{other}/")
        done = self.daemons[number].docker("exec", one, *ask, check=False)
        return done.stdout.decode().strip()

    def knows(self, number: int, one: str, other: str) -> bool:
        """Whether a name is answered at all."""
        daemon = self.daemons[number]
        asked = daemon.docker("exec", one, "nslookup", other, "127.0.0.11", check=False)
        return asked.returncode == 0

    def soon(self, number: int, one: str, other: str) -> None:
        """They reach one another by name in time."""
        took = until(
            lambda: self.asks(number, one, other) == other,
            f"{one} on host {number} does not reach {other}",
            PATIENCE,
        )
        print(f"{one} reached {other} after {took:.1f} s")

    def shown(self, number: int) -> dict[str, Any]:
        """The network as one host shows it."""
        (network,) = json.loads(self.daemons[number].docker("network", "inspect", "over").stdout)
        assert isinstance(network, dict)
        return network

    def members(self, number: int) -> dict[str, str]:
        """Address by name of a network's endpoints, on all hosts, as one host shows them."""
        network = self.shown(number)
        return {
            member["Name"]: member["IPv4Address"].partition("/")[0]
            for member in network["Containers"].values()
        }


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed")
    with ExitStack() as stack:
        yield Cluster(tmp_path, stack)


def test_what_fails_heals(cluster: Cluster) -> None:
    daemons = cluster.daemons
    daemons[2].docker("network", "create", "-d", "overlay", "--attachable", "over")
    for number in NUMBERS[1:]:
        until(lambda n=number: "over" in _networks(daemons[n]), seconds=PATIENCE)
    mine = {number: cluster.serve(number, f"web{number}") for number in NUMBERS}
    assert len(set(mine.values())) == len(NUMBERS)
    for number in NUMBERS:
        for other in NUMBERS:
            cluster.soon(number, f"web{number}", f"web{other}")
    expected = {f"web{number}": mine[number] for number in NUMBERS}
    for number in NUMBERS:
        until(lambda n=number: cluster.members(n) == expected, seconds=PATIENCE)
        peers = {peer["IP"] for peer in cluster.shown(number)["Peers"]}
        assert peers == {f"192.0.2.{other}" for other in NUMBERS if other != number}

    # a link that loses a fifth of all packets, both ways
    cluster.lose(5, 20)
    mine[6] = cluster.serve(5, "lossy")
    cluster.soon(2, "web2", "lossy")
    cluster.soon(5, "lossy", "web3")
    cluster.lose(5, 0)

    # a link that carries nothing: the host's names go, its own traffic goes on
    cluster.lose(4, 100)
    until(lambda: not cluster.knows(2, "web2", "web4"), seconds=PATIENCE)
    mine[7] = cluster.serve(3, "meanwhile")
    daemons[4].docker(
        "run", "-d", "--name", "alone", "--network", "bridge", "busybox", "sh", "-c", SERVE, "alone"
    )
    assert cluster.asks(4, "web4", "web4") == "web4"
    refused = daemons[4].docker("run", "--network", "over", "busybox", "true", check=False)
    assert refused.returncode != 0
    cluster.lose(4, 0)
    cluster.soon(2, "web2", "web4")
    cluster.soon(4, "web4", "meanwhile")
    assert cluster.address(4, "web4") == mine[4]

    # a daemon that is killed: its containers are reached all the while, and after
    daemons[3].kill()
    assert cluster.asks(2, "web2", "web3") == "web3"
    daemons[3].start()
    mine[8] = cluster.serve(3, "again")
    cluster.soon(4, "web4", "again")
    cluster.soon(3, "again", "web2")
    assert cluster.address(3, "web3") == mine[3]

    # etcd is killed: what was known goes on
    cluster.etcd.kill()
    assert cluster.asks(5, "web5", "web2") == "web2"
    cluster.etcd.start()
    until(lambda: _starts(cluster, 4, "late"), seconds=PATIENCE)
    mine[9] = cluster.address(4, "late")
    cluster.soon(2, "web2", "late")
    assert len(set(mine.values())) == len(mine), "an address was given twice"


def _networks(daemon: Daemon) -> list[str]:
    return daemon.docker("network", "ls", "--format", "{{.Name}}").stdout.decode().split()


def _starts(cluster: Cluster, number: int, name: str) -> bool:
    daemon = cluster.daemons[number]
    daemon.docker("rm", "-f", name, check=False)
    try:
        cluster.serve(number, name)
    except AssertionError:
        return False
    return True


def test_a_database_and_its_client(cluster: Cluster) -> None:
    first, second = cluster.daemons[2], cluster.daemons[3]
    for daemon in (first, second):
        daemon.laz("load", "-q", "-i", str(archive()))
    first.docker("network", "create", "-d", "overlay", "--attachable", "over")
    until(lambda: "over" in _networks(second), seconds=PATIENCE)
    environment = ("-e", "POSTGRES_PASSWORD=secret", "-e", "PGPASSWORD=secret")
    place = ("--network", "over", *environment)
    first.docker("run", "-d", "--name", "db", *place, IMAGE)
    second.docker("run", "-d", "--name", "client", *place, "--entrypoint", "sleep", IMAGE, "600")

    def asks(statement: str) -> str:
        psql = ("psql", "-h", "db", "-U", "postgres", "-tAc", statement)
        return second.docker("exec", "client", *psql, check=False).stdout.decode().strip()

    until(lambda: asks("select 1") == "1", seconds=90)
    asks("create table t as select generate_series(1, 1000) as n")
    assert asks("select count(*) from t") == "1000"
    first.kill()
    assert asks("select sum(n) from t") == "500500"
    first.start()
    cluster.etcd.kill()
    assert asks("select count(*) from t") == "1000"
    cluster.etcd.start()
    cluster.lose(2, 100)
    cluster.lose(2, 0)
    until(lambda: asks("select count(*) from t") == "1000", seconds=PATIENCE)

"""Many containers at once, come and gone: nothing may be left of them.

``LAZARETTE_NETWORK_CONTAINERS`` scales it (the stated target is 200).
"""

from __future__ import annotations

import gc
import json
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tests.support.network_host import Container, NetworkHost

from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks.model import (
    EndpointRequest,
    NetworkSpec,
    PortAllocated,
    PortRequest,
)
from lazarette.storage.process import run

COUNT = int(os.environ.get("LAZARETTE_NETWORK_CONTAINERS", "40"))


def traces(host: NetworkHost) -> dict[str, object]:
    """Everything containers could leave behind."""
    ruleset = json.loads(run(["nft", "-j", "list", "ruleset"]).stdout)["nftables"]
    elements = {
        item["map"]["name"]: len(item["map"].get("elem", [])) for item in ruleset if "map" in item
    }
    exec_root = host.folder / "exec" / "netns"
    return {
        "links": {link.name for link in rt.links(host.manager.netlink)},
        "rules": sum(1 for item in ruleset if "rule" in item),
        "elements": elements,
        "namespaces": list(exec_root.iterdir()),
        "mounts": Path("/proc/self/mountinfo").read_text().count(str(exec_root)),
        "endpoints": len(host.manager.live.endpoints()),
        "ports": len(host.manager.live.ports()),
        "descriptors": descriptors(),
    }


def descriptors() -> Counter[str]:
    """What this process has open, by kind, so that a failure says what is left."""
    gc.collect()  # tests before may have left sockets in circles
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the list itself
            found[re.sub(r"\d+", "#", os.readlink(f"/proc/self/fd/{name}"))] += 1
    return found


def test_many_at_once_leave_nothing(host: NetworkHost) -> None:
    host.manager.create(NetworkSpec(name="many"))

    def start(number: int) -> Container:
        request = EndpointRequest(network="many", name=f"c{number}", aliases=("all",))
        return host.start(f"c{number}", request, ports=[PortRequest(container_port=80)])

    warm = start(COUNT)
    warm.stop()
    host.manager.settle()
    before = traces(host)
    with ThreadPoolExecutor(16) as pool:
        began = time.perf_counter()
        containers = list(pool.map(start, range(COUNT)))
        started = time.perf_counter() - began
        ips = {container.ip for container in containers}
        ports = {binding.host_port for each in containers for binding in each.bindings}
        began = time.perf_counter()
        list(pool.map(Container.stop, containers))
        stopped = time.perf_counter() - began
    assert len(ips) == len(ports) == COUNT
    host.manager.settle()
    assert traces(host) == before
    host.manager.remove("many")
    print(f"{COUNT} started in {started:.2f} s, stopped in {stopped:.2f} s")


def test_failures_leave_nothing(host: NetworkHost) -> None:
    holder = host.start("holder", ports=[PortRequest(container_port=80, host_port=8080)])
    before = traces(host)

    def fail(number: int) -> bool:
        try:
            host.start(f"c{number}", ports=[PortRequest(container_port=80, host_port=8080)])
        except PortAllocated as error:
            return "port is already allocated" in str(error)
        return False

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fail, range(COUNT // 2)))
    host.manager.settle()
    assert traces(host) == before
    holder.stop()

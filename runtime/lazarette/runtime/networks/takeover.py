"""At the daemon's start: what an earlier one left is taken over or removed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from lazarette.runtime.networks import namespaces
from lazarette.runtime.networks import netlink as nl
from lazarette.runtime.networks import rtnetlink as rt
from lazarette.runtime.networks.catalogue import Catalogue
from lazarette.runtime.networks.naming import Naming
from lazarette.runtime.networks.publishing import Publisher
from lazarette.runtime.networks.records import LiveRecords
from lazarette.runtime.networks.sandbox import Sandbox


def take_over(
    folder: Path,
    active: Collection[str],
    catalogue: Catalogue,
    live: LiveRecords,
    naming: Naming,
    publisher: Publisher,
) -> dict[str, Sandbox]:
    """The sandboxes of containers that still run, with endpoints, names and ports.

    Args:
        folder: where namespaces are bound.
        active: ids of containers that run; what others had is removed and forgotten.
        catalogue: of networks, told of addresses in use.
        live: what is recorded of endpoints, resolvers and ports.
        naming: answers for the endpoints again.
        publisher: holds the ports again.
    """
    sandboxes: dict[str, Sandbox] = {}
    for file in folder.iterdir():
        if file.name in active and namespaces.is_bound(file):
            sandboxes[file.name] = Sandbox(file.name, file)
        else:
            namespaces.remove(file)
    for endpoint in live.endpoints():
        sandbox = sandboxes.get(endpoint.container)
        if sandbox is None or catalogue.get(endpoint.network) is None:
            live.forget_container(endpoint.container)
            continue
        sandbox.endpoints[endpoint.network] = endpoint
        catalogue.note(endpoint)
        naming.add(endpoint)
    dns, ports = live.dns(), live.ports()
    for container, sandbox in sandboxes.items():
        sandbox.dns = tuple(dns.get(container, ()))
        naming.serve(sandbox, again=True)
        publisher.recover(sandbox, ports.get(container, []))
    for container in ports.keys() - sandboxes.keys():
        live.forget_container(container)
    return sandboxes


def sweep(netlink: nl.Netlink, prefix: str, sandboxes: Mapping[str, Sandbox]) -> None:
    """Remove the host's links of ours that no endpoint has.

    Args:
        netlink: a socket of the host.
        prefix: how our links begin.
        sandboxes: whose endpoints keep theirs.
    """
    wanted = {
        endpoint.host_interface
        for sandbox in sandboxes.values()
        for endpoint in sandbox.endpoints.values()
    }
    stray = [
        link.name
        for link in rt.links(netlink)
        if link.name.startswith(prefix) and link.name not in wanted
    ]
    netlink.run([rt.link_delete(name) for name in stray])

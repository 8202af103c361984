"""Links to other containers (``--link``), the old way to find them by name.

A link ``/CONTAINER:ALIAS`` gives the alias as a name in ``/etc/hosts`` and, on the default
bridge, variables ``ALIAS_NAME``, ``ALIAS_PORT_…`` and ``ALIAS_ENV_…`` as Docker documents.
"""

from __future__ import annotations

from collections.abc import Callable

from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.errors import ContainerNotFound
from lazarette.storage.errors import NotFound

Lookup = Callable[[str], Container]


def split(link: str) -> tuple[str, str]:
    """Container and alias of a link; without an alias the container's own name."""
    reference, _, alias = link.partition(":")
    reference = reference.lstrip("/")
    return reference, (alias or reference).rsplit("/", 1)[-1]


def linked(container: Container, lookup: Lookup) -> list[tuple[Container, str]]:
    """The containers a container is linked to, with their aliases; missing ones left out."""
    found = []
    for link in container.definition.host.links or []:
        reference, alias = split(link)
        try:
            found.append((lookup(reference), alias))
        except NotFound:
            continue
    return found


def environment(
    container: Container, lookup: Lookup, address: Callable[[Container], str]
) -> list[str]:
    """The variables of all links.

    Args:
        container: whose links.
        lookup: finds the others.
        address: of a running container on the default bridge.
    """
    made: list[str] = []
    for other, alias in linked(container, lookup):
        prefix = alias.replace("-", "_").upper()
        made.append(f"{prefix}_NAME=/{container.name}/{alias}")
        made += _ports(other, prefix, address(other))
        for entry in other.definition.config.env or []:
            name, _, value = entry.partition("=")
            if name not in ("HOME", "PATH"):
                made.append(f"{prefix}_ENV_{name}={value}")
    return made


def _ports(other: Container, prefix: str, ip: str) -> list[str]:
    exposed = other.definition.config.exposed_ports
    ports = sorted(exposed) if isinstance(exposed, dict) else []
    made: list[str] = []
    for port in ports:
        number, _, proto = port.partition("/")
        url = f"{proto}://{ip}:{number}"
        if not made:
            made.append(f"{prefix}_PORT={url}")
        key = f"{prefix}_PORT_{number}_{proto.upper()}"
        made += [f"{key}={url}", f"{key}_ADDR={ip}", f"{key}_PORT={number}", f"{key}_PROTO={proto}"]
    return made


def forget(container: Container, alias: str) -> None:
    """Remove a link from a container's definition.

    Raises:
        ContainerNotFound: it has none of that alias.
    """
    links = container.definition.host.links or []
    kept = [link for link in links if split(link)[1] != alias]
    if len(kept) == len(links):
        raise ContainerNotFound(f"{container.name}/{alias}")
    container.definition.host.links = kept or None

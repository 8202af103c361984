"""Prune, update and log details of containers."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from lazarette.runtime.containers import creation, resources
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.errors import WrongState
from lazarette.runtime.containers.model import HostConfig, UpdateRequest
from lazarette.runtime.containers.record import Status
from lazarette.runtime.containers.times import parse_instant
from lazarette.storage import process
from lazarette.storage.errors import InvalidArgument

if TYPE_CHECKING:
    from lazarette.runtime.containers.manager import ContainerManager


def prunable(
    containers: Iterable[Container], filters: Mapping[str, Sequence[str]], now_ns: int
) -> list[Container]:
    """Those that ``container prune`` removes.

    Raises:
        InvalidArgument: more than one ``until``, or one that is no instant.
    """
    until = filters.get("until", [])
    if len(until) > 1:
        raise InvalidArgument("more than one until filter specified")
    limit = parse_instant(until[0], now_ns) if until else 0
    return [
        one
        for one in containers
        if one.state.status in (Status.CREATED, Status.EXITED, Status.DEAD)
        and not one.removing
        and (not limit or one.definition.created_ns < limit)
        and has_labels(one.definition.config.labels, filters.get("label", []))
        and not any(
            has_labels(one.definition.config.labels, [value]) for value in filters.get("label!", [])
        )
    ]


def has_labels(labels: Mapping[str, str], values: Sequence[str]) -> bool:
    """Whether all of ``key`` or ``key=value`` hold."""
    for value in values:
        key, equals, wanted = value.partition("=")
        if key not in labels or (equals and labels[key] != wanted):
            return False
    return True


def update(manager: ContainerManager, container: Container, request: UpdateRequest) -> list[str]:
    """Change limits and the restart policy.

    Returns:
        Warnings.

    Raises:
        InvalidArgument: values that cannot be.
        WrongState: the container is being removed.
    """
    if container.removing or container.state.status in (Status.REMOVING, Status.DEAD):
        raise WrongState(f"Cannot update container {container.id}: container is marked for removal")
    host = msgspec.convert(msgspec.to_builtins(container.definition.host), type=HostConfig)
    resources.apply_update(host, request)
    if request.restart_policy is not None:
        creation.check_restart(request.restart_policy)
        if host.auto_remove and request.restart_policy.name not in ("", "no"):
            raise InvalidArgument(
                "Restart policy cannot be updated because AutoRemove is enabled for the container"
            )
        if request.restart_policy.name:
            host.restart_policy = request.restart_policy
    unchanged = request.memory and not request.memory_swap
    if unchanged and 0 < host.memory_swap < host.memory:
        raise InvalidArgument(
            "Memory limit should be smaller than already set memoryswap limit, update the "
            "memoryswap at the same time"
        )
    resources.check(host)
    limits = resources.limits(host, manager.facts.hierarchies)
    if container.state.running and limits.resources:
        process.run(
            manager.runtime.command("update", "--resources", "-", container.id),
            stdin=msgspec.json.encode(limits.resources),
        )
    container.definition.host = host
    manager.store.save(container.definition, container.state)
    manager.lifecycle.emit(container, "update")
    return limits.warnings


def log_details(container: Container) -> bytes:
    """``k=v,k2=v2 `` of the labels and variables that the log options name, sorted."""
    options = container.definition.host.log_config.config
    labels = container.definition.config.labels
    env = {
        entry.partition("=")[0]: entry.partition("=")[2]
        for entry in container.definition.config.env or []
    }
    found: dict[str, str] = {}
    for values, names, pattern in (
        (labels, options.get("labels", ""), options.get("labels-regex", "")),
        (env, options.get("env", ""), options.get("env-regex", "")),
    ):
        wanted = set(filter(None, names.split(",")))
        for key, value in values.items():
            if key in wanted or (pattern and re.search(pattern, key)):
                found[key] = value
    if tag := options.get("tag"):
        found["tag"] = tag
    shown = ",".join(
        f"{urllib.parse.quote_plus(key)}={urllib.parse.quote_plus(value)}"
        for key, value in sorted(found.items())
    )
    return f"{shown} ".encode()

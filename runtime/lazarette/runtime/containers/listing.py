"""Which containers ``ps`` shows and ``prune`` removes: filters, ``before``, ``since``, limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.housekeeping import has_labels
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.containers.record import Status
from lazarette.runtime.images.errors import ImageNotFound, InvalidReference
from lazarette.storage.errors import InvalidArgument

FILTERS = (
    "ancestor", "before", "exited", "expose", "health", "id", "is-task", "isolation", "label",
    "name", "network", "publish", "since", "status", "volume",
)  # fmt: skip
_HEALTH = ("none", "starting", "healthy", "unhealthy")
Filters = Mapping[str, Sequence[str]]


def listed(
    manager: ContainerManager, filters: Filters, all_: bool = False, limit: int = 0
) -> list[Container]:
    """The containers to show, newest first.

    Args:
        manager: knows them all.
        filters: see :data:`FILTERS`.
        all_: those that do not run too.
        limit: at most so many, whether they run or not; 0 is all.

    Raises:
        InvalidArgument: a filter value that cannot be.
        ContainerNotFound: ``before`` or ``since`` name nothing.
    """
    tests = _tests(manager, filters)
    everything = all_ or limit > 0 or bool(filters.get("status")) or bool(filters.get("exited"))
    found = manager.all()
    found = _between(manager, found, filters)
    if filters.get("before") or filters.get("since"):
        everything = True
    shown = [
        one
        for one in found
        if (everything or one.state.running or one.state.status is Status.RESTARTING)
        and not one.removing
        and all(test(one) for test in tests)
    ]
    return shown[:limit] if limit > 0 else shown


def _between(
    manager: ContainerManager, found: list[Container], filters: Filters
) -> list[Container]:
    for key in ("before", "since"):
        values = filters.get(key, [])
        if len(values) > 1:
            raise InvalidArgument(f"invalid filter '{key}=[{' '.join(values)}]'")
    if before := filters.get("before"):
        found = found[found.index(manager.get(before[0])) + 1 :]
    if since := filters.get("since"):
        mark = manager.get(since[0])
        found = found[: found.index(mark)] if mark in found else found
    return found


def _tests(manager: ContainerManager, filters: Filters) -> list[Callable[[Container], bool]]:
    made: list[Callable[[Container], bool]] = []
    for key, values in filters.items():
        if key in ("before", "since") or not values:
            continue
        maker = _MAKERS.get(key)
        if maker is not None:
            made.append(maker(manager, list(values)))
    return made


Test = Callable[[Container], bool]


def _ids(_manager: ContainerManager, values: list[str]) -> Test:
    return lambda one: any(one.id.startswith(value) for value in values)


def _names(_manager: ContainerManager, values: list[str]) -> Test:
    patterns = []
    for value in values:
        try:
            patterns.append(re.compile(value))
        except re.error:
            patterns.append(re.compile(re.escape(value)))
    return lambda one: any(p.search(one.name) or p.search(f"/{one.name}") for p in patterns)


def _labels(_manager: ContainerManager, values: list[str]) -> Test:
    return lambda one: has_labels(one.definition.config.labels, values)


def _status(_manager: ContainerManager, values: list[str]) -> Test:
    known = {status.value for status in Status}
    for value in values:
        if value not in known:
            raise InvalidArgument(f"invalid filter 'status={value}'")
    return lambda one: one.state.status.value in values


def _exited(_manager: ContainerManager, values: list[str]) -> Test:
    try:
        codes = {int(value) for value in values}
    except ValueError as bad:
        raise InvalidArgument(f"invalid filter 'exited={values}'") from bad
    return lambda one: (
        not one.state.running and one.state.started_ns > 0 and one.state.exit_code in codes
    )


def _health(_manager: ContainerManager, values: list[str]) -> Test:
    for value in values:
        if value not in _HEALTH:
            raise InvalidArgument(f"unrecognised filter value for health: {value}")
    return lambda one: (one.state.health.status if one.state.health else "none") in values


def _ancestors(manager: ContainerManager, values: list[str]) -> Test:
    ids: set[str] = set()
    layers: set[str] = set()
    for value in values:
        try:
            image = manager.images.get(value)
        except (ImageNotFound, InvalidReference):
            continue
        ids.add(image.id)
        if image.layer:
            layers.add(image.layer)
    return lambda one: (
        one.definition.image_id in ids
        or (one.definition.image_ref in values)
        or (one.definition.image_layer in layers)
    )


def _networks(manager: ContainerManager, values: list[str]) -> Test:
    def joined(one: Container) -> bool:
        for name, settings in one.definition.endpoints.items():
            if any(
                value == name or (settings.network_id and settings.network_id.startswith(value))
                for value in values
            ):
                return True
        return one.definition.host.network_mode in values

    return joined


def _volumes(_manager: ContainerManager, values: list[str]) -> Test:
    def uses(one: Container) -> bool:
        return any(
            value in (point.name, point.source, point.destination)
            for point in one.definition.mounts
            for value in values
        )

    return uses


def _ports(text: str) -> set[tuple[int, str]]:
    number, _, proto = text.partition("/")
    first, _, last = number.partition("-")
    try:
        numbers = range(int(first), int(last or first) + 1)
    except ValueError as bad:
        raise InvalidArgument(f"invalid port: {text}") from bad
    return {(each, proto or "tcp") for each in numbers}


def _exposed(_manager: ContainerManager, values: list[str]) -> Test:
    wanted = set().union(*(_ports(value) for value in values))

    def exposes(one: Container) -> bool:
        ports = one.definition.config.exposed_ports
        own = set().union(*(_ports(p) for p in (ports if isinstance(ports, dict) else {})))
        return bool(own & wanted)

    return exposes


def _published(manager: ContainerManager, values: list[str]) -> Test:
    wanted = set().union(*(_ports(value) for value in values))

    def publishes(one: Container) -> bool:
        bindings = manager.networking.networks.published(one.id)
        own = {(b.host_port, b.proto) for b in bindings}
        own |= {(b.container_port, b.proto) for b in bindings}
        return bool(own & wanted)

    return publishes


def _is_task(_manager: ContainerManager, values: list[str]) -> Test:
    wanted = any(value.lower() in ("1", "true") for value in values)
    return lambda _one: not wanted


def _anything(_manager: ContainerManager, _values: list[str]) -> Test:
    return lambda _one: True


_MAKERS: dict[str, Callable[[ContainerManager, list[str]], Test]] = {
    "ancestor": _ancestors,
    "exited": _exited,
    "expose": _exposed,
    "health": _health,
    "id": _ids,
    "is-task": _is_task,
    "isolation": _anything,
    "label": _labels,
    "name": _names,
    "network": _networks,
    "publish": _published,
    "status": _status,
    "volume": _volumes,
}

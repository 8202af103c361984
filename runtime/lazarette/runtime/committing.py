"""What images and containers want of each other: who uses an image, ``docker commit``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import msgspec

from lazarette.runtime.api.images import CommitRequest
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.errors import WrongState
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.containers.record import Status
from lazarette.runtime.images.commit import commit
from lazarette.runtime.images.instructions import apply_changes
from lazarette.runtime.images.model import RunConfig
from lazarette.runtime.images.store import ImageStore, ImageUse

V = TypeVar("V")


class ContainerImages:
    """The containers, as images see them; tells the store who uses what.

    Args:
        containers: all of this engine.
        images: all of this engine.
    """

    def __init__(self, containers: ContainerManager, images: ImageStore) -> None:
        self._containers = containers
        self._images = images
        images.users = self.uses

    def uses(self, image_id: str) -> Sequence[ImageUse]:
        """The containers made of an image."""
        return [
            ImageUse(one.id, one.state.running)
            for one in self._containers.all()
            if one.definition.image_id == image_id
        ]

    async def __call__(self, request: CommitRequest) -> str:
        """Make an image of a container's changes; its id.

        Raises:
            NotFound: no such container.
            InvalidArgument: a change is not allowed.
        """
        container = self._containers.get(request.container)
        async with self._held_still(container, request.pause):
            return await asyncio.to_thread(self._commit, container, request)

    @asynccontextmanager
    async def _held_still(self, container: Container, wanted: bool) -> AsyncIterator[None]:
        """Freeze a running container meanwhile; it may end at any moment all the same."""
        frozen = False
        if wanted and container.state.status is Status.RUNNING:
            with suppress(WrongState):
                await self._containers.lifecycle.pause(container)
                frozen = True
        try:
            yield
        finally:
            if frozen:
                with suppress(WrongState):
                    await self._containers.lifecycle.unpause(container)

    def _commit(self, container: Container, request: CommitRequest) -> str:
        own = config_of(container)
        changed = apply_changes(request.config or own, request.changes)
        image = commit(
            self._images,
            layer_key=container.definition.layer,
            base=self._images.find(container.definition.image_id),
            config=merged(changed, own),
            command=" ".join(own.cmd or ()),
            comment=request.comment,
            author=request.author,
        )
        return image.id


def config_of(container: Container) -> RunConfig:
    """A container's configuration as an image would give it."""
    told = msgspec.to_builtins(container.definition.config)
    for key in ("Cmd", "Entrypoint"):
        if isinstance(told.get(key), str):
            told[key] = [told[key]]
    return msgspec.convert(told, RunConfig, strict=False)


def merged(given: RunConfig, inherited: RunConfig) -> RunConfig:
    """A configuration with what it leaves open taken from another (moby, ``merge.go``)."""
    made = msgspec.structs.replace(given)
    made.user = given.user or inherited.user
    made.working_dir = given.working_dir or inherited.working_dir
    made.stop_signal = given.stop_signal or inherited.stop_signal
    made.healthcheck = given.healthcheck or inherited.healthcheck
    made.shell = given.shell or inherited.shell
    made.exposed_ports = _union(given.exposed_ports, inherited.exposed_ports)
    made.volumes = _union(given.volumes, inherited.volumes)
    made.labels = _union(given.labels, inherited.labels)
    made.env = _env(given.env or (), inherited.env or ()) or None
    if not given.entrypoint:
        made.cmd = given.cmd or inherited.cmd
        if given.entrypoint is None:
            made.entrypoint = inherited.entrypoint
    return made


def _union(given: Mapping[str, V] | None, more: Mapping[str, V] | None) -> dict[str, V] | None:
    return {**(more or {}), **(given or {})} or None


def _env(given: Iterable[str], more: Iterable[str]) -> list[str]:
    env = list(given)
    known = {entry.partition("=")[0] for entry in env}
    return env + [entry for entry in more if entry.partition("=")[0] not in known]

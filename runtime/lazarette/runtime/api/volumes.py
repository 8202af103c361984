"""Routes of volumes: Docker's, and ours under ``/lazarette/v1``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import BinaryIO

import msgspec
from aiohttp import web

from lazarette.runtime.api.http import Call, Route, empty, json_response, stream
from lazarette.runtime.events import EventBus
from lazarette.runtime.protection.backups import Writers
from lazarette.storage.clock import rfc3339
from lazarette.storage.errors import (
    InUse,
    InvalidArgument,
    SnapshotNotFound,
    Unavailable,
    VolumeNotFound,
)
from lazarette.storage.volumes.contract import SnapshotInfo
from lazarette.storage.volumes.manager import Volume, VolumeManager

_LIST_FILTERS = ("dangling", "driver", "label", "name")
_PRUNE_FILTERS = ("label", "label!", "all")
_CHUNK = 1 << 20
_V1 = "/lazarette/v1"


class CreateBody(msgspec.Struct, rename="pascal"):
    """``POST /volumes/create``."""

    name: str = ""
    driver: str = ""
    driver_opts: dict[str, str] | None = None
    labels: dict[str, str] | None = None
    cluster_volume_spec: dict[str, object] | None = None


class SnapshotBody(msgspec.Struct):
    """``POST /snapshots``: one snapshot of several volumes at one instant."""

    volumes: list[str]
    id: str = ""


class CloneBody(msgspec.Struct):
    """``POST /volumes/{name}/clone``."""

    name: str
    snapshot: str = ""
    labels: dict[str, str] = {}
    driver: str = ""


class LabelsBody(msgspec.Struct):
    """``PUT /volumes/{name}/labels``: all of them."""

    labels: dict[str, str]


class RollbackBody(msgspec.Struct):
    """``POST /volumes/{name}/rollback``."""

    snapshot: str


class ResizeBody(msgspec.Struct):
    """``POST /volumes/{name}/resize``; bytes."""

    size: int


class RenameBody(msgspec.Struct):
    """``POST /volumes/{name}/rename``."""

    name: str


class VolumeRoutes:
    """Handlers of volumes.

    Args:
        volumes: the volumes.
        writers: holds the containers that write them.
        referrers: ids of the containers, stopped ones too, that name a volume.
        require_ordinary: refuses what a volume that is still being restored cannot do.
        remove: removes a volume of any kind.
        events: told what happens to them.
    """

    def __init__(
        self,
        volumes: VolumeManager,
        writers: Writers,
        referrers: Callable[[str], Sequence[str]],
        require_ordinary: Callable[[str], None],
        remove: Callable[[str, bool], None],
        events: EventBus,
    ) -> None:
        self._volumes = volumes
        self._writers = writers
        self._referrers = referrers
        self._require_ordinary = require_ordinary
        self._remove = remove
        self._events = events

    def routes(self) -> list[Route]:
        """All routes."""
        one = _V1 + "/volumes/{name}"
        return [
            Route("GET", "/volumes", self.list),
            Route("POST", "/volumes/create", self.create),
            Route("POST", "/volumes/prune", self.prune),
            Route("GET", "/volumes/{name:.*}", self.inspect),
            Route("PUT", "/volumes/{name:.*}", self.update),
            Route("DELETE", "/volumes/{name:.*}", self.remove),
            Route("POST", _V1 + "/snapshots", self.snapshot),
            Route("GET", one + "/snapshots", self.snapshots),
            Route("DELETE", one + "/snapshots/{snapshot}", self.delete_snapshot),
            Route("POST", one + "/clone", self.clone),
            Route("POST", one + "/rollback", self.rollback),
            Route("POST", one + "/resize", self.resize),
            Route("POST", one + "/rename", self.rename),
            Route("PUT", one + "/labels", self.label),
            Route("GET", one + "/usage", self.usage),
            Route("GET", one + "/diff", self.diff),
            Route("GET", one + "/export", self.export),
            Route("POST", one + "/import", self.import_),
        ]

    async def list(self, call: Call) -> web.StreamResponse:
        """``GET /volumes``."""
        filters = call.filters(_LIST_FILTERS)
        found = [
            volume
            for volume in await asyncio.to_thread(self._volumes.list)
            if _matches(volume, filters, bool(self._referrers(volume.name)))
        ]
        return json_response(
            {"Volumes": [self._render(volume) for volume in found], "Warnings": None}
        )

    async def create(self, call: Call) -> web.StreamResponse:
        """``POST /volumes/create``."""
        body = await call.json(CreateBody)
        if body.cluster_volume_spec:
            raise Unavailable("this node is not a swarm manager")
        labels = dict(body.labels or {})
        before = {volume.name for volume in await asyncio.to_thread(self._volumes.list)}
        made = await asyncio.to_thread(
            self._volumes.create, body.name or None, body.driver, body.driver_opts or {}, labels
        )
        if made.name not in before:
            self._events.publish("volume", "create", made.name, {"driver": "local"})
        return json_response(self._render(made, body.labels is not None), 201)

    async def inspect(self, call: Call) -> web.StreamResponse:
        """``GET /volumes/{name}``."""
        name = call.path["name"]
        try:
            return json_response(self._render(await asyncio.to_thread(self._volumes.get, name)))
        except VolumeNotFound as gone:
            raise VolumeNotFound(f"get {name}: no such volume", hint="laz volume ls") from gone

    async def update(self, call: Call) -> web.StreamResponse:
        """``PUT /volumes/{name}``: cluster volumes only."""
        raise Unavailable("this node is not a swarm manager")

    async def remove(self, call: Call) -> web.StreamResponse:
        """``DELETE /volumes/{name}``."""
        name, force = call.path["name"], call.flag("force")
        if holders := self._referrers(name):
            raise InUse(
                f"remove {name}: volume is in use - [{', '.join(holders)}]",
                hint="remove those containers first",
            )
        try:
            await asyncio.to_thread(self._remove, name, force)
        except VolumeNotFound as gone:
            if not force:
                raise VolumeNotFound(f"get {name}: no such volume", hint="laz volume ls") from gone
        else:
            self._events.publish("volume", "destroy", name, {"driver": "local"})
        return empty()

    async def prune(self, call: Call) -> web.StreamResponse:
        """``POST /volumes/prune``: anonymous ones, or all that nobody uses."""
        filters = call.filters(_PRUNE_FILTERS)
        everything = call.version < (1, 42) or any(
            value.lower() in ("1", "true") for value in filters.get("all", [])
        )
        labels = {label: filters[label] for label in ("label", "label!") if label in filters}

        kept = [
            volume.name
            for volume in await asyncio.to_thread(self._volumes.list)
            if self._referrers(volume.name) or not _labelled(volume, labels)
        ]
        done = await asyncio.to_thread(self._volumes.prune, kept, all_volumes=everything)
        for name in done.names:
            self._events.publish("volume", "destroy", name, {"driver": "local"})
        self._events.publish("volume", "prune", "", {"reclaimed": str(done.reclaimed)})
        return json_response(
            {"VolumesDeleted": list(done.names) or None, "SpaceReclaimed": done.reclaimed}
        )

    async def snapshot(self, call: Call) -> web.StreamResponse:
        """Take one snapshot of several volumes at one instant."""
        body = await call.json(SnapshotBody)
        if not body.volumes:
            raise InvalidArgument("a snapshot needs at least one volume")
        for name in body.volumes:
            self._require_ordinary(name)
        gate = self._writers.gate_for(body.volumes)
        taken = await asyncio.to_thread(self._volumes.snapshot, body.volumes, gate, body.id or None)
        return json_response(
            {"snapshots": [_snapshot(info) | {"volume": name} for name, info in taken.items()]}, 201
        )

    async def snapshots(self, call: Call) -> web.StreamResponse:
        """List the snapshots of a volume."""
        found = await asyncio.to_thread(self._volumes.snapshots, call.path["name"])
        return json_response([_snapshot(info) for info in found])

    async def delete_snapshot(self, call: Call) -> web.StreamResponse:
        """Delete a snapshot."""
        await asyncio.to_thread(
            self._volumes.delete_snapshot, call.path["name"], call.path["snapshot"]
        )
        return empty()

    async def clone(self, call: Call) -> web.StreamResponse:
        """Make a writable volume of a volume or snapshot."""
        self._require_ordinary(call.path["name"])
        body = await call.json(CloneBody)
        made = await asyncio.to_thread(
            self._volumes.clone,
            call.path["name"],
            body.snapshot or None,
            body.name,
            body.labels,
            body.driver,
        )
        self._events.publish("volume", "create", made.name, {"driver": "local"})
        return json_response(self._render(made), 201)

    async def rollback(self, call: Call) -> web.StreamResponse:
        """Set a volume back; answers the id of the safety snapshot."""
        self._require_ordinary(call.path["name"])
        body = await call.json(RollbackBody)
        safety = await asyncio.to_thread(self._volumes.rollback, call.path["name"], body.snapshot)
        return json_response({"safety": safety})

    async def resize(self, call: Call) -> web.StreamResponse:
        """Set a volume's size limit."""
        body = await call.json(ResizeBody)
        await asyncio.to_thread(self._volumes.resize, call.path["name"], body.size)
        return empty()

    async def rename(self, call: Call) -> web.StreamResponse:
        """Give a volume another name."""
        self._require_ordinary(call.path["name"])
        body = await call.json(RenameBody)
        await asyncio.to_thread(self._volumes.rename, call.path["name"], body.name)
        return empty()

    async def label(self, call: Call) -> web.StreamResponse:
        """Replace a volume's labels."""
        body = await call.json(LabelsBody)
        await asyncio.to_thread(self._volumes.set_labels, call.path["name"], body.labels)
        return empty()

    async def usage(self, call: Call) -> web.StreamResponse:
        """The space a volume takes."""
        found = await asyncio.to_thread(self._volumes.usage, call.path["name"])
        return json_response(found)

    async def diff(self, call: Call) -> web.StreamResponse:
        """What differs between two snapshots, a JSON object a line."""
        self._require_ordinary(call.path["name"])
        base, target = call.text("base"), call.text("target")
        if not base or not target:
            raise InvalidArgument("diff needs base and target")
        changes = await asyncio.to_thread(self._volumes.changes, call.path["name"], base, target)
        answer = await stream(call, "application/x-ndjson")
        for change in changes:
            ranges = change.ranges
            line = {
                "kind": change.kind.value,
                "path": change.path.decode("utf-8", "surrogateescape")
                .encode("utf-8", "backslashreplace")
                .decode(),
                "path_hex": change.path.hex(),
                "bytes": None if ranges is None else sum(one.length for one in ranges),
            }
            await answer.write(msgspec.json.encode(line) + b"\n")
        await answer.write_eof()
        return answer

    async def export(self, call: Call) -> web.StreamResponse:
        """A volume's content as a tar, or a snapshot's."""
        name, snapshot = call.path["name"], call.text("snapshot") or None
        self._require_ordinary(name)
        known = await asyncio.to_thread(self._volumes.snapshots, name)
        if snapshot is not None and snapshot not in {info.id for info in known}:
            raise SnapshotNotFound(f"the volume {name} has no snapshot {snapshot}")
        answer = await stream(call, "application/x-tar")
        async for chunk in _produced(lambda out: self._volumes.export(name, out, snapshot)):
            await answer.write(chunk)
        await answer.write_eof()
        return answer

    async def import_(self, call: Call) -> web.StreamResponse:
        """Unpack a tar into a volume."""
        self._require_ordinary(call.path["name"])
        reader, writer = os.pipe()

        def unpack() -> None:
            # closed here: what is still being sent has nobody to take it once this is over
            with os.fdopen(reader, "rb") as source:
                self._volumes.import_(call.path["name"], source)

        unpacking = asyncio.create_task(asyncio.to_thread(unpack))
        with os.fdopen(writer, "wb", buffering=0) as out:
            try:
                async for chunk in call.request.content.iter_chunked(_CHUNK):
                    await asyncio.to_thread(_write_all, out, chunk)
            except BrokenPipeError:  # the unpacking failed; its own error says why
                pass
        await unpacking
        return empty()

    def _render(self, volume: Volume, labelled: bool = False) -> dict[str, object]:
        """A volume as Docker shows it; drivers taken by default go by Docker's name for them."""
        labels = dict(volume.labels)
        return {
            "Name": volume.name,
            "Driver": self._volumes.shown(volume.driver),
            "Mountpoint": str(volume.mountpoint),
            "CreatedAt": rfc3339(volume.created_ns),
            "Labels": labels if labels or labelled else None,
            "Scope": "local",
            "Options": dict(volume.options) or None,
            "Status": {"Driver": volume.driver},
        }


def _write_all(out: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


async def _produced(write: Callable[[BinaryIO], None]) -> AsyncIterator[bytes]:
    """What a blocking writer puts into a file, as chunks, with back pressure."""
    reader, writer = os.pipe()

    def fill() -> None:
        with os.fdopen(writer, "wb") as out:
            write(out)

    filling = asyncio.create_task(asyncio.to_thread(fill))
    with os.fdopen(reader, "rb", buffering=0) as source:
        while chunk := await asyncio.to_thread(source.read, _CHUNK):
            yield chunk
    await filling


def _snapshot(info: SnapshotInfo) -> dict[str, object]:
    return {
        "id": info.id,
        "time": rfc3339(info.created_ns),
        "time_ns": info.created_ns,
        "pause_ns": info.pause_ns,
        "kind": info.kind.value,
    }


def _matches(volume: Volume, filters: Mapping[str, list[str]], used: bool) -> bool:
    for value in filters.get("dangling", []):
        if (value.lower() in ("1", "true")) == used:
            return False
    if "driver" in filters and not {volume.driver, "local"} & set(filters["driver"]):
        return False
    if "name" in filters and not any(part in volume.name for part in filters["name"]):
        return False
    return _labelled(volume, {"label": filters["label"]} if "label" in filters else {})


def _labelled(volume: Volume, filters: Mapping[str, list[str]]) -> bool:
    def has(wanted: str) -> bool:
        key, equals, value = wanted.partition("=")
        return key in volume.labels and (not equals or volume.labels[key] == value)

    return all(has(wanted) for wanted in filters.get("label", [])) and not any(
        has(wanted) for wanted in filters.get("label!", [])
    )

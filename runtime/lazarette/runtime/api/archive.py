"""Files of containers in the Engine API: archive, export, changes."""

from __future__ import annotations

import asyncio
import base64
import io
import zlib
from typing import BinaryIO, cast

import msgspec
from aiohttp import web

from lazarette.runtime.api.http import Call, Route, empty, json_response, stream
from lazarette.runtime.api.transfer import BodyReader, BodyWriter
from lazarette.runtime.containers.archive import Archives, PathStat, go_mode
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.images.compression import Unpacked
from lazarette.storage.clock import rfc3339
from lazarette.storage.errors import InvalidArgument

STAT_HEADER = "X-Docker-Container-Path-Stat"


def routes(manager: ContainerManager) -> list[Route]:
    """The routes over the containers' files."""
    made = ArchiveRoutes(manager)
    one = "/containers/{id}"
    return [
        Route("HEAD", f"{one}/archive", made.head),
        Route("GET", f"{one}/archive", made.get),
        Route("PUT", f"{one}/archive", made.put),
        Route("GET", f"{one}/export", made.export),
        Route("GET", f"{one}/changes", made.changes),
    ]


class ArchiveRoutes:
    """The handlers.

    Args:
        manager: the service.
    """

    def __init__(self, manager: ContainerManager) -> None:
        self._manager = manager
        self._archives = Archives(manager.layers, manager.volumes)

    def _target(self, call: Call) -> tuple[Container, str]:
        path = call.text("path")
        if not path:
            raise InvalidArgument("bad parameter: missing path")
        return self._manager.get(call.path["id"]), path

    async def head(self, call: Call) -> web.StreamResponse:
        """``HEAD /containers/{id}/archive``: what is at the path, in a header."""
        container, path = self._target(call)

        def look() -> PathStat:
            with self._archives.opened(container) as root:
                return self._archives.stat(container, root, path)

        async with container.files_lock():
            found = await asyncio.to_thread(look)
        response = empty(200)
        response.headers[STAT_HEADER] = stat_header(found)
        return response

    async def get(self, call: Call) -> web.StreamResponse:
        """``GET /containers/{id}/archive``: what is at the path, as a tar."""
        container, path = self._target(call)
        accepted = call.request.headers.get("Accept-Encoding", "")
        async with container.files_lock():
            opened = self._archives.opened(container)
            root = await asyncio.to_thread(opened.__enter__)
            try:
                found = await asyncio.to_thread(self._archives.stat, container, root, path)
                headers = {STAT_HEADER: stat_header(found)}
                packed = "gzip" in accepted
                if packed:
                    headers["Content-Encoding"] = "gzip"
                response = await stream(call, "application/x-tar", headers)
                writer = BodyWriter(response)
                out = _Gzip(writer.stream).stream if packed else writer.stream

                def send() -> None:
                    self._archives.read(container, root, path, out)
                    out.flush()
                    writer.flush()

                await asyncio.to_thread(send)
            finally:
                await asyncio.to_thread(opened.__exit__, None, None, None)
        await response.write_eof()
        return response

    async def put(self, call: Call) -> web.StreamResponse:
        """``PUT /containers/{id}/archive``: unpack a tar into a folder."""
        container, path = self._target(call)
        body = BodyReader(call.request.content)
        keep_types, own = call.flag("noOverwriteDirNonDir"), call.flag("copyUIDGID")

        def unpack() -> None:
            with self._archives.opened(container) as root:
                source = cast(BinaryIO, Unpacked(body.stream))
                self._archives.write(container, root, path, source, keep_types=keep_types, own=own)

        async with container.files_lock():
            await asyncio.to_thread(unpack)
        self._manager.lifecycle.emit(container, "extract-to-dir", path=path)
        return empty(200)

    async def export(self, call: Call) -> web.StreamResponse:
        """``GET /containers/{id}/export``: the whole root, as a tar."""
        container = self._manager.get(call.path["id"])
        response = await stream(call, "application/octet-stream")
        writer = BodyWriter(response)

        def send() -> None:
            self._archives.export(container, writer.stream)
            writer.flush()

        await asyncio.to_thread(send)
        await response.write_eof()
        self._manager.lifecycle.emit(container, "export")
        return response

    async def changes(self, call: Call) -> web.StreamResponse:
        """``GET /containers/{id}/changes``."""
        container = self._manager.get(call.path["id"])
        found = await asyncio.to_thread(self._archives.changes, container)
        return json_response([{"Path": path, "Kind": kind} for path, kind in found] or None)


def stat_header(found: PathStat) -> str:
    """What is at a path, as the header clients read."""
    shown = {
        "name": found.name,
        "size": found.status.st_size,
        "mode": go_mode(found.status.st_mode),
        "mtime": rfc3339(found.status.st_mtime_ns),
        "linkTarget": found.link_target,
    }
    return base64.b64encode(msgspec.json.encode(shown)).decode()


class _Gzip(io.RawIOBase):
    """A stream that packs what is written to it."""

    def __init__(self, out: BinaryIO) -> None:
        super().__init__()
        self._out = out
        self._packer = zlib.compressobj(1, zlib.DEFLATED, 31)

    @property
    def stream(self) -> BinaryIO:
        """This object by the name of the type most functions ask for."""
        return self  # type: ignore[return-value]

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        self._out.write(self._packer.compress(data))
        return len(data)

    def flush(self) -> None:
        """The end: nothing may be written any more."""
        if self._packer is not None:
            self._out.write(self._packer.flush())
            self._packer = None  # type: ignore[assignment]

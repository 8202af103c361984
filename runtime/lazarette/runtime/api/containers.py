"""Container operations of the Engine API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from lazarette.runtime.api.exec import dimensions
from lazarette.runtime.api.hijack import (
    HijackedResponse,
    RawStream,
    WebSocketStream,
    hijack,
    while_connected,
)
from lazarette.runtime.api.http import Call, Route, empty, json_response, stream
from lazarette.runtime.api.images import platform_of
from lazarette.runtime.containers import attaching, listing
from lazarette.runtime.containers import monitor as conmon
from lazarette.runtime.containers.container import Container, WaitFor
from lazarette.runtime.containers.errors import (
    ContainerNotFound,
    LogsUnreadable,
    PruneRunning,
    WrongState,
)
from lazarette.runtime.containers.logs import LogQuery, LogRecord
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.containers.model import CreateRequest, UpdateRequest, parse
from lazarette.runtime.containers.streams import (
    Attach,
    ClientStream,
    frame,
    parse_detach_keys,
)
from lazarette.runtime.containers.times import parse_instant
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import InvalidArgument

_FRESH_NS = 200_000_000
_PRUNE_FILTERS = ("label", "label!", "until")


def routes(manager: ContainerManager) -> list[Route]:
    """The routes over the containers."""
    made = ContainerRoutes(manager)
    one = "/containers/{id}"
    return [
        Route("POST", "/containers/create", made.create),
        Route("GET", "/containers/json", made.list),
        Route("POST", "/containers/prune", made.prune),
        Route("GET", f"{one}/json", made.inspect),
        Route("DELETE", one, made.remove),
        Route("DELETE", "/containers/{name:.*}/{alias}", made.remove_link),
        Route("POST", f"{one}/start", made.start),
        Route("POST", f"{one}/stop", made.stop),
        Route("POST", f"{one}/restart", made.restart),
        Route("POST", f"{one}/kill", made.kill),
        Route("POST", f"{one}/pause", made.pause),
        Route("POST", f"{one}/unpause", made.unpause),
        Route("POST", f"{one}/rename", made.rename),
        Route("POST", f"{one}/update", made.update),
        Route("POST", f"{one}/wait", made.wait),
        Route("POST", f"{one}/resize", made.resize),
        Route("POST", f"{one}/attach", made.attach),
        Route("GET", f"{one}/logs", made.logs),
        Route("GET", f"{one}/stats", made.stats),
        Route("GET", f"{one}/top", made.top),
        Route("GET", f"{one}/attach/ws", made.attach_websocket),
    ]


class ContainerRoutes:
    """The handlers.

    Args:
        manager: the service.
    """

    def __init__(self, manager: ContainerManager) -> None:
        self._manager = manager
        self._pruning = False

    def _container(self, call: Call) -> Container:
        return self._manager.get(call.path["id"])

    # ---- life

    async def create(self, call: Call) -> web.StreamResponse:
        """``POST /containers/create``."""
        body = await call.json(dict[str, object])
        if not body:
            raise InvalidArgument("config cannot be empty in order to create a container")
        request = parse(CreateRequest, body)
        container, warnings = await self._manager.create(
            request, call.text("name"), call.version, platform_of(call)
        )
        return json_response({"Id": container.id, "Warnings": warnings}, 201)

    async def list(self, call: Call) -> web.StreamResponse:
        """``GET /containers/json``."""
        filters = call.filters(listing.FILTERS)
        found = listing.listed(self._manager, filters, call.flag("all"), call.number("limit") or 0)
        now, size = self._manager.clock.now_ns(), call.flag("size")
        entry = self._manager.inspector.entry
        if size:
            shown = await asyncio.to_thread(lambda: [entry(one, now, True) for one in found])
        else:
            shown = [entry(one, now) for one in found]
        return json_response(shown)

    async def inspect(self, call: Call) -> web.StreamResponse:
        """``GET /containers/{id}/json``."""
        container = self._container(call)
        inspect, version = self._manager.inspector.inspect, call.version
        if call.flag("size"):
            shown = await asyncio.to_thread(inspect, container, True, version)
        else:
            shown = inspect(container, version=version)
        return json_response(shown)

    async def start(self, call: Call) -> web.StreamResponse:
        """``POST /containers/{id}/start``."""
        container = self._container(call)
        if (await call.body()).strip() not in (b"", b"{}", b"null"):
            raise InvalidArgument("starting container with non-empty request body is not supported")
        parse_detach_keys(call.text("detachKeys"))
        await self._manager.lifecycle.start(container)
        return empty()

    async def stop(self, call: Call) -> web.StreamResponse:
        """``POST /containers/{id}/stop``."""
        container = self._container(call)
        await self._manager.lifecycle.stop(container, call.number("t"), call.text("signal"))
        return empty()

    async def restart(self, call: Call) -> web.StreamResponse:
        """``POST /containers/{id}/restart``."""
        container = self._container(call)
        await self._manager.lifecycle.restart(container, call.number("t"), call.text("signal"))
        return empty()

    async def kill(self, call: Call) -> web.StreamResponse:
        """``POST /containers/{id}/kill``."""
        await self._manager.lifecycle.kill(self._container(call), call.text("signal"))
        return empty()

    async def pause(self, call: Call) -> web.StreamResponse:
        """``POST /containers/{id}/pause``."""
        await self._manager.lifecycle.pause(self._container(call))
        return empty()

    async def unpause(self, call: Call) -> web.StreamResponse:
        """``POST /containers/{id}/unpause``."""
        await self._manager.lifecycle.unpause(self._container(call))
        return empty()

    async def rename(self, call: Call) -> web.StreamResponse:
        """``POST /containers/{id}/rename``."""
        self._manager.rename(self._container(call), call.text("name"))
        return empty()

    async def update(self, call: Call) -> web.StreamResponse:
        """``POST /containers/{id}/update``."""
        container = self._container(call)
        request = parse(UpdateRequest, await call.json(dict[str, object]))
        warnings = await self._manager.update(container, request)
        return json_response({"Warnings": warnings})

    async def remove(self, call: Call) -> web.StreamResponse:
        """``DELETE /containers/{id}``."""
        container = self._container(call)
        if call.flag("link"):
            raise InvalidArgument("bad parameter: a link is named CONTAINER/ALIAS")
        await self._manager.remove(container, force=call.flag("force"), volumes=call.flag("v"))
        return empty()

    async def remove_link(self, call: Call) -> web.StreamResponse:
        """``DELETE /containers/{name}/{alias}?link=1``: forget a link, keep both containers."""
        if not call.flag("link"):
            raise ContainerNotFound(f"{call.path['name']}/{call.path['alias']}")
        container = self._manager.get(call.path["name"])
        self._manager.remove_link(container, call.path["alias"])
        return empty()

    async def prune(self, call: Call) -> web.StreamResponse:
        """``POST /containers/prune``."""
        filters = call.filters(_PRUNE_FILTERS)
        if self._pruning:
            raise PruneRunning()
        self._pruning = True
        try:
            removed, reclaimed = await self._manager.prune(filters)
        finally:
            self._pruning = False
        return json_response({"ContainersDeleted": removed or None, "SpaceReclaimed": reclaimed})

    # ---- streams

    async def wait(self, call: Call) -> web.StreamResponse:
        """``POST /containers/{id}/wait``: the head is sent before it waits."""
        container = self._container(call)
        text = call.text("condition") or WaitFor.NOT_RUNNING.value
        try:
            condition = WaitFor(text)
        except ValueError as bad:
            raise InvalidArgument(f'invalid condition: "{text}"') from bad
        future = container.expect(condition)
        response = await stream(call)
        code = await while_connected(call, self._manager.wait(future))
        await response.write(msgspec.json.encode({"StatusCode": code}) + b"\n")
        await response.write_eof()
        return response

    async def resize(self, call: Call) -> web.StreamResponse:
        """``POST /containers/{id}/resize``."""
        container = self._container(call)
        height, width = dimensions(call)
        if not container.state.running:
            raise WrongState(f"cannot resize: container {container.id} is not running")
        try:
            conmon.resize(container.bundle, height, width)
        except OSError as gone:
            raise WrongState(f"cannot resize a stopped container: {gone.strerror}") from gone
        return empty(200)

    async def attach(self, call: Call) -> web.StreamResponse:
        """``POST /containers/{id}/attach``: hijacks the connection."""
        container = self._container(call)
        tty = container.definition.config.tty
        attach = Attach(
            stdin=call.flag("stdin") and container.definition.config.open_stdin,
            stdout=call.flag("stdout"),
            stderr=call.flag("stderr"),
            tty=tty,
            detach_keys=parse_detach_keys(call.text("detachKeys")),
        )
        replay: Callable[[ClientStream], Awaitable[None]] | None = None
        if call.flag("logs"):
            replay = self._replay(container, attach)

        async def take_over() -> RawStream:
            return hijack(call, multiplexed=not tty)

        lifecycle, stays = self._manager.lifecycle, call.flag("stream")
        await attaching.join(lifecycle, container, attach, replay, stays, take_over)
        return HijackedResponse()

    @staticmethod
    def _replay(container: Container, attach: Attach) -> Callable[[ClientStream], Awaitable[None]]:
        async def write_log(client: ClientStream) -> None:
            log = container.log
            if log is None:
                return
            query = LogQuery(stdout=attach.stdout, stderr=attach.stderr)
            for record in await asyncio.to_thread(lambda: list(log.read(query))):
                data = record.data if attach.tty else frame(record.stream, record.data)
                await client.write(data)

        return write_log

    async def attach_websocket(self, call: Call) -> web.StreamResponse:
        """``GET /containers/{id}/attach/ws``: raw bytes in binary messages."""
        container = self._container(call)
        flags = [call.flag(name) for name in ("stdin", "stdout", "stderr")]
        if not any(flags):
            flags = [True, True, True]
        attach = Attach(
            stdin=flags[0] and container.definition.config.open_stdin,
            stdout=flags[1],
            stderr=flags[2],
            tty=True,
            detach_keys=parse_detach_keys(call.text("detachKeys")),
        )
        replay = self._replay(container, attach) if call.flag("logs") else None
        socket = web.WebSocketResponse()

        async def take_over() -> WebSocketStream:
            await socket.prepare(call.request)
            return WebSocketStream(socket)

        lifecycle, stays = self._manager.lifecycle, call.flag("stream")
        await attaching.join(lifecycle, container, attach, replay, stays, take_over)
        await socket.close()
        return socket

    async def stats(self, call: Call) -> web.StreamResponse:
        """``GET /containers/{id}/stats``."""
        container = self._container(call)
        if not call.flag("stream", True):
            first = None
            if not call.flag("one-shot") and container.state.running:
                first = self._manager.sample(container, None)
                await asyncio.sleep(1)
            return json_response(self._manager.sample(container, first))
        response = await stream(call)
        await while_connected(call, self._write_stats(container, response))
        await response.write_eof()
        return response

    async def _write_stats(self, container: Container, response: web.StreamResponse) -> None:
        before = None
        while not container.removing:
            before = self._manager.sample(container, before)
            await response.write(msgspec.json.encode(before) + b"\n")
            await asyncio.sleep(1)

    async def top(self, call: Call) -> web.StreamResponse:
        """``GET /containers/{id}/top``."""
        container = self._container(call)
        arguments = call.text("ps_args")
        return json_response(await asyncio.to_thread(self._manager.top, container, arguments))

    async def logs(self, call: Call) -> web.StreamResponse:
        """``GET /containers/{id}/logs``."""
        container = self._container(call)
        query = self._log_query(call)
        if container.log is None:
            raise LogsUnreadable()
        tty = container.definition.config.tty
        kind = "raw" if tty or call.version < (1, 42) else "multiplexed"
        response = await stream(call, f"application/vnd.docker.{kind}-stream")
        if not query.follow:
            await self._first_words(container)
        await while_connected(call, self._write_logs(call, container, query, response))
        await response.write_eof()
        return response

    async def _first_words(self, container: Container) -> None:
        """Let a container that was just started come to its first line, or its end.

        dockerd's start takes so long that a short program has written when it returns:
        clients ask for the log right after it, without waiting for the end.
        """
        path = container.log_path
        age = self._manager.clock.now_ns() - container.state.started_ns
        if path is None or not container.state.running or age > _FRESH_NS:
            return
        ended = container.expect(WaitFor.NOT_RUNNING)
        deadline = time.monotonic() + (_FRESH_NS - age) / NANOSECONDS
        while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
            done, _ = await asyncio.wait([ended], timeout=0.01)
            if done:
                return

    def _log_query(self, call: Call) -> LogQuery:
        if not (call.flag("stdout") or call.flag("stderr")):
            raise InvalidArgument("Bad parameters: you must choose at least one stream")
        now = self._manager.clock.now_ns()
        try:
            number = int(call.text("tail", "all"))
        except ValueError:
            number = -1  # "all", and whatever else is no number
        return LogQuery(
            stdout=call.flag("stdout"),
            stderr=call.flag("stderr"),
            since_ns=parse_instant(call.text("since"), now),
            until_ns=parse_instant(call.text("until"), now),
            tail=number if number >= 0 else None,
            follow=call.flag("follow"),
        )

    async def _write_logs(
        self, call: Call, container: Container, query: LogQuery, response: web.StreamResponse
    ) -> None:
        log = container.log
        if log is None:
            return
        times, tty = call.flag("timestamps"), container.definition.config.tty
        details = b""
        if call.flag("details"):
            details = self._manager.log_details(container)

        def rendered(records: list[LogRecord]) -> bytes:
            made = []
            for record in records:
                data = details + record.data
                if times:
                    data = record.time + b"Z " + data
                made.append(data if tty else frame(record.stream, data))
            return b"".join(made)

        if not query.follow:
            records = await asyncio.to_thread(lambda: list(log.read(query)))
            for start in range(0, len(records), 256):
                await response.write(rendered(records[start : start + 256]))
            return
        batches = log.follow(query, self._manager.watch, lambda: not container.state.running)
        async for batch in batches:
            await response.write(rendered(batch))

"""Exec sessions of the Engine API: create, start, resize, inspect."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from lazarette.runtime.api.hijack import HijackedResponse, RawStream, hijack
from lazarette.runtime.api.http import Call, Route, empty, json_response
from lazarette.runtime.containers.exec import ExecSession
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.containers.model import ExecRequest, ExecStart, parse
from lazarette.storage.errors import InvalidArgument


def routes(manager: ContainerManager) -> list[Route]:
    """The routes over the containers' exec sessions."""
    made = ExecRoutes(manager)
    return [
        Route("POST", "/containers/{id}/exec", made.create),
        Route("POST", "/exec/{id}/start", made.start),
        Route("POST", "/exec/{id}/resize", made.resize),
        Route("GET", "/exec/{id}/json", made.inspect),
    ]


class ExecRoutes:
    """The handlers.

    Args:
        manager: the service.
    """

    def __init__(self, manager: ContainerManager) -> None:
        self._manager = manager

    async def create(self, call: Call) -> web.StreamResponse:
        """``POST /containers/{id}/exec``."""
        container = self._manager.get(call.path["id"])
        request = parse(ExecRequest, await call.json(dict[str, object]))
        session = self._manager.execs.create(container, request)
        return json_response({"Id": session.id}, 201)

    async def start(self, call: Call) -> web.StreamResponse:
        """``POST /exec/{id}/start``: hijacks the connection unless detached."""
        body = parse(ExecStart, await call.json(dict[str, object]))
        session = self._manager.execs.get(call.path["id"])
        request = session.request
        attached = request.attach_stdin or request.attach_stdout or request.attach_stderr
        if body.detach or not attached:
            await self._manager.execs.start(session, body.console_size)
            return empty(200)
        raw = body.tty

        async def take_over() -> RawStream:
            return hijack(call, multiplexed=not raw)

        await self._manager.execs.run_attached(session, raw, body.console_size, take_over)
        return HijackedResponse()

    async def resize(self, call: Call) -> web.StreamResponse:
        """``POST /exec/{id}/resize``."""
        session = self._manager.execs.get(call.path["id"])
        height, width = dimensions(call)
        await self._manager.execs.resize(session, height, width)
        return empty(200)

    async def inspect(self, call: Call) -> web.StreamResponse:
        """``GET /exec/{id}/json``."""
        return json_response(rendered(self._manager.execs.get(call.path["id"])))


def dimensions(call: Call) -> tuple[int, int]:
    """Height and width of a terminal.

    Raises:
        InvalidArgument: one is missing or no number.
    """
    found = []
    for key in ("h", "w"):
        value = call.number(key)
        if value is None or not 0 <= value < 1 << 32:
            raise InvalidArgument(f"invalid resize {'height' if key == 'h' else 'width'}")
        found.append(value)
    return found[0], found[1]


def rendered(session: ExecSession) -> Mapping[str, object]:
    """A session as the Engine shows it."""
    request, command = session.request, session.command
    return {
        "ID": session.id,
        "Running": session.running,
        "ExitCode": session.exit_code,
        "ProcessConfig": {
            "tty": request.tty,
            "entrypoint": command[0],
            "arguments": command[1:],
            "privileged": request.privileged,
            **({"user": request.user} if request.user else {}),
        },
        "OpenStdin": request.attach_stdin,
        "OpenStderr": request.attach_stderr,
        "OpenStdout": request.attach_stdout,
        "CanRemove": session.exit_code is not None,
        "ContainerID": session.container.id,
        "DetachKeys": "",
        "Pid": session.pid,
    }

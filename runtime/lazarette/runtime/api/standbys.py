"""Routes under ``/lazarette/v1/standbys``: volumes that follow another host's backups."""

from __future__ import annotations

import msgspec
from aiohttp import web

from lazarette.runtime.api.http import Call, Route, empty, json_response
from lazarette.runtime.api.lazarette import Tell, long_work, teller
from lazarette.runtime.protection.service import Protection
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import InvalidArgument

_PATH = "/lazarette/v1/standbys"
_SHORTEST_NS = NANOSECONDS // 10


class FollowBody(msgspec.Struct):
    """A volume that is to follow its history; ``every_ns`` is how often to look."""

    volume: str
    repository: str = ""
    every_ns: int = 10 * NANOSECONDS
    over: bool = False


class PromoteBody(msgspec.Struct):
    """How to take over; ``start`` starts the containers that ran."""

    start: bool = True


class StandbyRoutes:
    """Handlers of standbys and of fenced volumes."""

    def __init__(self, protection: Protection) -> None:
        self._protection = protection

    def routes(self) -> list[Route]:
        """All routes."""
        return [
            Route("GET", _PATH, self.list),
            Route("POST", _PATH, self.follow),
            Route("GET", _PATH + "/{volume}", self.show),
            Route("DELETE", _PATH + "/{volume}", self.end),
            Route("POST", _PATH + "/{volume}/promote", self.promote),
            Route("GET", "/lazarette/v1/fences", self.fences),
        ]

    async def list(self, call: Call) -> web.StreamResponse:
        """All standbys."""
        return json_response([_shown(one) for one in self._protection.standbys.book.all()])

    async def show(self, call: Call) -> web.StreamResponse:
        """One standby."""
        return json_response(_shown(self._protection.standbys.get(call.path["volume"])))

    async def follow(self, call: Call) -> web.StreamResponse:
        """Let a volume follow."""
        body = await call.json(FollowBody)
        if body.every_ns < _SHORTEST_NS:
            raise InvalidArgument(f"looking every {body.every_ns} ns is too often: 0.1 s at least")
        made = await self._protection.standbys.follow(
            body.volume, body.repository, body.every_ns, body.over
        )
        return json_response(_shown(made), 201)

    async def end(self, call: Call) -> web.StreamResponse:
        """Follow no more."""
        await self._protection.standbys.end(call.path["volume"])
        return empty()

    async def promote(self, call: Call) -> web.StreamResponse:
        """Take over."""
        body = await call.json(PromoteBody)

        async def work(tell: Tell) -> object:
            return await self._protection.standbys.promote(
                call.path["volume"], start=body.start, show=teller(tell)
            )

        return await long_work(call, work)

    async def fences(self, call: Call) -> web.StreamResponse:
        """Volumes of this host that another took over."""
        return json_response(
            [msgspec.to_builtins(one) for one in self._protection.fencing.fences()]
        )


def _shown(one: object) -> object:
    return msgspec.to_builtins(one)

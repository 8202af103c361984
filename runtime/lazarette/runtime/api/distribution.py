"""Registry operations of the Engine API: ``/auth`` and ``/distribution/NAME/json``."""

from __future__ import annotations

from aiohttp import web

from lazarette.runtime.api.http import Call, Route, json_response
from lazarette.runtime.images import reference
from lazarette.runtime.images.credentials import Credentials
from lazarette.runtime.images.registries import Registries


class DistributionRoutes:
    """The handlers.

    Args:
        registries: asked.
    """

    def __init__(self, registries: Registries) -> None:
        self._registries = registries

    async def login(self, call: Call) -> web.StreamResponse:
        """``POST /auth``."""
        given = await call.json(Credentials)
        token = await self._registries.login(given)
        return json_response({"Status": "Login Succeeded", "IdentityToken": token})

    async def inspect(self, call: Call) -> web.StreamResponse:
        """``GET /distribution/{name}/json``."""
        name = reference.parse(call.path["name"]).with_default_tag()
        auth = call.request.headers.get("X-Registry-Auth", "")
        return json_response(await self._registries.inspect(name, auth=auth))


def routes(registries: Registries) -> list[Route]:
    """The routes of the registry group."""
    handlers = DistributionRoutes(registries)
    return [
        Route("POST", "/auth", handlers.login),
        Route("GET", "/distribution/{name:.*}/json", handlers.inspect),
    ]

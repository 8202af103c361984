"""Groups of the Engine API that this engine has not, answered as one without them does.

Swarm: every route says that the node is no manager.  Managed plugins: there are none.
BuildKit's ``/session`` and ``/grpc`` stay unknown paths, which makes clients fall back.
"""

from __future__ import annotations

from aiohttp import web

from lazarette.runtime.api.http import Call, Route, json_response
from lazarette.storage.errors import NotFound, Unavailable, Unsupported

_NO_MANAGER = (
    'This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to '
    "connect this node to swarm and try again."
)
_LISTS = ("nodes", "services", "tasks", "secrets", "configs")


def routes() -> list[Route]:
    """All routes that only say no."""
    made = [
        Route("GET", "/swarm", _no_manager),
        Route("POST", "/swarm/init", _no_swarm),
        Route("POST", "/swarm/join", _no_swarm),
        Route("POST", "/swarm/leave", _not_part),
        Route("POST", "/swarm/unlock", _no_manager),
        Route("GET", "/swarm/unlockkey", _no_manager),
        Route("POST", "/swarm/update", _no_manager),
        Route("GET", "/plugins", _no_plugins),
        Route("GET", "/plugins/privileges", _unsupported),
        Route("GET", "/plugins/{name:.*}/json", _no_plugin),
        Route("DELETE", "/plugins/{name:.*}", _no_plugin),
        Route("POST", "/plugins/{rest:.*}", _unsupported),
    ]
    for group in _LISTS:
        made += [
            Route("GET", f"/{group}", _no_manager),
            Route("GET", f"/{group}/{{rest:.*}}", _no_manager),
            Route("POST", f"/{group}/{{rest:.*}}", _no_manager),
            Route("DELETE", f"/{group}/{{rest:.*}}", _no_manager),
        ]
    return made


async def _no_manager(call: Call) -> web.StreamResponse:
    raise Unavailable(_NO_MANAGER)


async def _no_swarm(call: Call) -> web.StreamResponse:
    raise Unavailable("this engine has no swarm mode")


async def _not_part(call: Call) -> web.StreamResponse:
    raise Unavailable("This node is not part of a swarm")


async def _no_plugins(call: Call) -> web.StreamResponse:
    return json_response([])


async def _no_plugin(call: Call) -> web.StreamResponse:
    raise NotFound(f'plugin "{call.path["name"]}" not found')


async def _unsupported(call: Call) -> web.StreamResponse:
    raise Unsupported("this engine has no managed plugins")

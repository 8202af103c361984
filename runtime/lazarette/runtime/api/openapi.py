"""A description of the API in OpenAPI 3.1, made of the routes that answer it.

Paths and summaries come from the routes themselves, bodies from the types they are read
into; only the names of query values are listed here, and a test compares them with what
the handlers read.  Served at ``GET /lazarette/v1/openapi.json``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence

import msgspec
from aiohttp import web

from lazarette.runtime.api import builds, networks, standbys, volumes
from lazarette.runtime.api import lazarette as ours
from lazarette.runtime.api.http import API_VERSION, Call, Route, json_response, version_text
from lazarette.runtime.containers.model import (
    CreateRequest,
    ExecRequest,
    ExecStart,
    UpdateRequest,
)
from lazarette.runtime.images import model
from lazarette.runtime.images.credentials import Credentials

PATH = "/lazarette/v1/openapi.json"
_REFERENCE = "#/components/schemas/{name}"
_TAR = "application/x-tar"
_KINDS = {"b": "boolean", "i": "integer", "s": "string"}

# Name and kind (boolean, integer, string) of the values of each query.
_QUERIES = {
    "GET /events": "since:s until:s filters:s",
    "GET /system/df": "type:s",
    "POST /build": "dockerfile:s t:s extrahosts:s remote:s q:b nocache:b cachefrom:s pull:s rm:b "
    "forcerm:b memory:i memswap:i cpushares:i cpusetcpus:s cpusetmems:s cpuperiod:i cpuquota:i "
    "buildargs:s shmsize:i squash:b labels:s networkmode:s platform:s target:s isolation:s "
    "outputs:s ulimits:s cgroupparent:s securityopt:s version:s session:s "
    "session-secrets:s allow:s nocachefilter:s",
    "POST /build/prune": "reserved-space:i keep-storage:i max-used-space:i min-free-space:i "
    "all:b filters:s",
    "POST /containers/create": "name:s platform:s",
    "GET /containers/json": "all:b limit:i size:b filters:s",
    "POST /containers/prune": "filters:s",
    "GET /containers/{id}/json": "size:b",
    "DELETE /containers/{id}": "force:b v:b link:b",
    "DELETE /containers/{name}/{alias}": "link:b",
    "POST /containers/{id}/start": "detachKeys:s",
    "POST /containers/{id}/stop": "t:i signal:s",
    "POST /containers/{id}/restart": "t:i signal:s",
    "POST /containers/{id}/kill": "signal:s",
    "POST /containers/{id}/rename": "name:s",
    "POST /containers/{id}/wait": "condition:s",
    "POST /containers/{id}/resize": "h:i w:i",
    "POST /containers/{id}/attach": "stdin:b stdout:b stderr:b stream:b logs:b detachKeys:s",
    "GET /containers/{id}/attach/ws": "stdin:b stdout:b stderr:b stream:b logs:b detachKeys:s",
    "GET /containers/{id}/logs": "stdout:b stderr:b follow:b since:s until:s timestamps:b "
    "details:b tail:s",
    "GET /containers/{id}/stats": "stream:b one-shot:b",
    "GET /containers/{id}/top": "ps_args:s",
    "HEAD /containers/{id}/archive": "path:s",
    "GET /containers/{id}/archive": "path:s",
    "PUT /containers/{id}/archive": "path:s noOverwriteDirNonDir:b copyUIDGID:b",
    "POST /exec/{id}/resize": "h:i w:i",
    "GET /images/json": "all:b filter:s filters:s shared-size:b manifests:b",
    "GET /images/search": "term:s limit:i",
    "GET /images/get": "names:s",
    "POST /images/create": "fromImage:s fromSrc:s repo:s tag:s message:s changes:s platform:s",
    "POST /images/load": "quiet:b platform:s",
    "POST /images/prune": "filters:s",
    "POST /commit": "container:s repo:s tag:s comment:s author:s pause:b changes:s",
    "GET /images/{name}/json": "manifests:b platform:s",
    "POST /images/{name}/push": "tag:s platform:s",
    "POST /images/{name}/tag": "repo:s tag:s",
    "DELETE /images/{name}": "force:b noprune:b platforms:s",
    "GET /networks": "filters:s",
    "GET /networks/{id}": "verbose:b scope:s",
    "POST /networks/prune": "filters:s",
    "GET /volumes": "filters:s",
    "POST /volumes/prune": "filters:s",
    "DELETE /volumes/{name}": "force:b",
    "GET /lazarette/v1/volumes/{name}/diff": "base:s target:s",
    "GET /lazarette/v1/volumes/{name}/export": "snapshot:s",
    "GET /lazarette/v1/backups": "volume:s repository:s",
    "GET /lazarette/v1/runs": "volume:s limit:i",
    "GET /lazarette/v1/history": "volume:s kind:s limit:i",
}
_BODIES: dict[str, type[msgspec.Struct]] = {
    "POST /containers/create": CreateRequest,
    "POST /containers/{id}/update": UpdateRequest,
    "POST /containers/{id}/exec": ExecRequest,
    "POST /exec/{id}/start": ExecStart,
    "POST /auth": Credentials,
    "POST /commit": model.RunConfig,
    "POST /networks/create": networks.CreateBody,
    "POST /networks/{id}/connect": networks.ConnectBody,
    "POST /networks/{id}/disconnect": networks.DisconnectBody,
    "POST /volumes/create": volumes.CreateBody,
    "POST /lazarette/v1/snapshots": volumes.SnapshotBody,
    "POST /lazarette/v1/volumes/{name}/clone": volumes.CloneBody,
    "POST /lazarette/v1/volumes/{name}/rollback": volumes.RollbackBody,
    "POST /lazarette/v1/volumes/{name}/resize": volumes.ResizeBody,
    "POST /lazarette/v1/volumes/{name}/rename": volumes.RenameBody,
    "PUT /lazarette/v1/volumes/{name}/labels": volumes.LabelsBody,
    "POST /lazarette/v1/volumes/{volume}/undo": ours.UndoBody,
    "POST /lazarette/v1/volumes/{volume}/fill": ours.FillBody,
    "POST /lazarette/v1/branches": ours.BranchBody,
    "POST /lazarette/v1/builds/secrets": builds.SecretsBody,
    "POST /lazarette/v1/repositories": ours.RepositoryBody,
    "POST /lazarette/v1/repositories/{name}/check": ours.CheckBody,
    "POST /lazarette/v1/backups": ours.BackupBody,
    "POST /lazarette/v1/restores": ours.RestoreBody,
    "PUT /lazarette/v1/policies/{volume}": ours.PolicyBody,
    "POST /lazarette/v1/recover": ours.RecoverBody,
    "POST /lazarette/v1/standbys": standbys.FollowBody,
    "POST /lazarette/v1/standbys/{volume}/promote": standbys.PromoteBody,
}
_TARS = (
    "POST /build",
    "PUT /containers/{id}/archive",
    "POST /images/create",
    "POST /images/load",
    "POST /lazarette/v1/volumes/{name}/import",
)


def described(routes: Sequence[Route]) -> Route:
    """The route that describes these and itself."""

    async def description(call: Call) -> web.StreamResponse:
        """This description."""
        return json_response(describe([*routes, Route("GET", PATH, description)]))

    return Route("GET", PATH, description)


def describe(routes: Sequence[Route]) -> dict[str, object]:
    """The description of some routes."""
    shown, schemas = msgspec.json.schema_components(
        _BODIES.values(),
        schema_hook=lambda _: {"description": "Any value."},
        ref_template=_REFERENCE,
    )
    bodies = dict(zip(_BODIES, shown, strict=True))
    paths: dict[str, dict[str, object]] = {}
    for route in routes:
        path = plain(route.path)
        paths.setdefault(path, {}).setdefault(route.method.lower(), _operation(route, path, bodies))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Lazarette",
            "version": version_text(API_VERSION),
            "description": "The Docker Engine API, and volumes that protect themselves under "
            "/lazarette/v1. Every path may begin with /v and a version of the Engine API.",
        },
        "paths": paths,
        "components": {"schemas": {**schemas, "Error": _ERROR}},
    }


def plain(path: str) -> str:
    """A route's path without what says how a part is matched."""
    return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", path)


_ERROR: Mapping[str, object] = {
    "type": "object",
    "properties": {
        "message": {"type": "string"},
        "hint": {"type": "string"},
        "code": {"type": "integer"},
        "exit": {"type": "integer"},
    },
    "required": ["message"],
}


def _operation(route: Route, path: str, bodies: Mapping[str, object]) -> dict[str, object]:
    key = f"{route.method} {path}"
    parameters: list[object] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]
    for word in _QUERIES.get(key, "").split():
        name, _, kind = word.partition(":")
        parameters.append({"name": name, "in": "query", "schema": {"type": _KINDS[kind]}})
    made: dict[str, object] = {
        "summary": (inspect.getdoc(route.handler) or key).splitlines()[0].strip("`."),
        "parameters": parameters,
        "responses": {
            "default": {
                "description": "The answer, or why there is none.",
                "content": {"application/json": {}},
            },
            "4XX": _failure("The request cannot be answered."),
            "5XX": _failure("The engine or what it needs failed."),
        },
    }
    if key in bodies:
        made["requestBody"] = {"content": {"application/json": {"schema": bodies[key]}}}
    elif key in _TARS:
        made["requestBody"] = {"content": {_TAR: {"schema": {"type": "string"}}}}
    return made


def _failure(text: str) -> dict[str, object]:
    schema = {"$ref": _REFERENCE.format(name="Error")}
    return {"description": text, "content": {"application/json": {"schema": schema}}}

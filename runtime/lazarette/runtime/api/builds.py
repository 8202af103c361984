"""Builds: ``POST /build`` with Docker's parameters and stream, and pruning of the cache.

Ours beside it: ``POST /lazarette/v1/builds/secrets`` and ``…/contexts`` take secrets
and named contexts before a build, and
``GET /lazarette/v1/images/NAME/files`` gives an image's tree as a tar, for ``--output``.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

import msgspec
from aiohttp import web

from lazarette.fuse import jsontext
from lazarette.runtime.api.http import Call, Route, json_response, stream
from lazarette.runtime.api.transfer import BodyReader, BodyWriter
from lazarette.runtime.builds.builder import Builder, Built
from lazarette.runtime.builds.errors import StepFailed
from lazarette.runtime.builds.options import BuildOptions, Limits, Secret
from lazarette.runtime.builds.output import write_tree
from lazarette.runtime.builds.session import Handed, Sessions
from lazarette.runtime.builds.usage import FILTERS, CacheUsage, PruneRequest
from lazarette.runtime.images.credentials import from_config_header, to_header
from lazarette.storage.clock import Clock
from lazarette.storage.errors import (
    Cancelled,
    Conflict,
    InternalError,
    InvalidArgument,
    LazaretteError,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
_BUILDKIT = "2"
_LOOK_S = 1.0


class _Ulimit(msgspec.Struct, rename="pascal"):
    name: str
    soft: int = 0
    hard: int = 0


class SecretsBody(msgspec.Struct):
    """Body of ``POST /lazarette/v1/builds/secrets``; secrets in base64."""

    secrets: dict[str, str] = {}
    ssh: dict[str, str] = {}


class BuildRoutes:
    """The handlers.

    Args:
        builder: builds.
        clock: for ages.
    """

    def __init__(self, builder: Builder, clock: Clock) -> None:
        self._builder = builder
        self._sessions = Sessions(clock)
        self.usage = CacheUsage(builder, clock)
        self._pruning = asyncio.Lock()

    def routes(self) -> list[Route]:
        """The routes of the build group."""
        return [
            Route("POST", "/build", self.build),
            Route("POST", "/build/prune", self.prune),
            Route("POST", "/lazarette/v1/builds/secrets", self.secrets),
            Route("POST", "/lazarette/v1/builds/contexts", self.contexts),
            Route("GET", "/lazarette/v1/images/{name:.*}/files", self.files),
        ]

    async def build(self, call: Call) -> web.StreamResponse:
        """``POST /build``."""
        options = build_options(call, self._sessions)
        body = None if options.remote else BodyReader(call.request.content).stream
        talk = _Talk(call, options.quiet)
        working = asyncio.ensure_future(self._builder.build(body, options, talk.tell))
        working.add_done_callback(lambda _: talk.end())
        try:
            await talk.pass_on()
            built = await working
        except (ConnectionError, asyncio.CancelledError):
            working.cancel()
            with suppress(asyncio.CancelledError, LazaretteError):
                await working
            raise
        except LazaretteError as failed:
            if not talk.told and not isinstance(failed, StepFailed | Cancelled):
                raise
            return await talk.fail(failed)
        except Exception:
            if talk.response is None:
                raise
            log.exception("build failed")
            return await talk.fail(InternalError("internal error, see the daemon's log"))
        return await talk.finish(built)

    async def prune(self, call: Call) -> web.StreamResponse:
        """``POST /build/prune``."""
        keep = call.number("reserved-space") or call.number("keep-storage") or 0
        most, free = call.number("max-used-space"), call.number("min-free-space")
        request = PruneRequest(call.flag("all"), keep or most or 0, call.filters(FILTERS))
        if free and self.usage.free_bytes() >= free:
            return json_response({"CachesDeleted": None, "SpaceReclaimed": 0})
        if self._pruning.locked():
            raise Conflict("a prune operation is already running")
        async with self._pruning:
            gone = await asyncio.to_thread(self.usage.prune, request)
        return json_response(
            {"CachesDeleted": list(gone.ids) or None, "SpaceReclaimed": gone.bytes}
        )

    async def secrets(self, call: Call) -> web.StreamResponse:
        """``POST /lazarette/v1/builds/secrets``."""
        given = await call.json(SecretsBody)
        try:
            made = {
                name: Secret(base64.b64decode(text, validate=True))
                for name, text in given.secrets.items()
            }
        except ValueError as bad:  # no ASCII, or no base64
            raise InvalidArgument("a secret is not base64") from bad
        return json_response({"session": self._sessions.put(Handed(made, given.ssh))})

    async def contexts(self, call: Call) -> web.StreamResponse:
        """``POST /lazarette/v1/builds/contexts``: a folder's tar, for one build."""
        body = BodyReader(call.request.content).stream
        value = await asyncio.to_thread(self._builder.uploads.put, body)
        return json_response({"context": value})

    async def files(self, call: Call) -> web.StreamResponse:
        """``GET /lazarette/v1/images/{name}/files``."""
        image = await asyncio.to_thread(self._builder.images.get, call.path["name"])
        response = await stream(call, "application/x-tar")
        writer = BodyWriter(response)

        def send() -> None:
            write_tree(self._builder.images, image, writer.stream)
            writer.flush()

        await asyncio.to_thread(send)
        await response.write_eof()
        return response


class _Talk:
    """The answer of a build: begun with the first message, so that errors before it are
    plain HTTP errors."""

    def __init__(self, call: Call, quiet: bool) -> None:
        self._call = call
        self._quiet = quiet
        self._queue: asyncio.Queue[Mapping[str, object] | None] = asyncio.Queue()
        self.response: web.StreamResponse | None = None
        self.told = False

    def tell(self, message: Mapping[str, object]) -> None:
        """A message of the build."""
        self.told = True
        if not self._quiet:
            self._queue.put_nowait(message)

    def end(self) -> None:
        """No more messages come."""
        self._queue.put_nowait(None)

    async def pass_on(self) -> None:
        """Send messages until the end.

        Raises:
            ConnectionResetError: the client is gone.
        """
        while True:
            try:
                message = await asyncio.wait_for(self._queue.get(), _LOOK_S)
            except TimeoutError:
                transport = self._call.request.transport
                if transport is None or transport.is_closing():
                    raise ConnectionResetError("the client is gone") from None
                continue
            batch = b""
            while message is not None:
                batch += _line(message)
                if self._queue.empty():
                    break
                message = self._queue.get_nowait()
            if batch:
                await self._send(batch)
            if message is None:
                return

    async def _send(self, data: bytes) -> web.StreamResponse:
        if self.response is None:
            self.response = await stream(self._call)
        await self.response.write(data)
        return self.response

    async def fail(self, failed: LazaretteError) -> web.StreamResponse:
        """End with an error, in-band."""
        code = failed.code if isinstance(failed, StepFailed) else 1
        detail = {"code": code, "message": failed.message}
        response = await self._send(
            _line({"errorDetail": detail, "error": failed.message, "hint": failed.hint})
            if failed.hint
            else _line({"errorDetail": detail, "error": failed.message})
        )
        await response.write_eof()
        return response

    async def finish(self, built: Built) -> web.StreamResponse:
        """End well; quiet builds say only the image's id."""
        response = self.response
        if self._quiet or response is None:
            response = await self._send(_line({"stream": f"{built.image_id}\n"}))
        await response.write_eof()
        return response


def _line(message: Mapping[str, object]) -> bytes:
    return msgspec.json.encode(message) + b"\r\n"


def build_options(call: Call, sessions: Sessions) -> BuildOptions:
    """The query and headers of ``POST /build``, read.

    Raises:
        InvalidArgument: a value that cannot be.
    """
    if call.text("version") == _BUILDKIT:
        raise InvalidArgument(
            "buildkit is not supported by this daemon", hint="set DOCKER_BUILDKIT=0"
        )
    handed = sessions.take(call.text("session-secrets"))
    return BuildOptions(
        tags=tuple(tag for tag in call.texts("t") if tag),
        dockerfile=call.text("dockerfile"),
        build_args=_decoded(call, "buildargs", dict[str, str | None]) or {},
        labels=_decoded(call, "labels", dict[str, str]) or {},
        target=call.text("target"),
        platform=call.text("platform"),
        no_cache=call.flag("nocache"),
        no_cache_stages=frozenset(call.texts("nocachefilter")),
        cache_from=tuple(_decoded(call, "cachefrom", list[str]) or ()),
        pull=call.flag("pull"),
        quiet=call.flag("q"),
        squash=call.flag("squash"),
        network=call.text("networkmode") or "default",
        extra_hosts=tuple(_extra_hosts(call.texts("extrahosts"))),
        limits=_limits(call),
        remove=call.flag("rm", True),
        force_remove=call.flag("forcerm"),
        remote=call.text("remote"),
        secrets=handed.secrets,
        ssh=handed.ssh,
        contexts=_decoded(call, "contexts", dict[str, str]) or {},
        entitlements=frozenset(call.texts("allow")),
        auths={
            host: to_header(given)
            for host, given in from_config_header(
                call.request.headers.get("X-Registry-Config", "")
            ).items()
        },
    )


def _decoded(call: Call, key: str, kind: type[T]) -> T | None:
    raw = call.text(key)
    if not raw or raw == "null":
        return None
    try:
        return jsontext.decode(raw, type=kind, strict=False)
    except msgspec.MsgspecError as bad:
        raise InvalidArgument(f"error reading {key}: {bad}") from bad


def _extra_hosts(given: Sequence[str]) -> list[str]:
    """Repeated, or one JSON object as some clients send it."""
    found: list[str] = []
    for text in given:
        if text.startswith("{"):
            try:
                hosts = jsontext.decode(text, type=dict[str, str])
            except msgspec.MsgspecError as bad:
                raise InvalidArgument(f"error reading extrahosts: {bad}") from bad
            found += [f"{name}:{address}" for name, address in hosts.items()]
        elif text:
            found.append(text)
    return found


def _limits(call: Call) -> Limits:
    ulimits = _decoded(call, "ulimits", list[_Ulimit]) or []
    return Limits(
        memory=call.number("memory") or 0,
        memory_swap=call.number("memswap") or 0,
        cpu_shares=call.number("cpushares") or 0,
        cpu_period=call.number("cpuperiod") or 0,
        cpu_quota=call.number("cpuquota") or 0,
        cpus=call.text("cpusetcpus"),
        memory_nodes=call.text("cpusetmems"),
        shm_size=call.number("shmsize") or 0,
        ulimits={one.name: (one.soft, one.hard) for one in ulimits},
    )

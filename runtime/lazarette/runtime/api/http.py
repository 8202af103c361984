"""The frame of the API: routes, versions, bodies, errors and streams.

A route module is thin: it lists :class:`Route` objects whose handlers take a
:class:`Call`, parse it into typed values, call a service and render the answer.  What
clients depend on everywhere is done once here:

- ``/vX.Y`` is optional; unknown paths and methods are ``404 {"message": "page not found"}``;
- errors become ``{"message": …}`` with the status of their class;
- booleans, integers, filters and JSON bodies are read as the Engine reads them;
- streams send their headers at once and are chunked.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from aiohttp import web

from lazarette.fuse import jsontext
from lazarette.runtime import gojson
from lazarette.storage.errors import InternalError, InvalidArgument, LazaretteError

API_VERSION = (1, 50)
MIN_API_VERSION = (1, 24)

log = logging.getLogger(__name__)

T = TypeVar("T")
_VERSIONED = re.compile(r"^/v(\d+)\.(\d+)(/.*)$")
_LONGEST_BODY = 16 << 20
_FALSE = frozenset({"", "0", "no", "false", "none"})


def version_text(version: tuple[int, int]) -> str:
    """``(1, 50)`` as ``1.50``."""
    return f"{version[0]}.{version[1]}"


@dataclass(frozen=True)
class Call:
    """One request, with what every handler needs of it.

    Attributes:
        request: aiohttp's request, for streams and hijacking.
        version: the API version asked for.
        path: named parts of the path.
    """

    request: web.BaseRequest
    version: tuple[int, int]
    path: Mapping[str, str]

    def text(self, key: str, default: str = "") -> str:
        """A query value."""
        return self.request.query.get(key, default)

    def texts(self, key: str) -> list[str]:
        """All values of a repeated query key."""
        return list(self.request.query.getall(key, []))

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean: empty, 0, no, false and none are false, all else is true."""
        value = self.request.query.get(key)
        return default if value is None else value.strip().lower() not in _FALSE

    def number(self, key: str, default: int | None = None) -> int | None:
        """An integer of 64 bits.

        Raises:
            InvalidArgument: it is not one.
        """
        value = self.request.query.get(key)
        if value is None or value == "":
            return default
        try:
            number = int(value)
        except ValueError as bad:
            raise InvalidArgument(f'invalid value for {key}: "{value}" is not a number') from bad
        if not -(1 << 63) <= number < 1 << 63:
            raise InvalidArgument(f'invalid value for {key}: "{value}" is out of range')
        return number

    def filters(self, known: Sequence[str]) -> dict[str, list[str]]:
        """The ``filters`` query in either of its encodings, as lists of values.

        Raises:
            InvalidArgument: not JSON of that form, or a key that is not in ``known``.
        """
        return parse_filters(self.request.query.get("filters", ""), known)

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            InvalidArgument: it is longer than any request of the API is.
        """
        read = bytearray()
        async for piece in self.request.content.iter_any():
            read += piece
            if len(read) > _LONGEST_BODY:
                raise InvalidArgument(f"request body is longer than {_LONGEST_BODY} bytes")
        return bytes(read)

    async def json(self, kind: type[T]) -> T:
        """The body as ``kind``, read as Go does; an empty body is an empty object.

        Raises:
            InvalidArgument: wrong content type, broken JSON, or values of wrong type.
        """
        body = await self.body()
        if body.strip():
            content_type = self.request.headers.get("Content-Type", "")
            if content_type.split(";")[0].strip().lower() != "application/json":
                raise InvalidArgument(
                    f"unsupported Content-Type header ({content_type}): must be 'application/json'"
                )
        try:
            given = jsontext.decode(body.strip() or b"{}")
            return gojson.convert({} if given is None else given, kind)
        except msgspec.DecodeError as bad:
            raise InvalidArgument(f"invalid JSON: {bad}") from bad


Handler = Callable[[Call], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Route:
    """A method and a path with ``{part}`` (one segment) or ``{part:.*}`` (many, greedy)."""

    method: str
    path: str
    handler: Handler

    def pattern(self) -> re.Pattern[str]:
        """The path as a regular expression."""
        made = re.sub(
            r"\{(\w+)(:\.\*)?\}", lambda m: f"(?P<{m[1]}>{'.*' if m[2] else '[^/]+'})", self.path
        )
        return re.compile(made + "/?")


def parse_filters(raw: str, known: Sequence[str]) -> dict[str, list[str]]:
    """``{"label": {"a": true}}`` or ``{"label": ["a"]}`` as lists of values.

    Raises:
        InvalidArgument: not JSON of that form, or an unknown key.
    """
    if not raw.strip():
        return {}
    try:
        given = jsontext.decode(raw)
    except msgspec.DecodeError as bad:
        raise InvalidArgument(f"invalid filters: {bad}") from bad
    if not isinstance(given, dict):
        raise InvalidArgument("invalid filters: not an object")
    found: dict[str, list[str]] = {}
    for key, values in given.items():
        if key not in known:
            raise InvalidArgument(f"invalid filter '{key}'")
        if isinstance(values, dict):
            found[key] = [str(value) for value, on in values.items() if on]
        elif isinstance(values, list) and all(isinstance(value, str) for value in values):
            found[key] = list(values)
        elif isinstance(values, str):
            found[key] = [values]
        else:
            raise InvalidArgument(f"invalid filter '{key}'")
    return found


def json_response(value: object, status: int = 200) -> web.Response:
    """An answer of JSON: structs and plain values alike.

    Bytes of file names and of headers that are no UTF-8 live in our text as lone surrogates,
    which JSON cannot hold; as the Engine does, each becomes U+FFFD.
    """
    try:
        body = msgspec.json.encode(value)
    except UnicodeEncodeError:
        body = msgspec.json.encode(_printable(msgspec.to_builtins(value)))
    return web.Response(body=body + b"\n", status=status, content_type="application/json")


def _printable(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {_printable(key): _printable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(one) for one in value]
    return value


def empty(status: int = 204) -> web.Response:
    """An answer without a body."""
    return web.Response(status=status)


def error_response(error: LazaretteError) -> web.Response:
    """An error as the Engine tells it; the hint rides along for our own command line."""
    if error.http_status == 304:
        return web.Response(status=304)
    body: dict[str, object] = {"message": error.message}
    if error.hint:
        body["hint"] = error.hint
    body["code"] = error.number
    body["exit"] = error.exit_code
    return json_response(body, error.http_status if error.http_status != 499 else 500)


async def stream(
    call: Call, content_type: str = "application/json", headers: Mapping[str, str] | None = None
) -> web.StreamResponse:
    """Begin a chunked answer; its headers are on the wire when this returns."""
    response = web.StreamResponse(headers=dict(headers or {}))
    response.content_type = content_type
    response.enable_chunked_encoding()
    await response.prepare(call.request)
    return response


class Api:
    """All routes behind one handler.

    Args:
        routes: of every group; the first match wins, longer literal paths first.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = [(route, route.pattern()) for route in routes]

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        try:
            return await self._answer(request)
        except LazaretteError as error:
            return error_response(error)
        except ConnectionResetError:
            return web.Response(status=499)  # the client is gone: nobody reads it
        except web.HTTPException as refused:  # of the server underneath
            return json_response({"message": refused.text or refused.reason}, refused.status)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return error_response(InternalError("internal error, see the daemon's log"))

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path, version = request.path, API_VERSION
        if versioned := _VERSIONED.match(path):
            version = (int(versioned[1]), int(versioned[2]))
            path = versioned[3]
            self._check(version)
        if request.method == "OPTIONS":
            return web.Response(status=200)
        for route, pattern in self._routes:
            if route.method == request.method and (match := pattern.fullmatch(path)):
                return await route.handler(Call(request, version, match.groupdict()))
        return json_response({"message": "page not found"}, 404)

    @staticmethod
    def _check(version: tuple[int, int]) -> None:
        if version > API_VERSION:
            raise InvalidArgument(
                f"client version {version_text(version)} is too new. "
                f"Maximum supported API version is {version_text(API_VERSION)}"
            )
        if version < MIN_API_VERSION:
            raise InvalidArgument(
                f"client version {version_text(version)} is too old. "
                f"Minimum supported API version is {version_text(MIN_API_VERSION)}, "
                "please upgrade your client to a newer version"
            )

"""Connections that stop being HTTP: attach, exec and what else the Engine hijacks.

The client asks with ``Connection: Upgrade`` and gets exactly ``101 UPGRADED``; without
it ``200 OK`` and raw bytes until the end.  Bytes that came right behind the request are
handed on, and a client that closes its sending side only ends stdin.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from typing import TypeVar

from aiohttp import WSMsgType, web
from aiohttp.web_protocol import RequestHandler

from lazarette.runtime.api.http import Call
from lazarette.storage.errors import InternalError

RAW = "application/vnd.docker.raw-stream"
MULTIPLEXED = "application/vnd.docker.multiplexed-stream"
_HIGH_WATER = 1 << 20
_LONGEST_HEAD = 1 << 20
_HIJACKABLE = re.compile(rb"POST \S+/(attach(\?\S*)?|start(\?\S*)?) HTTP/1")
_CONTENT_LENGTH = re.compile(rb"(?im)^content-length:\s*(\d+)\s*$")
_CHUNKED = re.compile(rb"(?im)^transfer-encoding:")

T = TypeVar("T")


class HijackProtocol(RequestHandler):
    """aiohttp's connection, which survives a half-closed client once it is hijacked.

    aiohttp would read what comes right behind a request that is about to be hijacked as
    the next request.  So the end of such a request is found here, and what follows is
    held until it is known who gets it: more bytes, or that the client sends no more.

    Attributes:
        hijacked: the stream the connection became.
        lost: done when the connection is gone.
    """

    __slots__ = ("_beginning", "_body_left", "_ended", "_held", "_holding", "hijacked", "lost")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See :class:`asyncio.Protocol`."""
        self.hijacked: RawStream | None = None
        self._beginning = b""
        self._held = b""
        self._holding = self._ended = False
        self._body_left = 0
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See :class:`asyncio.Protocol`."""
        if not self.lost.done():
            self.lost.set_result(None)
        if self.hijacked is not None:
            self.hijacked.lose()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        if self.hijacked is not None:
            super().data_received(data)
        elif self._holding:
            body, behind = data[: self._body_left], data[self._body_left :]
            self._body_left -= len(body)
            self._held += behind
            if body:
                super().data_received(body)
        elif self._current_request is not None or self._messages:
            super().data_received(data)  # the body of the request being answered
        else:
            self._begin_request(self._beginning + data)

    def _begin_request(self, data: bytes) -> None:
        self._beginning = b""
        line, newline, _ = data.partition(b"\r\n")
        if newline and not _HIJACKABLE.match(line):
            super().data_received(data)
            return
        head, complete, rest = data.partition(b"\r\n\r\n")
        if not complete and len(data) < _LONGEST_HEAD and _is_request(data):
            self._beginning = data
            return
        length = _CONTENT_LENGTH.search(head)
        if not complete or _CHUNKED.search(head):
            super().data_received(data)
            return
        size = int(length[1]) if length else 0
        self._holding, self._held = True, rest[size:]
        self._body_left = max(0, size - len(rest))
        super().data_received(head + complete + rest[:size])

    def take_held(self) -> tuple[bytes, bool]:
        """What came behind the request, and whether that was all; it is no longer held."""
        held, self._held, self._holding = self._held, b"", False
        return held, self._ended

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """See aiohttp; a request that was not hijacked after all is followed by others."""
        done = await super().finish_response(request, resp, start_time)
        if self._holding:
            held, ended = self.take_held()
            if held:
                super().data_received(held)
            elif ended:
                self.close()  # it will not ask for more
        return done

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep sending after the client's end when the connection is, or may be, hijacked."""
        if self.hijacked is not None:
            self.hijacked.feed_eof()
            return True
        self._ended = self._holding and not self._body_left
        return self._ended

    async def drained(self) -> None:
        """Wait while the client reads too slowly."""
        await self._drain_helper()


class RawStream:
    """A hijacked connection: bytes both ways.

    Implements aiohttp's payload parser (``feed_data``, ``feed_eof``) towards the
    connection and :class:`~lazarette.runtime.containers.streams.ClientStream` towards us.
    """

    def __init__(self, protocol: HijackProtocol, transport: asyncio.Transport) -> None:
        self._protocol = protocol
        self._transport = transport
        self._buffer = bytearray()
        self._ended = False
        self._lost = False
        self._paused = False
        self._changed = asyncio.Event()

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Take bytes from the connection."""
        self._buffer += data
        self._changed.set()
        if len(self._buffer) > _HIGH_WATER and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        return False, b""

    def feed_eof(self) -> None:
        """The client sends no more."""
        self._ended = True
        self._changed.set()

    def lose(self) -> None:
        """The connection is gone."""
        self._lost = True
        self._changed.set()

    async def read(self) -> bytes:
        """Some bytes; empty once the client sends no more.

        Raises:
            ConnectionResetError: the connection is gone.
        """
        while not self._buffer:
            if self._lost:
                raise ConnectionResetError("client is gone")
            if self._ended:
                return b""
            self._changed.clear()
            await self._changed.wait()
        data = bytes(self._buffer)
        self._buffer.clear()
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def gone(self) -> None:
        """Wait until the connection is gone."""
        while not self._lost:
            self._changed.clear()
            await self._changed.wait()

    async def write(self, data: bytes) -> None:
        """Send bytes.

        Raises:
            ConnectionResetError: the connection is gone.
        """
        if self._lost or self._transport.is_closing():
            raise ConnectionResetError("client is gone")
        self._transport.write(data)
        await self._protocol.drained()


class WebSocketStream:
    """A websocket as a client's stream: binary messages both ways."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket

    async def read(self) -> bytes:
        """The next message; empty once the client closed."""
        message = await self._socket.receive()
        if message.type is WSMsgType.TEXT:
            return str(message.data).encode()
        if message.type is WSMsgType.BINARY:
            return bytes(message.data)
        return b""

    async def write(self, data: bytes) -> None:
        """Send a message."""
        await self._socket.send_bytes(data)


class HijackedResponse(web.StreamResponse):
    """What a handler returns after it hijacked its connection: nothing more is written."""

    def __init__(self) -> None:
        super().__init__()
        self._keep_alive = False

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing: the head was written by :func:`hijack`."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing: the connection is closed behind it."""


def _is_request(data: bytes) -> bool:
    """Whether some bytes may begin a request."""
    return b"POST ".startswith(data[:5])


def hijack(call: Call, multiplexed: bool) -> RawStream:
    """Take the connection of a request over.

    Args:
        call: the request.
        multiplexed: stdout and stderr come as frames; told to clients from 1.42 on.
    """
    protocol, transport = call.request.protocol, call.request.transport
    if not isinstance(protocol, HijackProtocol) or transport is None:
        raise InternalError("this connection cannot be hijacked")
    kind = MULTIPLEXED if multiplexed and call.version >= (1, 42) else RAW
    if call.request.headers.get("Upgrade"):
        head = (
            f"HTTP/1.1 101 UPGRADED\r\nContent-Type: {kind}\r\n"
            "Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
        )
    else:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {RAW}\r\n\r\n"
    raw = RawStream(protocol, transport)
    transport.write(head.encode())
    protocol.hijacked = raw
    protocol.set_parser(raw)  # type: ignore[arg-type]
    held, ended = protocol.take_held()
    if held:
        raw.feed_data(held)
    if ended:
        raw.feed_eof()
    return raw


async def while_connected(call: Call, work: Awaitable[T]) -> T:
    """Do something that only its client cares about; stop when the client is gone.

    Raises:
        ConnectionResetError: the client went first.
    """
    task = asyncio.ensure_future(work)
    protocol = call.request.protocol
    if not isinstance(protocol, HijackProtocol):
        return await task
    either: set[asyncio.Future[T] | asyncio.Future[None]] = {task, protocol.lost}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise ConnectionResetError("client is gone")
    return task.result()

"""Bodies as plain files, for code that blocks: tar readers and writers in threads.

The loop moves the bytes; the thread sees ``read`` and ``write``.  Both sides meet once
for each :data:`PIECE`, so that the crossing costs little.
"""

from __future__ import annotations

import asyncio
import io
from typing import TYPE_CHECKING, BinaryIO, cast

from aiohttp import ClientError, StreamReader, web

from lazarette.storage.errors import InvalidArgument

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

PIECE = 1 << 20


class BodyBroken(InvalidArgument):
    """A body ended before it was whole."""

    number = 393


class BodyReader(io.RawIOBase):
    """A request's body as a blocking stream for one other thread.

    Args:
        body: of the request.
        loop: the loop the request lives in; the running one when None.
    """

    def __init__(self, body: StreamReader, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__()
        self._body = body
        self._loop = loop or asyncio.get_running_loop()
        self._ready = memoryview(b"")

    @property
    def stream(self) -> BinaryIO:
        """This object by the name of the type most functions ask for."""
        return cast(BinaryIO, self)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, target: WriteableBuffer, /) -> int:
        """Fill ``target`` with what is there; 0 at the end.

        Raises:
            BodyBroken: the other side went away in the middle.
        """
        if not self._ready:
            self._ready = memoryview(self._fetch())
        view = memoryview(target).cast("B")
        size = min(len(view), len(self._ready))
        view[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _fetch(self) -> bytes:
        """The next piece.

        Raises:
            BodyBroken: the other side went away in the middle.
        """
        try:
            return asyncio.run_coroutine_threadsafe(self._gather(), self._loop).result()
        except (ClientError, OSError, asyncio.IncompleteReadError) as gone:
            raise BodyBroken(f"reading a body: {gone or type(gone).__name__}") from gone

    async def _gather(self) -> bytes:
        pieces: list[bytes] = []
        size = 0
        while size < PIECE and (piece := await self._body.readany()):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)


class BodyWriter(io.RawIOBase):
    """A streamed answer as a blocking file for one other thread.

    Args:
        response: already prepared.
        loop: the loop it lives in; the running one when None.
    """

    def __init__(
        self, response: web.StreamResponse, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__()
        self._response = response
        self._loop = loop or asyncio.get_running_loop()
        self._waiting = bytearray()

    @property
    def stream(self) -> BinaryIO:
        """This object by the name of the type most functions ask for."""
        return cast(BinaryIO, self)

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        """Send, in pieces; blocks while the client is slow.

        Raises:
            ConnectionError: the client is gone.
        """
        self._waiting += data
        if len(self._waiting) >= PIECE:
            self.flush()
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        """Send what is waiting."""
        if self._waiting:
            piece, self._waiting = bytes(self._waiting), bytearray()
            sent = asyncio.run_coroutine_threadsafe(self._response.write(piece), self._loop)
            sent.result()

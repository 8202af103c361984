"""TLS whose ends are closed one at a time, as hijacked connections need.

The docker command line ends the standard input of ``docker run -i`` by closing its half
of the connection: over TLS, a ``close_notify``.  asyncio's own TLS closes both halves
then, and the output is lost.  So each connection is decrypted here, into a socket pair
whose other end the HTTP server has: what goes on behind it is the same as over a unix
socket, half-closes included.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

_PIECE = 1 << 16
_HANDSHAKE_S = 60.0


class TlsConnection(asyncio.Protocol):
    """The encrypted side of one connection.

    Args:
        context: certificate, and which clients are let in.
        server: makes the protocol that gets what was decrypted.
    """

    def __init__(self, context: ssl.SSLContext, server: Callable[[], asyncio.BaseProtocol]) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._server = server
        self._wire: asyncio.Transport | None = None
        self._plain: asyncio.Transport | None = None
        self._ready = self._finished = False
        self._opening: asyncio.Task[None] | None = None
        self._late: asyncio.TimerHandle | None = None

    # ---- the wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected: it has a minute for the handshake."""
        assert isinstance(transport, asyncio.Transport)
        self._wire = transport
        self._late = asyncio.get_running_loop().call_later(_HANDSHAKE_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Decrypt, or go on with the handshake."""
        self._incoming.write(data)
        try:
            if not self._ready:
                self._shake_hands()
            elif self._plain is not None:
                self._decrypt()
        except ssl.SSLError:
            self._flush()  # the alert that says why
            self._end()

    def eof_received(self) -> bool:
        """The client closed its half without a word of TLS."""
        self._end_input()
        return self._plain is not None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        if self._late is not None:
            self._late.cancel()
        if self._plain is not None:
            self._plain.close()

    def pause_writing(self) -> None:
        """The client reads slowly: the server waits."""
        if self._plain is not None:
            self._plain.pause_reading()

    def resume_writing(self) -> None:
        """The client caught up."""
        if self._plain is not None:
            self._plain.resume_reading()

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        finally:
            self._flush()
        self._ready = True
        if self._late is not None:
            self._late.cancel()
        self._opening = asyncio.get_running_loop().create_task(self._open())

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        await loop.connect_accepted_socket(self._server, theirs)
        plain, _ = await loop.create_connection(lambda: _PlainSide(self), sock=ours)
        self._plain = plain
        if self._wire is None or self._wire.is_closing():
            plain.close()
            return
        self.data_received(b"")  # what came while the sockets were made

    def _decrypt(self) -> None:
        assert self._plain is not None
        try:
            while data := self._tls.read(_PIECE):
                self._plain.write(data)
            self._end_input()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLZeroReturnError:
            self._end_input()
        finally:
            self._flush()

    def _end_input(self) -> None:
        if self._plain is not None and not self._plain.is_closing():
            self._plain.write_eof()

    def _flush(self) -> None:
        if self._outgoing.pending and self._wire is not None:
            self._wire.write(self._outgoing.read())

    def _end(self) -> None:
        if self._wire is not None:
            self._wire.close()

    # ---- the server's side

    def send(self, data: bytes) -> None:
        """Encrypt what the server says."""
        if self._finished:
            return
        self._tls.write(data)
        self._flush()

    def finish(self) -> None:
        """The server has said all: tell the client, and close."""
        if self._finished:
            return
        self._finished = True
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # the client's own word of parting is still to come, or never does
        self._flush()
        self._end()

    def hold(self, held: bool) -> None:
        """The server takes nothing for now: neither do we from the wire."""
        if self._wire is not None and not self._wire.is_closing():
            if held:
                self._wire.pause_reading()
            else:
                self._wire.resume_reading()


class _PlainSide(asyncio.Protocol):
    """The decrypted side: what the server writes comes in here."""

    def __init__(self, connection: TlsConnection) -> None:
        self._connection = connection

    def data_received(self, data: bytes) -> None:
        self._connection.send(data)

    def eof_received(self) -> bool:
        self._connection.finish()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.finish()

    def pause_writing(self) -> None:
        self._connection.hold(True)

    def resume_writing(self) -> None:
        self._connection.hold(False)

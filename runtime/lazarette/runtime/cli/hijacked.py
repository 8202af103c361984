"""A connection that stopped being HTTP, seen from the client: bytes both ways.

The reader of HTTP takes from the socket whatever is there, not just the head of the answer.
A program that is quick has written by then, so its first bytes, or all of them, stand in that
reader and never come out of the socket.
"""

from __future__ import annotations

import io
import os
import select
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import cast

import requests

_CHUNK = 65536
_STDIN = 0
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Hijacked:
    """The connection of an answer that said nothing more of HTTP is to come.

    Args:
        answer: it, asked for as a stream.
    """

    def __init__(self, answer: requests.Response) -> None:
        self._answer = answer  # the socket is closed with it
        reader = cast(io.BufferedReader, answer.raw._fp.fp)  # type: ignore[union-attr]
        self._socket = cast(socket.socket, getattr(reader.raw, "_sock"))  # noqa: B009
        self._socket.setblocking(False)
        try:
            self._early = reader.peek()
        except _NOT_NOW:  # TLS says so, a plain socket gives nothing
            self._early = b""

    def carry(self, show: Callable[[bytes], None], typing: bool) -> None:
        """Carry bytes both ways until the daemon ends the connection.

        Neither way waits for the other: a program that writes while it is written to would
        wait for us, and we for it.

        Args:
            show: gets what the daemon sends.
            typing: send standard input, and its end.
        """
        connection = self._socket.fileno()
        pending = memoryview(b"")
        if self._early:
            show(self._early)
        while True:
            ready = _ready(connection, bool(pending), typing and not pending)
            if ready.get(_STDIN):
                pending = memoryview(os.read(_STDIN, _CHUNK))
                typing = bool(pending)
                if not typing:
                    self._end_input()
            if pending and ready.get(connection, 0) & ~select.POLLIN:
                try:
                    pending = pending[self._socket.send(pending) :]
                except _NOT_NOW:
                    pass
                except ConnectionError:  # nobody reads it; what was said before is still to come
                    pending, typing = memoryview(b""), False
            if ready.get(connection, 0) & ~select.POLLOUT:
                try:
                    data = self._socket.recv(_CHUNK)
                except _NOT_NOW:
                    continue
                except ConnectionResetError:  # it ended before it had read all that was sent
                    return
                if not data:
                    return
                show(data)

    def _end_input(self) -> None:
        with suppress(OSError):
            # not an SSLSocket's own shutdown, after which it would no longer decrypt
            socket.socket.shutdown(self._socket, socket.SHUT_WR)


def _ready(connection: int, sending: bool, typing: bool) -> dict[int, int]:
    """Wait until something can be done; by poll(2), which takes regular files too."""
    waiting = select.poll()
    waiting.register(connection, select.POLLIN | (select.POLLOUT if sending else 0))
    if typing:
        waiting.register(_STDIN, select.POLLIN)
    return dict(waiting.poll())

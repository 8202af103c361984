"""A daemon's socket on standard input and output: the far end of ``docker -H ssh://``.

The docker command line runs ``docker system dial-stdio`` on the other host over ssh and
talks HTTP through it.  Either side may close its half first, as hijacked connections do.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from urllib.parse import urlsplit

from lazarette.storage.errors import InvalidArgument, Unavailable

_PIECE = 1 << 16


def dial_stdio(host: str) -> None:
    """Pass bytes both ways until the daemon closes the connection.

    Args:
        host: ``unix://PATH`` or ``tcp://HOST:PORT``.

    Raises:
        InvalidArgument: an address of another form.
        Unavailable: nobody listens there.
    """
    with connect(host) as daemon:
        # A daemon thread: its read of an open standard input must not keep us from ending.
        threading.Thread(target=_send, args=(daemon,), daemon=True).start()
        while piece := _received(daemon):
            _write(piece)


def connect(host: str) -> socket.socket:
    """A connection to a daemon.

    Raises:
        InvalidArgument: an address of another form.
        Unavailable: nobody listens there.
    """
    parts = urlsplit(host)
    try:
        if parts.scheme == "unix" and parts.path:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            made.connect(parts.path)
            return made
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return socket.create_connection((parts.hostname, parts.port))
    except (OSError, ValueError) as bad:
        raise Unavailable(f"connect to {host}: {bad}", hint="is lazd running there?") from bad
    raise InvalidArgument(f"connect to {host}: neither unix://PATH nor tcp://HOST:PORT")


def _send(daemon: socket.socket) -> None:
    try:
        while piece := os.read(sys.stdin.fileno(), _PIECE):
            daemon.sendall(piece)
        daemon.shutdown(socket.SHUT_WR)
    except OSError:
        return  # the daemon closed: the other direction ends everything


def _received(daemon: socket.socket) -> bytes:
    try:
        return daemon.recv(_PIECE)
    except ConnectionResetError:
        return b""


def _write(piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(sys.stdout.fileno(), view) :]

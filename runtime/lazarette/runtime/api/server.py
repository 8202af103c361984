"""Where the API listens: unix sockets, TCP on loopback, TCP with mutual TLS elsewhere."""

from __future__ import annotations

import asyncio
import errno
import grp
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from lazarette.runtime.api.hijack import HijackProtocol
from lazarette.runtime.api.http import Api
from lazarette.runtime.api.tls import TlsConnection
from lazarette.storage.errors import InvalidArgument, Unavailable

SOCKET_MODE = 0o660
SOCKET_GROUP = "docker"
_LONGEST_HEADER = 1 << 20
_KEEPALIVE = 3600.0


@dataclass(frozen=True)
class TlsFiles:
    """Certificate, key and the authority that signs clients' certificates."""

    certificate: Path
    key: Path
    client_authority: Path


class HijackServer(web.Server):
    """aiohttp's server with connections that can be hijacked."""

    def __call__(self) -> RequestHandler:
        """A protocol for a new connection."""
        return HijackProtocol(self, loop=self._loop, **self._kwargs)


class Runner:
    """The listening server.

    Attributes:
        addresses: where it listens, ports filled in.
    """

    def __init__(
        self, server: HijackServer, listeners: list[asyncio.Server], sockets: list[Path]
    ) -> None:
        self._server = server
        self._listeners = listeners
        self._sockets = sockets
        self.addresses = [
            listener.sockets[0].getsockname() for listener in listeners if listener.sockets
        ]

    async def close(self, grace: float = 5.0) -> None:
        """Stop listening, let requests end within ``grace`` seconds, close connections."""
        for listener in self._listeners:
            listener.close()
        await self._server.shutdown(grace)
        for path in self._sockets:
            path.unlink(missing_ok=True)


async def serve(hosts: Sequence[str], api: Api, tls: TlsFiles | None = None) -> Runner:
    """Listen on every address.

    Args:
        hosts: ``unix://PATH`` or ``tcp://HOST:PORT``.
        api: answers requests.
        tls: needed for TCP beyond loopback; clients must show a certificate.

    Raises:
        InvalidArgument: an address of another form, or TCP beyond loopback without TLS.
        Unavailable: another daemon listens there.
    """
    server = HijackServer(
        api,
        access_log=None,
        keepalive_timeout=_KEEPALIVE,
        max_line_size=_LONGEST_HEADER,
        max_field_size=_LONGEST_HEADER,
        auto_decompress=False,
    )
    listeners: list[asyncio.Server] = []
    paths: list[Path] = []
    loop = asyncio.get_running_loop()
    try:
        for host in hosts:
            scheme, _, rest = host.partition("://")
            if scheme == "unix" and rest:
                path = Path(rest)
                listeners.append(await loop.create_unix_server(server, sock=_unix(path)))
                paths.append(path)
            elif scheme == "tcp" and rest:
                name, port = _tcp(rest, tls)
                made = server if tls is None else _encrypted(server, tls_context(tls))
                listeners.append(await loop.create_server(made, name, port))
            else:
                raise InvalidArgument(f"listen on {host}: neither unix://PATH nor tcp://HOST:PORT")
    except BaseException:
        await Runner(server, listeners, paths).close(0)
        raise
    return Runner(server, listeners, paths)


def check_hosts(hosts: Sequence[str], tls: TlsFiles | None) -> None:
    """Refuse addresses before anything is made for the daemon.

    Raises:
        InvalidArgument: as :func:`serve`.
    """
    for host in hosts:
        scheme, _, rest = host.partition("://")
        if scheme == "tcp" and rest:
            _tcp(rest, tls)
        elif scheme != "unix" or not rest:
            raise InvalidArgument(f"listen on {host}: neither unix://PATH nor tcp://HOST:PORT")


def _encrypted(server: HijackServer, context: ssl.SSLContext) -> Callable[[], asyncio.BaseProtocol]:
    return lambda: TlsConnection(context, server)


def _unix(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        made.bind(str(path))
        os.chmod(path, SOCKET_MODE)
        try:
            os.chown(path, 0, grp.getgrnam(SOCKET_GROUP).gr_gid)
        except (KeyError, PermissionError):
            os.chmod(path, SOCKET_MODE & ~0o060)
        made.listen(1024)
        made.setblocking(False)
    except BaseException:
        made.close()
        raise
    return made


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InvalidArgument(f"listen on {path}: it exists and is no socket")
    except FileNotFoundError:
        return
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(str(path))
    except OSError as bad:
        if bad.errno in (errno.ECONNREFUSED, errno.ENOENT):
            path.unlink(missing_ok=True)
            return
        raise
    finally:
        probe.close()
    raise Unavailable(
        f"listen on {path}: another daemon listens there", hint="stop it, or choose another --host"
    )


def _tcp(rest: str, tls: TlsFiles | None) -> tuple[str, int]:
    name, _, port = rest.rpartition(":")
    name = name.strip("[]")
    if not port.isdecimal() or int(port) > 65535:
        raise InvalidArgument(f"listen on tcp://{rest}: no port number")
    if tls is None and not _is_loopback(name):
        raise InvalidArgument(
            f"listen on tcp://{rest}: beyond loopback only with TLS and client certificates",
            hint="give --tlscert, --tlskey and --tlscacert",
        )
    return name, int(port)


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def tls_context(files: TlsFiles) -> ssl.SSLContext:
    """TLS 1.2 or later, with clients that must show a certificate of the authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.client_authority)
    context.verify_mode = ssl.CERT_REQUIRED
    return context

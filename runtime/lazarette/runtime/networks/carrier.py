"""Ports the firewall cannot translate, carried by hand.

A port published on ``::1``, or on IPv6 for a container without it, arrives at the socket
that holds the port (see :mod:`~lazarette.runtime.networks.ports`); so does everything
while the table is flushed.  Connections are accepted there and copied to the container.
Their source is then the host, as with Docker's own proxy.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from lazarette.runtime.networks.background import Background
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.runtime.networks.ports import HeldPort

log = logging.getLogger(__name__)

Target = Callable[[], tuple[str, int] | None]
"""Where a port leads now: address and port of the container, None if nowhere."""

_BLOCK = 1 << 16
UDP_IDLE_SECONDS = 60.0
MOST_FLOWS = 1024


@dataclass
class _Carried:
    """What one held port has going on."""

    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def add(self, task: asyncio.Task[None]) -> None:
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class Carrier:
    """Carries traffic of held ports.

    Args:
        background: where it runs.
        host: the namespace containers are reached from.
    """

    def __init__(self, background: Background, host: NetNamespace) -> None:
        self._background = background
        self._host = host
        self._ports: dict[int, _Carried] = {}

    def start(self, held: HeldPort, target: Target) -> None:
        """Serve a held port; one without a socket is left alone."""
        if held.socket is not None and held.binding.proto in ("tcp", "udp"):
            self._background.do(self._start(held, held.socket, target))

    def stop(self, held: HeldPort) -> None:
        """Serve it no longer and end its connections; the socket stays open."""
        self._background.do(self._stop(held))

    async def _start(self, held: HeldPort, bound: socket.socket, target: Target) -> None:
        carried = self._ports[id(held)] = _Carried()
        if held.binding.proto == "tcp":
            work = self._accept(carried, bound, target)
        else:
            work = self._receive(carried, bound, target)
        carried.add(asyncio.ensure_future(work))

    async def _stop(self, held: HeldPort) -> None:
        carried = self._ports.pop(id(held), None)
        if carried is not None:
            tasks = list(carried.tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _open(self, address: str, kind: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self._host.entered():
            return socket.socket(family, kind | socket.SOCK_NONBLOCK)

    async def _accept(self, carried: _Carried, bound: socket.socket, target: Target) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(bound)
            except OSError as error:
                log.debug("accept on a published port: %s", error)
                await asyncio.sleep(0.1)
                continue
            carried.add(asyncio.ensure_future(self._connection(client, target)))

    async def _connection(self, client: socket.socket, target: Target) -> None:
        loop = asyncio.get_running_loop()
        where = target()
        with client:
            if where is None:
                return
            with self._open(where[0], socket.SOCK_STREAM) as server:
                try:
                    await loop.sock_connect(server, where)
                    await asyncio.gather(_copy(client, server), _copy(server, client))
                except OSError as error:
                    log.debug("carrying to %s port %d: %s", *where, error)

    async def _receive(self, carried: _Carried, bound: socket.socket, target: Target) -> None:
        loop = asyncio.get_running_loop()
        flows: dict[tuple[str, int], socket.socket] = {}
        while True:
            try:
                data, peer = await loop.sock_recvfrom(bound, _BLOCK)
            except OSError:  # an earlier answer of ours was refused
                continue
            flow = flows.get(peer)
            if flow is None:
                where = target()
                if where is None or len(flows) >= MOST_FLOWS:
                    continue
                flow = flows[peer] = self._open(where[0], socket.SOCK_DGRAM)
                flow.connect(where)
                carried.add(asyncio.ensure_future(_answers(flow, bound, peer, flows)))
            try:
                await loop.sock_sendall(flow, data)
            except OSError as error:
                log.debug("carrying a datagram: %s", error)


async def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Copy until the source ends, and end the sink's side of it then."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _BLOCK):
        await loop.sock_sendall(sink, data)
    sink.shutdown(socket.SHUT_WR)


async def _answers(
    flow: socket.socket,
    bound: socket.socket,
    peer: tuple[str, int],
    flows: dict[tuple[str, int], socket.socket],
) -> None:
    loop = asyncio.get_running_loop()
    try:
        while True:
            async with asyncio.timeout(UDP_IDLE_SECONDS):
                data = await loop.sock_recv(flow, _BLOCK)
            await loop.sock_sendto(bound, data, peer)
    except (TimeoutError, OSError):
        pass
    finally:
        flows.pop(peer, None)
        flow.close()

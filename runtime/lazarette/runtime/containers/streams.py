"""Clients attached to a process: bytes both ways between them and its monitor.

Output to a client is framed (``stdcopy``) unless the process has a terminal: a header of
stream number, three zero bytes and a big-endian length, then the bytes.  One packet of
the monitor is one frame.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from typing import Protocol

from lazarette.runtime.containers.monitor import PACKET, STDERR, STDOUT
from lazarette.storage.errors import InvalidArgument

_FRAME = struct.Struct(">BxxxL")
DEFAULT_DETACH_KEYS = "ctrl-p,ctrl-q"


class ClientStream(Protocol):
    """The hijacked connection of a client."""

    async def read(self) -> bytes:
        """Some bytes; empty once the client sends no more."""
        ...

    async def write(self, data: bytes) -> None:
        """Send bytes, waiting while the client is slow.

        Raises:
            ConnectionError: the client is gone.
        """
        ...


def frame(stream: int, data: bytes) -> bytes:
    """A ``stdcopy`` frame; 1 is stdout, 2 is stderr, 3 is an error of the system."""
    return _FRAME.pack(stream, len(data)) + data


def parse_detach_keys(text: str) -> bytes:
    """``ctrl-p,ctrl-q`` as the bytes a terminal sends.

    Raises:
        InvalidArgument: a key that is neither one character nor ``ctrl-`` and one.
    """
    made = bytearray()
    for key in (text or DEFAULT_DETACH_KEYS).split(","):
        if len(key) == 1:
            made += key.encode()
            continue
        last = key.removeprefix("ctrl-")
        code = ord(last) - 96 if len(last) == 1 and "a" <= last <= "z" else -1
        special = {"@": 0, "[": 27, "\\": 28, "]": 29, "^": 30, "_": 31}
        code = special.get(last, code)
        if not key.startswith("ctrl-") or code < 0:
            raise InvalidArgument(f"Invalid detach keys ({text}) provided")
        made.append(code)
    return bytes(made)


class DetachKeys:
    """Finds the detach sequence in what a terminal's user types, across reads."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Bytes to pass on, and whether the sequence was complete."""
        pending = self._held + data
        at = pending.find(self._keys)
        if at >= 0:
            return pending[:at], True
        for length in range(min(len(self._keys) - 1, len(pending)), 0, -1):
            if pending.endswith(self._keys[:length]):
                self._held = pending[-length:]
                return pending[:-length], False
        self._held = b""
        return pending, False


@dataclass(frozen=True)
class Attach:
    """How a client is attached.

    Attributes:
        stdin, stdout, stderr: which streams it gets.
        tty: raw bytes instead of frames, and detach keys are looked for.
        detach_keys: bytes of the sequence.
    """

    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool
    detach_keys: bytes = b"\x10\x11"


async def pump(client: ClientStream, monitor: socket.socket, attach: Attach) -> bool:
    """Carry bytes until the process ends or the client detaches or leaves.

    Returns:
        Whether the client went first, by its keys or by closing the connection.
    """
    output = asyncio.ensure_future(_output(client, monitor, attach))
    incoming = asyncio.ensure_future(_input(client, monitor, attach))
    try:
        done, _ = await asyncio.wait({output, incoming}, return_when=asyncio.FIRST_COMPLETED)
        if incoming in done and output not in done:
            if incoming.result():
                return True
            await output
        return False
    finally:
        for task in (output, incoming):
            task.cancel()
        await asyncio.gather(output, incoming, return_exceptions=True)
        monitor.close()


async def _output(client: ClientStream, monitor: socket.socket, attach: Attach) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            packet = await loop.sock_recv(monitor, PACKET)
        except ConnectionError:
            return
        if not packet:
            return
        stream, data = packet[0], packet[1:]
        wanted = attach.stdout if stream == STDOUT else attach.stderr
        if attach.tty:
            wanted = attach.stdout or attach.stderr
        if not wanted or stream not in (STDOUT, STDERR):
            continue
        try:
            await client.write(data if attach.tty else frame(stream - 1, data))
        except ConnectionError:
            return


async def _input(client: ClientStream, monitor: socket.socket, attach: Attach) -> bool:
    loop = asyncio.get_running_loop()
    keys = DetachKeys(attach.detach_keys) if attach.tty else None
    while True:
        try:
            data = await client.read()
        except ConnectionError:
            return True
        if not data:
            break
        if not attach.stdin:
            continue
        detached = False
        if keys is not None:
            data, detached = keys.feed(data)
        try:
            for start in range(0, len(data), PACKET - 1):
                await loop.sock_sendall(monitor, data[start : start + PACKET - 1])
        except (ConnectionError, OSError):
            return False
        if detached:
            return True
    if attach.stdin:
        try:
            monitor.shutdown(socket.SHUT_WR)
        except OSError:
            return False
    return False

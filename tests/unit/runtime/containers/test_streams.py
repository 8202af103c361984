from __future__ import annotations

import asyncio
import socket

import pytest

from lazarette.runtime.containers.streams import (
    Attach,
    DetachKeys,
    frame,
    parse_detach_keys,
    pump,
)
from lazarette.storage.errors import InvalidArgument


def test_frames() -> None:
    assert frame(1, b"hi") == b"\x01\x00\x00\x00\x00\x00\x00\x02hi"
    assert frame(2, b"") == b"\x02\x00\x00\x00\x00\x00\x00\x00"


def test_detach_keys() -> None:
    assert parse_detach_keys("") == b"\x10\x11"
    assert parse_detach_keys("ctrl-a,x,ctrl-@") == b"\x01x\x00"
    for wrong in ("ctrl-", "ctrl-ab", "abc", "ctrl-1", ","):
        with pytest.raises(InvalidArgument):
            parse_detach_keys(wrong)


def test_keys_are_found_across_reads() -> None:
    keys = DetachKeys(b"\x10\x11")
    assert keys.feed(b"ab\x10") == (b"ab", False)
    assert keys.feed(b"c") == (b"\x10c", False)
    assert keys.feed(b"\x10") == (b"", False)
    assert keys.feed(b"\x11rest") == (b"", True)


class Client:
    """A client that sends some pieces and keeps what it is sent."""

    def __init__(self, pieces: list[bytes], stays: bool = False) -> None:
        self.pieces, self.stays, self.got = list(pieces), stays, b""

    async def read(self) -> bytes:
        if self.pieces:
            return self.pieces.pop(0)
        if self.stays:
            await asyncio.Event().wait()
        return b""

    async def write(self, data: bytes) -> None:
        self.got += data


@pytest.fixture
def ends() -> tuple[socket.socket, socket.socket]:
    ours, monitor = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, monitor


async def test_output_goes_on_after_the_clients_end(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, monitor = ends
    client = Client([b"input"])
    task = asyncio.ensure_future(
        pump(client, ours, Attach(stdin=True, stdout=True, stderr=True, tty=False))
    )
    with monitor:
        await asyncio.sleep(0.05)
        assert monitor.recv(100) == b"input"
        assert monitor.recv(100) == b""  # the client's end of stdin
        monitor.send(b"\x02out")
        monitor.send(b"\x03err")
        await asyncio.sleep(0.05)
    assert not await asyncio.wait_for(task, 60)
    assert client.got == frame(1, b"out") + frame(2, b"err")


async def test_only_wanted_streams_are_sent(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, monitor = ends
    client = Client([], stays=True)
    task = asyncio.ensure_future(
        pump(client, ours, Attach(stdin=False, stdout=False, stderr=True, tty=False))
    )
    with monitor:
        monitor.send(b"\x02out")
        monitor.send(b"\x03err")
        await asyncio.sleep(0.05)
    await asyncio.wait_for(task, 60)
    assert client.got == frame(2, b"err")


async def test_detach_keys_end_the_attachment(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, monitor = ends
    client = Client([b"ls\n", b"\x10\x11"], stays=True)
    with monitor:
        attach = Attach(stdin=True, stdout=True, stderr=True, tty=True)
        assert await asyncio.wait_for(pump(client, ours, attach), 60)
        assert monitor.recv(100) == b"ls\n"


async def test_large_input_is_cut_into_packets(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, monitor = ends
    client = Client([b"x" * 20_000])
    attach = Attach(stdin=True, stdout=True, stderr=True, tty=False)
    task = asyncio.ensure_future(pump(client, ours, attach))
    with monitor:
        await asyncio.sleep(0.05)
        sizes = [len(monitor.recv(65536)) for _ in range(3)]
    await asyncio.wait_for(task, 60)
    assert sizes == [8192, 8192, 20_000 - 2 * 8192]

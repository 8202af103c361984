"""The client's end of a hijacked connection, against servers that choose when they speak."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazarette.runtime.cli.client import Daemon

_HEAD = (
    b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\n"
    b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
)
_LONG = 8 << 20


@contextmanager
def served(folder: Path, answer: Callable[[socket.socket], None]) -> Iterator[Daemon]:
    """A daemon that reads one request, answers it, and closes the connection."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        listener.listen(1)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                asked = b""
                while not asked.endswith(b"{}"):
                    asked += connection.recv(65536)
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        with Daemon(f"unix://{folder}/s") as daemon:
            yield daemon
            thread.join()


def carried(daemon: Daemon, typing: bool = False) -> bytes:
    got = bytearray()
    daemon.hijack("/exec/x/start", {}).carry(got.extend, typing)
    return bytes(got)


@contextmanager
def standard_input(source: int) -> Iterator[None]:
    before = os.dup(0)
    os.dup2(source, 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_what_comes_together_with_the_head_is_not_lost(tmp_path: Path) -> None:
    with served(tmp_path, lambda one: one.sendall(_HEAD + b"quick\n")) as daemon:
        assert carried(daemon) == b"quick\n"


@pytest.mark.parametrize("first", [0, 1, 5000, 100_000])
def test_nothing_is_lost_wherever_the_head_ends(tmp_path: Path, first: int) -> None:
    sent = os.urandom(200_000)
    gone = threading.Event()

    def answer(one: socket.socket) -> None:
        one.sendall(_HEAD + sent[:first])
        gone.wait(0.05)
        one.sendall(sent[first:])

    with served(tmp_path, answer) as daemon:
        assert carried(daemon) == sent


def echo(one: socket.socket) -> None:
    """What it reads is what it says; it never reads before that is taken."""
    one.sendall(_HEAD)
    while data := one.recv(65536):
        one.sendall(data)


def test_input_and_output_do_not_wait_for_each_other(tmp_path: Path) -> None:
    sent = os.urandom(_LONG)
    receive, send = os.pipe()

    def type_in() -> None:
        with os.fdopen(send, "wb") as stream:
            stream.write(sent)

    def lazy_echo(one: socket.socket) -> None:
        one.sendall(_HEAD)
        one.sendall(sent)  # before it reads anything
        while data := one.recv(65536):
            one.sendall(data)

    typist = threading.Thread(target=type_in)
    typist.start()
    with served(tmp_path, lazy_echo) as daemon, standard_input(receive):
        os.close(receive)
        assert carried(daemon, typing=True) == sent + sent
    typist.join()


def test_a_file_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"line\n" * 100_000)
    with served(tmp_path, echo) as daemon, open(file, "rb") as source:
        with standard_input(source.fileno()):
            assert carried(daemon, typing=True) == file.read_bytes()


def test_a_program_that_does_not_read_ends_its_input(tmp_path: Path) -> None:
    def deaf(one: socket.socket) -> None:
        one.sendall(_HEAD + b"said")
        one.recv(1)  # the rest is never read: closing resets the connection

    with served(tmp_path, deaf) as daemon, open("/dev/zero", "rb") as source:
        with standard_input(source.fileno()):
            assert carried(daemon, typing=True) == b"said"

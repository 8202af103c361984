"""Streams between a terminal and a container: attach, exec, logs."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import sys
import termios
import tty as ttys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazarette.runtime.cli.client import Daemon
    from lazarette.runtime.cli.hijacked import Hijacked

_HEADER = 8
_STDERR = 2


def copy_output(chunks: Iterable[bytes]) -> None:
    """Write byte chunks to standard output as they come."""
    for chunk in chunks:
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()


def run_attached(daemon: Daemon, container: str, *, stdin: bool, tty: bool, removed: bool) -> int:
    """Attach to a created container, start it, and return its exit code.

    The wait begins before the start, so that the code is known even when the container
    removes itself.
    """
    stream = daemon.hijack(
        f"/containers/{container}/attach", stdin=int(stdin), stdout=1, stderr=1, stream=1
    )
    condition = "removed" if removed else "next-exit"
    waiting = daemon.post(
        f"{daemon.base_url}/v{daemon.api_version}/containers/{container}/wait",
        params={"condition": condition},
        stream=True,
        timeout=None,
    )
    daemon.start(container)
    _pump(stream, stdin, tty, lambda rows, columns: daemon.resize(container, rows, columns))
    return int(waiting.json()["StatusCode"])


def run_exec(daemon: Daemon, exec_id: str, *, stdin: bool, tty: bool) -> int:
    """Start an exec, copy its streams, and return its exit code."""
    stream = daemon.hijack(f"/exec/{exec_id}/start", {"Tty": tty, "Detach": False})
    _pump(stream, stdin, tty, lambda rows, columns: daemon.exec_resize(exec_id, rows, columns))
    return int(daemon.exec_inspect(exec_id)["ExitCode"] or 0)


def _pump(stream: Hijacked, stdin: bool, tty: bool, resize: Callable[[int, int], object]) -> None:
    raw = tty and stdin and sys.stdin.isatty()
    with _raw_terminal(raw), _follow_size(tty and sys.stdout.isatty(), resize):
        stream.carry(_Frames(plain=tty).feed, stdin)


class _Frames:
    """Splits the Engine's multiplexed stream: byte 0 names the stream, 4-7 the length."""

    def __init__(self, plain: bool) -> None:
        self._plain = plain
        self._rest = b""

    def feed(self, data: bytes) -> None:
        if self._plain:
            _write(1, data)
            return
        self._rest += data
        while len(self._rest) >= _HEADER:
            stream, length = struct.unpack(">BxxxI", self._rest[:_HEADER])
            if len(self._rest) < _HEADER + length:
                return
            _write(2 if stream == _STDERR else 1, self._rest[_HEADER : _HEADER + length])
            self._rest = self._rest[_HEADER + length :]


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextmanager
def _raw_terminal(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    before = termios.tcgetattr(0)
    ttys.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextmanager
def _follow_size(wanted: bool, resize: Callable[[int, int], object]) -> Iterator[None]:
    if not wanted:
        yield
        return

    def tell(*_: object) -> None:
        size = shutil.get_terminal_size()
        with suppress(Exception):  # the container may have ended; the next read tells
            resize(size.lines, size.columns)

    before = signal.signal(signal.SIGWINCH, tell)
    tell()
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)

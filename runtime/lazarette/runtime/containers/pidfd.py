"""Processes that are not our children: told apart, watched and signalled by descriptor."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable


def start_time(pid: int) -> int:
    """Clock ticks since boot when a process started; 0 when there is none.

    Field 22 of ``/proc/PID/stat``, counted after the command's closing bracket.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def is_alive(pid: int, started: int = 0) -> bool:
    """Whether a process runs and is no zombie; with ``started``, whether it is that one."""
    if pid <= 0:
        return False
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return False
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return False
    return not started or int(fields[19]) == started


def send(pid: int, started: int, number: int) -> bool:
    """Signal a process if it is still the one meant; returns whether it was."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if started and start_time(pid) != started:
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def on_exit(pid: int, call: Callable[[], None]) -> Callable[[], None]:
    """Call ``call`` in the loop once the process has ended (at once if it has).

    Returns:
        A function that stops watching.
    """
    loop = asyncio.get_running_loop()
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        soon = loop.call_soon(call)
        return soon.cancel
    open_ = True

    def stop() -> None:
        nonlocal open_
        if open_:
            open_ = False
            loop.remove_reader(handle)
            os.close(handle)

    def ended() -> None:
        stop()
        call()

    loop.add_reader(handle, ended)
    return stop


def parse_signal(text: str) -> int:
    """A signal by name (``SIGTERM``, ``TERM``, ``RTMIN+3``) or number; 0 if it is none."""
    wanted = text.strip().upper()
    if wanted.isdecimal():
        number = int(wanted[:3])
        return number if 0 < number <= 64 else 0
    name = wanted.removeprefix("SIG")
    for base, sign in (("RTMIN+", 1), ("RTMAX-", -1)):
        if name.startswith(base) and name[len(base) :].isdecimal():
            offset = int(name[len(base) :][:3])
            first = signal.SIGRTMIN if sign > 0 else signal.SIGRTMAX
            number = int(first) + sign * offset
            return number if signal.SIGRTMIN <= number <= signal.SIGRTMAX else 0
    try:
        return int(signal.Signals[f"SIG{name}"])
    except KeyError:
        return 0


def wait_for_exit(pid: int) -> asyncio.Future[None]:
    """A future that is done once the process has ended."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    stop = on_exit(pid, lambda: None if future.done() else future.set_result(None))
    future.add_done_callback(lambda _done: stop())
    return future

"""The standby: a process that takes a mount over when its server dies.

It is a copy of the server from before that did anything, and it *shares the table of
descriptors* with it (clone(2) with CLONE_FILES): whatever the server opens is open in the
standby too, under the same number, at no cost.  When the server dies the connection to the
kernel, the files that have no name any more and the control socket therefore stay; the journal
(:mod:`lazarette.fuse.journal`) says what they are.

The standby only waits.  When it has to act it forks: the child gets a table of its own and is
the next server, which makes itself a standby first.  That child leaves by :class:`Successor`
what it was copied in the middle of: however many servers a mount has had, the stack of the
next is no deeper, and nothing is kept of what those before had in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import platform
import signal
import time

from lazarette.fuse import syscalls
from lazarette.fuse.journal import Shared

log = logging.getLogger(__name__)

_CLONE = {"x86_64": 56, "aarch64": 220}
"""Number of clone(2); with all arguments after the flags 0 their order does not matter."""

_CLONE_FILES = 0x400
_PR_SET_NAME = 15
_FAILURES = 10
"""Servers in a row that may die before they serve."""
_PAUSE = 0.02


def possible() -> bool:
    """Whether this machine can have standbys."""
    return platform.machine() in _CLONE


def _clone() -> int:
    """fork(2) with a shared table of descriptors; only in a process with one thread."""
    # PyDLL keeps the interpreter's lock: the child starts with it held, as it must.
    libc = ctypes.PyDLL(None, use_errno=True)
    number = _CLONE[platform.machine()]
    flags = ctypes.c_ulong(_CLONE_FILES | signal.SIGCHLD)
    zero = ctypes.c_ulong(0)
    pid = int(libc.syscall(ctypes.c_long(number), flags, zero, zero, zero, zero))
    if pid < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "clone")
    return pid


class Successor(BaseException):
    """Raised by :func:`start` in the next server, once the present one has died.

    Attributes:
        shared: what that left.
    """

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared = shared


def start(shared: Shared) -> int:
    """Make the standby of this process, which must have one thread only; its pid.

    Raises:
        Successor: this is the next server.
    """
    watched = os.pidfd_open(os.getpid())
    pid = _clone()
    if pid:
        return pid
    try:
        _keep(shared, watched)
    except BaseException:  # there is nobody else to say so
        log.exception("the standby fails")
        os._exit(1)
    raise Successor(shared)


def _keep(shared: Shared, watched: int) -> None:
    """Wait for the server's death, again and again; never closes anything.

    Returns in the next servers only.
    """
    gc.disable()
    libc = ctypes.PyDLL(None)
    libc.prctl(_PR_SET_NAME, b"laz-standby", 0, 0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    myself = os.getpid()
    syscalls.ended(watched)
    while shared.keeper == myself and not shared.ended and shared.device >= 0:
        failures = shared.failures
        if failures > _FAILURES:
            break  # whatever kills it will kill the next too: better an error than a hang
        time.sleep(failures * _PAUSE)
        shared.failures = failures + 1
        pid = os.fork()
        if pid == 0:
            gc.enable()
            return
        server = os.pidfd_open(pid)
        while shared.keeper == myself:
            if syscalls.ended(server, _PAUSE):
                os.waitpid(pid, 0)
                break
        os.close(server)
    os._exit(0)


def dismiss(pid: int) -> None:
    """End a standby of this very process that is not needed any more; 0 is none."""
    if not pid:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def close_others(keep: set[int]) -> None:
    """Close all descriptors but these and the standard ones."""
    with os.scandir("/proc/self/fd") as entries:
        opened = [int(entry.name) for entry in entries]
    for fd in opened:
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):
                os.close(fd)

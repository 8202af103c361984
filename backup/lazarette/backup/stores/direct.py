"""Writing large objects past the page cache.

A backup would otherwise push out of memory what a database keeps there, for bytes that nobody
reads again soon, and what is checked afterwards would be memory and not the disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading

from lazarette.backup.memory import buffer
from lazarette.backup.stores.contract import Buffer

LEAST = 1 << 20
"""Smaller objects go through the cache: they cost more to write than to keep."""
_STAGE = 4 << 20
_ALIGNED = 4096
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)

_staged = threading.local()


def write(file: int, data: Buffer) -> None:
    """Write an object to an empty file.

    Where the filesystem has no direct I/O it goes through the cache.

    Args:
        file: descriptor, open for writing.
        data: all of it.

    Raises:
        OSError: it cannot be written.
    """
    view = memoryview(data).cast("B")
    at = _past_the_cache(file, view) if len(view) >= LEAST else 0
    while at < len(view):
        at += os.pwrite(file, view[at:], at)


def _past_the_cache(file: int, view: memoryview) -> int:
    """Write what can be written by direct I/O; how many bytes of ``view`` that were."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    at = 0
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        at = _as_it_lies(file, view)
        while at < len(view):
            done = _by_stage(file, view[at : at + _STAGE], at)
            if done == 0:
                break
            at += done
    except OSError as refused:
        if refused.errno not in _NOT_DIRECT:
            raise
    fcntl.fcntl(file, fcntl.F_SETFL, flags)
    os.ftruncate(file, at)
    return at


def _as_it_lies(file: int, view: memoryview) -> int:
    """Write all but the end of it from where it is, if it begins at a page of memory."""
    whole = len(view) // _ALIGNED * _ALIGNED
    try:
        return os.pwrite(file, view[:whole], 0) // _ALIGNED * _ALIGNED
    except OSError as refused:
        if refused.errno not in _NOT_DIRECT:
            raise
        return 0


def _by_stage(file: int, view: memoryview, offset: int) -> int:
    """Write some by way of memory that begins at a page; what is too much is cut off later."""
    stage = _stage()
    whole = -(-len(view) // _ALIGNED) * _ALIGNED
    stage[: len(view)] = view
    stage[len(view) : whole] = bytes(whole - len(view))
    done = os.pwrite(file, stage[:whole], offset) // _ALIGNED * _ALIGNED
    return min(done, len(view))


def _stage() -> memoryview:
    """This thread's buffer, at the start of a page of memory."""
    try:
        found: memoryview = _staged.buffer
    except AttributeError:
        found = _staged.buffer = buffer(_STAGE)
    return found

"""The innermost loop of a server: read a request, take it apart, call its method, answer.

It is the C module's when that was built, and :func:`serve_plain` otherwise (see
:mod:`lazarette.fuse.native`).  Whatever is not plain goes back to :mod:`lazarette.fuse.server`.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from lazarette.fuse.native import answer_plain

try:
    if os.environ.get("LAZ_NO_NATIVE"):
        raise ImportError("not wanted")
    from lazarette.fuse import _serving
except ImportError:
    _serving = None  # type: ignore[assignment]

_IN_HEADER = struct.Struct("=IIQQIIIHH")
_OUT_HEADER = struct.Struct("=IiQ")

NOT_BEGUN, UNUSUAL, NOT_ACCEPTED, UNHINDERED = 0, 1, 2, 3
"""Why :data:`serve` returns: nothing was done; the method gave something else than a reply (the
lock is held); the kernel refused the reply; :data:`RUN` requests in a row blocked nobody."""

RUN = 256


class Route(NamedTuple):
    """How requests of one kind are taken apart and done.

    Attributes:
        handler: does one, given the request and a view of its body.
        method: does one, given the request and what ``layout``, ``make`` and ``names`` find in
            its body; None: only ``handler`` can.
        once: it must not be done twice.
        layout: fixed fields at the start of the body, as for :mod:`struct`: ``I``, ``Q``, ``4x``.
        make: makes one argument of those fields; None: each is one.
        names: how many strings follow that end with NUL.
    """

    handler: Callable[[Any, memoryview], object]
    method: Callable[..., object] | None = None
    once: bool = False
    layout: bytes = b""
    make: Callable[..., object] | None = None
    names: int = 0


class Readers(Protocol):
    """What :data:`serve` asks before it blocks; see :class:`lazarette.fuse.readers.Readers`."""

    def enter(self) -> bool:
        """Whether this thread may block now."""

    def leave(self) -> None:
        """It does not any more."""


class Journal(Protocol):
    """What :data:`serve` asks of a journal; see :class:`lazarette.fuse.journal.Journal`."""

    def done(self, unique: int, reply: bytes) -> None:
        """A request that must not be done twice is done."""

    def commit(self) -> None:
        """What was noted counts."""


def serve_plain(
    device: int,
    buffer: bytearray,
    routes: Sequence[Route | None],
    make: Callable[..., Any],
    lock: threading.Lock,
    journal: Journal,
    readers: Readers,
    /,
) -> tuple[Any, int, int, object]:
    """Read requests and answer them, until one needs the caller.

    Methods run with the lock held.  A reply is bytes, an error number, or None for no answer; the
    number of an ``OSError`` is an answer too.  A pair of a descriptor and a bool, a
    :class:`lazarette.fuse.filesystem.Sync`, is done here without the lock, if ``readers`` let us.

    Returns:
        The request, made by ``make`` of the fields of its header; its length in ``buffer``; why
        it needs the caller; and what the method gave or raised, or the kernel said of the reply.
        The request is None when there is none.

    Raises:
        OSError: reading failed, or what the journal raised.
    """
    view = memoryview(buffer)
    left = RUN
    reply: Any
    while left:
        left -= 1
        size = os.readv(device, [view])
        request = make(*_IN_HEADER.unpack_from(buffer))
        route = routes[request.opcode] if request.opcode < len(routes) else None
        if route is None or request.unique >> 63:
            return request, size, NOT_BEGUN, None
        lock.acquire()
        code, reply = 0, None
        try:
            reply = route.handler(request, view[_IN_HEADER.size : size])
            if type(reply) is int:
                code, reply = reply, None
        except OSError as error:
            code = error.errno or errno.EIO
        except Exception as error:  # noqa: BLE001 - the caller tells them apart
            return request, size, UNUSUAL, error
        blocks = isinstance(reply, tuple) and readers.enter()
        if reply is not None and type(reply) is not bytes and not blocks:
            return request, size, UNUSUAL, reply
        if route.once and isinstance(reply, bytes):
            journal.done(request.unique, reply)
        journal.commit()
        lock.release()
        if blocks:
            left = RUN
            try:
                reply = reply.work()
            except OSError as error:
                code = error.errno or errno.EIO
            readers.leave()
        try:
            if code:
                os.write(device, _OUT_HEADER.pack(16, -code, request.unique))
            elif reply is not None:
                answer_plain(device, request.unique, reply)
        except OSError as error:
            return request, size, NOT_ACCEPTED, error
    return None, 0, UNHINDERED, None


serve = serve_plain if _serving is None else _serving.serve

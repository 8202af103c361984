"""The event loop: reads requests from the kernel, calls the filesystem, writes replies.

A thread reads ``/dev/fuse`` and runs the filesystem's methods under its lock (that is
:data:`lazarette.fuse.serving.serve`, as long as nothing unusual comes).  What may block is done by
the same thread while others read (:mod:`lazarette.fuse.readers`), and by a small pool of workers
when there are none left (see :mod:`lazarette.fuse.filesystem`).  The protocol, passthrough and
notifications live here; a filesystem sees none of it.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, Unpack

from lazarette.fuse import native, protocol, replies, requests, serving, standby
from lazarette.fuse.filesystem import Connection, Filesystem, Later, NeedsWorker, Reply, Sync
from lazarette.fuse.journal import Meta, Shared, State
from lazarette.fuse.protocol import InitFlag, Opcode
from lazarette.fuse.readers import Readers
from lazarette.fuse.requests import Request
from lazarette.fuse.serving import NOT_ACCEPTED, NOT_BEGUN, UNHINDERED, Route
from lazarette.fuse.workers import Workers

log = logging.getLogger(__name__)

MAX_WRITE = 1 << 20
"""Largest READ and WRITE, bytes."""

_ALWAYS = (
    InitFlag.ASYNC_READ
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.BIG_WRITES
    | InitFlag.DONT_MASK
    | InitFlag.DO_READDIRPLUS
    | InitFlag.READDIRPLUS_AUTO
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.HANDLE_KILLPRIV_V2
    | InitFlag.POSIX_ACL
    | InitFlag.ABORT_ERROR
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.NO_OPENDIR_SUPPORT
    | InitFlag.SETXATTR_EXT
    | InitFlag.INIT_EXT
    | InitFlag.DIRECT_IO_ALLOW_MMAP
    | InitFlag.HAS_RESEND
    | InitFlag.ALLOW_IDMAP
)

_READERS = 4
"""Threads that read requests: an unlucky one may have to wait for one fsync of this many at a time
being given to a worker, which costs more."""

_ATTEMPTS = 10
"""Servers that may die with a request, one after the other, before it is answered EIO."""

_ONCE = frozenset(
    int(each)
    for each in (
        Opcode.OPEN,
        Opcode.CREATE,
        Opcode.TMPFILE,
        Opcode.MKNOD,
        Opcode.MKDIR,
        Opcode.SYMLINK,
        Opcode.LINK,
        Opcode.UNLINK,
        Opcode.RMDIR,
        Opcode.RENAME,
        Opcode.RENAME2,
        Opcode.SETXATTR,
        Opcode.REMOVEXATTR,
    )
)
"""Requests that must not be done twice; the others give the same result again."""

_Answer = Reply | None
"""What a handler gives; None: the request gets no answer."""

_Handler = Callable[[Request, memoryview], _Answer]


class Server(Connection):
    """Serves one mount until it is unmounted.

    Args:
        filesystem: answers the requests.
        device: descriptor from :func:`lazarette.fuse.mount.mount`; closed by :meth:`run`.
        passthrough: False keeps reads and writes in the server even where the kernel
            could do them.
        workers: threads for what may block.
        shared: where a journal is kept for a successor; None: there is to be none.
        spec: for that successor.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        device: int,
        passthrough: bool = True,
        workers: int = 8,
        shared: Shared | None = None,
        spec: bytes = b"",
    ) -> None:
        self._shared = shared
        self._spec = spec
        self._filesystem = filesystem
        self._device = device
        self._wish = passthrough
        self.passthrough = False
        self.reason = "not connected"
        self.minor = 0
        self.granted = InitFlag(0)
        self.ready = threading.Event()
        self._done: dict[int, bytes] = {}
        self._seen: dict[int, list[int]] = {}
        self._pool = Workers(workers, "fuse-worker")
        self._readers = Readers(_READERS, self._read)
        self._routes = self._make_routes()

    # -- connection ---------------------------------------------------------------------

    def backing_open(self, fd: int) -> int:
        """Register a backing file."""
        return native.backing_open(self._device, fd)

    def backing_close(self, backing: int) -> None:
        """Give a backing id back."""
        native.backing_close(self._device, backing)

    def forget_attributes(self, node: int) -> None:
        """Make the kernel ask for the attributes of a node again."""
        self._notify(replies.notify_inval_inode(node, -1, 0))

    def forget_data(self, node: int) -> None:
        """Make the kernel drop attributes and pages of a node; never call it from the loop."""
        self._notify(replies.notify_inval_inode(node, 0, 0))

    def forget_name(self, parent: int, name: bytes) -> None:
        """Make the kernel look a name up again; never call it from the loop."""
        self._notify(replies.notify_inval_entry(parent, name))

    def _notify(self, message: bytes) -> None:
        try:
            os.write(self._device, message)
        except OSError as error:
            # ENOENT: the kernel does not hold that node or name, so there is nothing to forget.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN):
                raise

    # -- loop ---------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the filesystem is unmounted or the connection aborted.

        The umask of the process is set to 0: modes are those the kernel sends.
        """
        os.umask(0)
        try:
            self._readers.run()
        finally:
            self._filesystem.give_up()
            self._pool.shutdown()
            os.close(self._device)
            self._filesystem.destroy()

    def _read(self) -> None:
        """Serve what this thread reads, until there is nothing more to come."""
        with self._filesystem.reading():
            self._serve()
        self._filesystem.give_up()  # or another reader that waits for a source holds up the end

    def _serve(self) -> None:
        # All its pages are there: a request that has to wait for one while the server is killed
        # would fail.
        buffer = bytearray(b"\1") * (MAX_WRITE + 65536)
        view = memoryview(buffer)
        filesystem, device, routes = self._filesystem, self._device, self._routes
        readers = self._readers
        while True:
            try:
                request, size, why, outcome = serving.serve(
                    device, buffer, routes, Request, filesystem.lock, filesystem.journal, readers
                )
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                raise
            if why == UNHINDERED:
                readers.rest()
                continue
            body = view[requests.IN_HEADER.size : size]
            if why == NOT_ACCEPTED:
                self._answer_refused(request.unique, outcome)
            elif why == NOT_BEGUN:
                self._begin(request, body)
            else:
                self._conclude(request, body, outcome)

    def _handler(self, opcode: int) -> _Handler | None:
        """What does requests of a kind."""
        if opcode == Opcode.INIT:
            return self._init
        route = self._routes[opcode] if opcode < len(self._routes) else None
        return route.handler if route is not None else None  # type: ignore[return-value]

    def _begin(self, request: Request, body: memoryview) -> None:
        """Do a request of a rare kind, or one that a server before had."""
        handler = self._handler(request.opcode)
        if handler is None:
            self._refuse(request.unique, errno.ENOSYS)
            return
        if request.resent and self._answered_before(request):
            return
        self._filesystem.lock.acquire()
        outcome: object
        try:
            outcome = handler(request, body)
        except Exception as error:  # noqa: BLE001 - _conclude tells them apart
            outcome = error
        self._conclude(request, body, outcome)

    def _conclude(self, request: Request, body: memoryview, outcome: object) -> None:
        """Note, with the lock held, what a request did; let the lock go, and answer."""
        journal = self._filesystem.journal
        if request.opcode in _ONCE and isinstance(outcome, bytes):
            journal.done(request.unique, outcome)
        journal.commit()
        self._filesystem.lock.release()
        if isinstance(outcome, bytes):
            self._answer(request.unique, outcome)
        elif isinstance(outcome, Later | Sync):
            if self._readers.enter():
                self._finish(request, outcome)
                self._readers.leave()
            else:
                self._pool.submit(self._finish, request, outcome)
        elif isinstance(outcome, NeedsWorker):
            handler = self._handler(request.opcode)
            assert handler is not None
            self._pool.submit(self._repeat, handler, request, bytes(body))
        elif isinstance(outcome, int):
            self._refuse(request.unique, outcome)
        elif isinstance(outcome, OSError):
            self._refuse(request.unique, outcome.errno or errno.EIO)
        elif isinstance(outcome, Exception):
            log.error("request %s failed", request, exc_info=outcome)
            self._refuse(request.unique, errno.EIO)

    def _answer(self, unique: int, body: bytes) -> None:
        try:
            native.answer(self._device, unique, body)
        except OSError as error:
            self._answer_refused(unique, error)

    def _answer_refused(self, unique: int, error: object) -> None:
        # ENOENT: the caller was killed meanwhile; ENODEV: unmounted meanwhile.
        code = error.errno if isinstance(error, OSError) else None
        if code not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
            log.warning("reply to request %d refused by the kernel: %s", unique, error)
            self._refuse(unique, errno.EIO)

    def _refuse(self, unique: int, code: int) -> None:
        try:
            os.write(self._device, replies.error_reply(code, unique))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
                log.warning("error reply to request %d refused by the kernel: %s", unique, error)

    def _repeat(self, handler: _Handler, request: Request, body: bytes) -> None:
        try:
            with self._filesystem.lock:
                try:
                    reply = handler(request, memoryview(body))
                    if request.opcode in _ONCE and isinstance(reply, bytes):
                        self._filesystem.journal.done(request.unique, reply)
                finally:
                    self._filesystem.journal.commit()
        except OSError as error:
            self._refuse(request.unique, error.errno or errno.EIO)
            return
        except Exception:
            log.exception("request %s failed", request)
            self._refuse(request.unique, errno.EIO)
            return
        if isinstance(reply, Later | Sync):
            self._finish(request, reply)
        elif isinstance(reply, int):
            self._refuse(request.unique, reply)
        elif reply is not None:
            self._answer(request.unique, reply)

    def _finish(self, request: Request, later: Later | Sync) -> None:
        try:
            body = later.work()
        except OSError as error:
            self._refuse(request.unique, error.errno or errno.EIO)
        except Exception:
            log.exception("request %s failed", request)
            self._refuse(request.unique, errno.EIO)
        else:
            self._answer(request.unique, body)

    # -- going on after another server --------------------------------------------------

    def _keep_journal(self, attempts: dict[int, int] | None = None) -> None:
        """Note for a successor from now on, if there can be one."""
        if self._shared is None:
            return
        if not self.granted & InitFlag.HAS_RESEND:
            # what the server had taken would hang for ever; not even its end needs a standby,
            # which would keep open what the server had
            standby.dismiss(self._shared.keeper)
            self._shared.keeper = 0
            return
        meta = Meta(self._spec, int(self.granted), self.minor, self.passthrough, self.reason)
        self._filesystem.keep_journal(self._shared, meta, attempts)

    def resume(self, state: State) -> None:
        """Take over a connection; :meth:`run` then begins with what was left unanswered."""
        meta = state.meta
        self.granted, self.minor = InitFlag(meta.granted), meta.minor
        self.passthrough, self.reason = meta.passthrough, meta.reason
        self._done, self._seen = state.done, state.seen
        self._filesystem.connect(self, self.granted)
        self._keep_journal(state.attempts)
        self.ready.set()

    def send_again(self) -> None:
        """Have the kernel repeat what the server before took and did not answer."""
        try:
            os.write(self._device, replies.notify_resend())
        except OSError as error:
            if error.errno not in (
                errno.ENODEV,
                errno.ENOTCONN,
            ):  # unmounted just now: :meth:`run` will find that too
                raise

    def _answered_before(self, request: Request) -> bool:
        """Answer a repeated request that was done, without doing it again."""
        unique = request.unique & ~protocol.UNIQUE_RESEND
        reply = self._done.pop(unique, None)
        if reply is not None:
            self._answer(request.unique, reply)
            return True
        seen = self._seen.pop(unique, None)
        if seen is not None:
            with self._filesystem.lock:
                self._filesystem.unsee(seen)
                self._filesystem.journal.commit()
        with self._filesystem.lock:
            attempts = self._filesystem.journal.attempt(request.unique)
        if attempts < _ATTEMPTS:
            return False
        log.error("%s is given up: %d servers died while they had it", request, attempts)
        self._refuse(request.unique, errno.EIO)
        return True

    # -- requests -----------------------------------------------------------------------

    def _init(self, request: Request, body: memoryview) -> Reply:
        init = requests.parse_init(body)
        if init.major != protocol.KERNEL_MAJOR or init.minor < protocol.LOWEST_MINOR:
            self.reason = f"the kernel speaks FUSE {init.major}.{init.minor}"
            raise OSError(errno.EPROTO, self.reason)
        self.minor = init.minor
        wanted = _ALWAYS | self._filesystem.wanted()
        depth = 0
        if self._wish and init.flags & InitFlag.PASSTHROUGH:
            wanted |= InitFlag.PASSTHROUGH
            depth = 1
        self.granted = init.flags & wanted
        self._choose(init.flags)
        self._filesystem.connect(self, self.granted)
        self._keep_journal()
        self.ready.set()
        return replies.init_reply(init.minor, init.max_readahead, self.granted, MAX_WRITE, depth)

    def _choose(self, offered: InitFlag) -> None:
        """Decide who reads and writes, and keep the reason."""
        if not self._wish:
            self.reason = "switched off"
        elif not offered & InitFlag.PASSTHROUGH:
            self.reason = f"the kernel (FUSE 7.{self.minor}) has no passthrough"
        elif os.geteuid() != 0:
            self.reason = "passthrough needs CAP_SYS_ADMIN"
        else:
            self.passthrough = True
            self.reason = f"the kernel (FUSE 7.{self.minor}) has passthrough"

    def _forget(self, request: Request, lookups: int) -> None:
        self._filesystem.forget(request.node, lookups)

    def _batch_forget(self, request: Request, body: memoryview) -> None:
        for node, lookups in requests.parse_batch_forget(body):
            self._filesystem.forget(node, lookups)

    def _interrupt(self, request: Request, body: memoryview) -> None:
        """Requests that wait do so for other reasons than the one who asks."""

    def _destroy(self, request: Request, body: memoryview) -> Reply:
        return b""

    def _make_routes(self) -> list[Route | None]:
        """Routes by opcode; INIT has none: it is done once."""
        fs, p = self._filesystem, requests

        def setxattr(request: Request, body: memoryview) -> Reply:
            extended = bool(self.granted & InitFlag.SETXATTR_EXT)
            return fs.setxattr(request, *p.parse_setxattr(body, extended))

        table: dict[int, Route] = {
            Opcode.FORGET: _one(self._forget, p.parse_forget),
            Opcode.BATCH_FORGET: Route(self._batch_forget),
            Opcode.INTERRUPT: Route(self._interrupt),
            Opcode.DESTROY: Route(self._destroy),
            Opcode.LOOKUP: _one(fs.lookup, p.parse_name),
            Opcode.GETATTR: _one(fs.getattr, p.parse_getattr),
            Opcode.SETATTR: _one(fs.setattr, p.parse_setattr),
            Opcode.READLINK: _none(fs.readlink),
            Opcode.SYMLINK: _several(fs.symlink, p.parse_two_names),
            Opcode.MKNOD: _several(fs.mknod, p.parse_mknod),
            Opcode.MKDIR: _several(fs.mkdir, p.parse_mkdir),
            Opcode.UNLINK: _one(fs.unlink, p.parse_name),
            Opcode.RMDIR: _one(fs.rmdir, p.parse_name),
            Opcode.RENAME: _several(fs.rename, p.parse_rename),
            Opcode.RENAME2: _several(fs.rename, p.parse_rename2),
            Opcode.LINK: _several(fs.link, p.parse_link),
            Opcode.OPEN: _one(fs.open, p.parse_open),
            Opcode.READ: _one(fs.read, p.parse_read),
            Opcode.WRITE: Route(lambda r, b: fs.write(r, *p.parse_write(b))),
            Opcode.STATFS: _none(fs.statfs),
            Opcode.RELEASE: _one(fs.release, p.parse_release),
            Opcode.FSYNC: _one(fs.fsync, p.parse_fsync),
            Opcode.SETXATTR: Route(setxattr),
            Opcode.GETXATTR: _several(fs.getxattr, p.parse_getxattr),
            Opcode.LISTXATTR: _one(fs.listxattr, p.parse_listxattr),
            Opcode.REMOVEXATTR: _one(fs.removexattr, p.parse_name),
            Opcode.FLUSH: _none(fs.flush),
            Opcode.OPENDIR: _one(fs.opendir, p.parse_open),
            Opcode.READDIR: _one(fs.readdir, p.parse_read),
            Opcode.READDIRPLUS: _one(fs.readdirplus, p.parse_read),
            Opcode.RELEASEDIR: _one(fs.releasedir, p.parse_release),
            Opcode.FSYNCDIR: _one(fs.fsyncdir, p.parse_fsync),
            Opcode.CREATE: _several(fs.create, p.parse_create),
            Opcode.TMPFILE: Route(lambda r, b: fs.tmpfile(r, p.parse_create(b)[0])),
            Opcode.FALLOCATE: _one(fs.fallocate, p.parse_fallocate),
            Opcode.LSEEK: _one(fs.lseek, p.parse_lseek),
            Opcode.COPY_FILE_RANGE: _one(fs.copy_file_range, p.parse_copy),
            Opcode.SYNCFS: _none(fs.syncfs),
        }
        routes: list[Route | None] = [None] * (max(table) + 1)
        for opcode, route in table.items():
            routes[opcode] = route._replace(once=opcode in _ONCE)
        return routes


_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


def _none(method: Callable[[Request], Reply]) -> Route:
    """Route of a request without a body."""
    return Route(lambda request, body: method(request), method)


def _one(method: Callable[[Request, _T], _Answer], parse: Callable[[memoryview], _T]) -> Route:
    """Route of a request whose body is one value."""
    shape = requests.SHAPES[parse]
    return Route(lambda request, body: method(request, parse(body)), method, False, *shape)


def _several(
    method: Callable[[Request, Unpack[_Ts]], Reply],
    parse: Callable[[memoryview], tuple[*_Ts]],
) -> Route:
    """Route of a request whose body is several values."""
    shape = requests.SHAPES[parse]
    return Route(lambda request, body: method(request, *parse(body)), method, False, *shape)

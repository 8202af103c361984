"""What a filesystem gives the server: one method a request.

A method raises ``OSError``; its number is the answer (errors that are usual may be returned as
numbers, which is quicker).  It returns the packed reply body (see the ``*_reply`` functions of
:mod:`lazarette.fuse.replies`), ``b""`` for plain success, or a :class:`Later` or
:class:`Sync` for work that may block.

The server calls methods one at a time, holding :attr:`Filesystem.lock`.  Three ways out of
that order:

* return ``Later(work)``: ``work`` runs *without* the lock, while other threads read requests or on
  a worker, and its result is the reply: for reads from a slow source;
* return ``Sync(fd, data_only)``: likewise, for fsync;
* raise ``NeedsWorker`` before anything has changed: the whole request is repeated on a
  worker, again with the lock held;
* on a worker (``self.on_worker()``), let the lock go around long copying with ``unlocked()``,
  and check afterwards what may have changed meanwhile.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from lazarette.fuse.journal import Journal, Meta, Shared, State
from lazarette.fuse.protocol import InitFlag
from lazarette.fuse.requests import (
    CopyIn,
    CreateIn,
    FallocateIn,
    FsyncIn,
    GetattrIn,
    LseekIn,
    MkdirIn,
    MknodIn,
    OpenIn,
    ReadIn,
    ReleaseIn,
    RenameIn,
    Request,
    SetattrIn,
    SetxattrIn,
    WriteIn,
)

_NO_JOURNAL = Journal()


class NeedsWorker(Exception):
    """The request may block for long: repeat it on a worker."""


@dataclass(frozen=True, slots=True)
class Later:
    """Work to do without the lock; what it returns is the reply body."""

    work: Callable[[], bytes]


class Sync(NamedTuple):
    """A descriptor to write out, without the lock, and to close.

    Attributes:
        fd: of the request's own.
        data_only: leave out what reading the data does not need.
    """

    fd: int
    data_only: bool

    def work(self) -> bytes:
        """Do it; the reply body."""
        try:
            (os.fdatasync if self.data_only else os.fsync)(self.fd)
        finally:
            os.close(self.fd)
        return b""


Reply = bytes | int | Later | Sync
"""What a method returns; a number is that of an error, as if it was raised."""


class Connection:
    """What a filesystem may ask of its server; this one, unconnected, does nothing.

    Attributes:
        passthrough: whether the kernel reads and writes backing files itself.
        reason: why ``passthrough`` is as it is, for people.
    """

    passthrough = False
    reason = "not connected"

    def backing_open(self, fd: int) -> int:
        """Register a backing file; see :func:`lazarette.fuse.native.backing_open_plain`."""
        raise OSError(errno.EOPNOTSUPP, "no passthrough")

    def backing_close(self, backing: int) -> None:
        """Give a backing id back."""

    def forget_attributes(self, node: int) -> None:
        """Make the kernel ask for the attributes of a node again."""

    def forget_data(self, node: int) -> None:
        """Make the kernel drop attributes and cached pages of a node."""

    def forget_name(self, parent: int, name: bytes) -> None:
        """Make the kernel look a name up again."""


class Filesystem:
    """Base of all filesystems: every request is answered ENOSYS until overridden."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.connection = Connection()
        self._readers = {threading.get_ident()}

    # -- life ---------------------------------------------------------------------------

    def wanted(self) -> InitFlag:
        """Abilities to ask the kernel for, beside those the server itself uses."""
        return InitFlag(0)

    def connect(self, connection: Connection, granted: InitFlag) -> None:
        """INIT is through; called on a thread that reads requests, the only one as yet."""
        self.connection = connection
        self._readers = {threading.get_ident()}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The present thread reads requests: it must not block with the lock held."""
        myself = threading.get_ident()
        self._readers.add(myself)
        try:
            yield
        finally:
            self._readers.discard(myself)

    @property
    def journal(self) -> Journal:
        """Where what the kernel knows is noted."""
        return _NO_JOURNAL

    def keep_journal(
        self, shared: Shared, meta: Meta, attempts: dict[int, int] | None = None
    ) -> None:
        """Note from now on, in shared memory, what the kernel knows."""
        raise OSError(errno.EOPNOTSUPP, "this filesystem has no journal")

    def resume(self, state: State) -> int:
        """Go on where another server stopped; how many nodes were not found again."""
        raise OSError(errno.EOPNOTSUPP, "this filesystem has no journal")

    def hand_over(self) -> set[int]:
        """This process is about to become another program; descriptors that one needs."""
        return set()

    def take_back(self) -> None:
        """It did not."""

    def unsee(self, numbers: list[int]) -> None:
        """Take back the lookups of a request whose reply never arrived."""

    def give_up(self) -> None:
        """The mount is gone: what still waits for something waits for nobody."""

    def destroy(self) -> None:
        """The mount is gone: close everything."""

    def on_worker(self) -> bool:
        """Whether the present thread may block."""
        return threading.get_ident() not in self._readers

    @contextmanager
    def unlocked(self) -> Iterator[None]:
        """Let other requests go on meanwhile; only on a worker."""
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()

    # -- names --------------------------------------------------------------------------

    def lookup(self, request: Request, name: bytes) -> Reply:
        """LOOKUP: the node behind a name; counts one lookup."""
        raise OSError(errno.ENOSYS, "lookup")

    def forget(self, node: int, lookups: int) -> None:
        """FORGET: the kernel gives lookups back."""

    def readlink(self, request: Request) -> Reply:
        """READLINK: target of a symlink."""
        raise OSError(errno.ENOSYS, "readlink")

    def symlink(self, request: Request, name: bytes, target: bytes) -> Reply:
        """SYMLINK."""
        raise OSError(errno.ENOSYS, "symlink")

    def mknod(self, request: Request, args: MknodIn, name: bytes) -> Reply:
        """MKNOD: device, FIFO, socket or regular file."""
        raise OSError(errno.ENOSYS, "mknod")

    def mkdir(self, request: Request, args: MkdirIn, name: bytes) -> Reply:
        """MKDIR."""
        raise OSError(errno.ENOSYS, "mkdir")

    def unlink(self, request: Request, name: bytes) -> Reply:
        """UNLINK."""
        raise OSError(errno.ENOSYS, "unlink")

    def rmdir(self, request: Request, name: bytes) -> Reply:
        """RMDIR."""
        raise OSError(errno.ENOSYS, "rmdir")

    def rename(self, request: Request, args: RenameIn, old: bytes, new: bytes) -> Reply:
        """RENAME and RENAME2."""
        raise OSError(errno.ENOSYS, "rename")

    def link(self, request: Request, node: int, name: bytes) -> Reply:
        """LINK: one more name for ``node``."""
        raise OSError(errno.ENOSYS, "link")

    # -- attributes ---------------------------------------------------------------------

    def getattr(self, request: Request, args: GetattrIn) -> Reply:
        """GETATTR."""
        raise OSError(errno.ENOSYS, "getattr")

    def setattr(self, request: Request, args: SetattrIn) -> Reply:
        """SETATTR: chmod, chown, truncate, times."""
        raise OSError(errno.ENOSYS, "setattr")

    def statfs(self, request: Request) -> Reply:
        """STATFS."""
        raise OSError(errno.ENOSYS, "statfs")

    def setxattr(self, request: Request, args: SetxattrIn, name: bytes, value: bytes) -> Reply:
        """SETXATTR."""
        raise OSError(errno.ENOSYS, "setxattr")

    def getxattr(self, request: Request, size: int, name: bytes) -> Reply:
        """GETXATTR; ``size`` 0 asks how long the value is."""
        raise OSError(errno.ENOSYS, "getxattr")

    def listxattr(self, request: Request, size: int) -> Reply:
        """LISTXATTR; ``size`` 0 asks how long the list is."""
        raise OSError(errno.ENOSYS, "listxattr")

    def removexattr(self, request: Request, name: bytes) -> Reply:
        """REMOVEXATTR."""
        raise OSError(errno.ENOSYS, "removexattr")

    # -- files --------------------------------------------------------------------------

    def open(self, request: Request, args: OpenIn) -> Reply:
        """OPEN."""
        raise OSError(errno.ENOSYS, "open")

    def create(self, request: Request, args: CreateIn, name: bytes) -> Reply:
        """CREATE: make a file and open it."""
        raise OSError(errno.ENOSYS, "create")

    def tmpfile(self, request: Request, args: CreateIn) -> Reply:
        """TMPFILE: make a file without a name and open it."""
        raise OSError(errno.EOPNOTSUPP, "tmpfile")

    def read(self, request: Request, args: ReadIn) -> Reply:
        """READ."""
        raise OSError(errno.ENOSYS, "read")

    def write(self, request: Request, args: WriteIn, data: memoryview) -> Reply:
        """WRITE; ``data`` is valid until the method returns."""
        raise OSError(errno.ENOSYS, "write")

    def flush(self, request: Request) -> Reply:
        """FLUSH: a descriptor is closed; others may remain."""
        raise OSError(errno.ENOSYS, "flush")

    def release(self, request: Request, args: ReleaseIn) -> Reply:
        """RELEASE: the last descriptor of an open is gone."""
        return b""

    def fsync(self, request: Request, args: FsyncIn) -> Reply:
        """FSYNC."""
        raise OSError(errno.ENOSYS, "fsync")

    def fallocate(self, request: Request, args: FallocateIn) -> Reply:
        """FALLOCATE."""
        raise OSError(errno.EOPNOTSUPP, "fallocate")

    def lseek(self, request: Request, args: LseekIn) -> Reply:
        """LSEEK with SEEK_DATA or SEEK_HOLE."""
        raise OSError(errno.ENOSYS, "lseek")

    def copy_file_range(self, request: Request, args: CopyIn) -> Reply:
        """COPY_FILE_RANGE; the reply is the count as ``write_reply`` packs it."""
        raise OSError(errno.EOPNOTSUPP, "copy_file_range")

    def syncfs(self, request: Request) -> Reply:
        """SYNCFS."""
        raise OSError(errno.ENOSYS, "syncfs")

    # -- directories --------------------------------------------------------------------

    def opendir(self, request: Request, args: OpenIn) -> Reply:
        """OPENDIR; ENOSYS tells the kernel to do without, and to cache listings."""
        raise OSError(errno.ENOSYS, "opendir")

    def readdir(self, request: Request, args: ReadIn) -> Reply:
        """READDIR: packed ``dirent`` from ``args.offset`` on, at most ``args.size`` bytes."""
        raise OSError(errno.ENOSYS, "readdir")

    def readdirplus(self, request: Request, args: ReadIn) -> Reply:
        """READDIRPLUS: each ``dirent`` after an entry; each entry counts one lookup."""
        raise OSError(errno.ENOSYS, "readdirplus")

    def releasedir(self, request: Request, args: ReleaseIn) -> Reply:
        """RELEASEDIR."""
        return b""

    def fsyncdir(self, request: Request, args: FsyncIn) -> Reply:
        """FSYNCDIR."""
        raise OSError(errno.ENOSYS, "fsyncdir")

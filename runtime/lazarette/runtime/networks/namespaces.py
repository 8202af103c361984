"""Network namespaces that outlive their processes: made, entered, removed.

A namespace is kept by binding it to a file (as ``ip netns`` does), so that a container's
addresses and ports exist before its first process and survive a restart of ours.
Namespaces belong to threads: a thread may step into another one and back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from lazarette.storage.errors import InternalError, MissingFeature

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
MS_BIND = 4096
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *values: object) -> None:
    if getattr(_libc, name)(*values) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class NetNamespace:
    """A namespace held open by a descriptor.

    Args:
        descriptor: of the namespace; closed by :meth:`close`.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def current(cls) -> NetNamespace:
        """That of the calling thread."""
        return cls(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    @classmethod
    def at(cls, path: Path) -> NetNamespace:
        """The one bound to a file.

        Raises:
            FileNotFoundError: there is none.
        """
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def close(self) -> None:
        """Let it go; it lives on if it is bound or has processes."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> NetNamespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def enter(self) -> None:
        """Step into it, in this thread, for good."""
        _call("setns", self.descriptor, CLONE_NEWNET)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run the block in it, in this thread alone; never ``await`` inside."""
        with NetNamespace.current() as home:
            self.enter()
            try:
                yield
            finally:
                home.enter()


def unshare() -> None:
    """Step, in this thread, into a new empty namespace."""
    _call("unshare", CLONE_NEWNET)


def in_new_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of its own and wait: what it unshares dies with it."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            failure.append(error)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def create(path: Path, prepare: Callable[[], None], new: Path | None = None) -> None:
    """Make a namespace, prepare it from inside and bind it to ``path``.

    One that is there already is kept as it is.

    Args:
        path: where it is bound.
        prepare: called inside.
        new: a new namespace to take, one that a user namespace owns; None makes one.

    Raises:
        MissingFeature: the kernel has none.
        InternalError: it could not be made or bound.
    """
    if is_bound(path):
        return

    def work() -> None:
        if new is None:
            unshare()
        else:
            with NetNamespace.at(new) as owned:
                owned.enter()
        prepare()
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o444))
        _call("mount", b"/proc/thread-self/ns/net", os.fsencode(path), b"none", MS_BIND, None)

    try:
        in_new_thread(work)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS):
            raise MissingFeature("the kernel has no network namespaces") from error
        raise InternalError(f"make network namespace {path}: {error.strerror}") from error


def is_bound(path: Path) -> bool:
    """Whether a namespace is bound to ``path``: its file is on another device then."""
    try:
        return os.stat(path).st_dev != os.stat(path.parent).st_dev
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Unbind a namespace and remove the file; nothing there is fine."""
    while True:
        try:
            _call("umount2", os.fsencode(path), MNT_DETACH)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                break
            raise InternalError(f"unbind {path}: {error.strerror}") from error
    path.unlink(missing_ok=True)

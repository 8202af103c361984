"""Mounts as their users see them: start a server process, adopt it, ask it, stop it.

Example::

    from lazarette.fuse.client import UnionMount
    from lazarette.fuse.spec import UnionSpec

    union = UnionMount(
        UnionSpec(
            mountpoint="/run/x/merged", control="/run/x/fuse.sock",
            lowers=["/layers/top", "/layers/base"], upper="/layers/u", work="/layers/w",
        )
    )
    union.start()              # returns once the mount answers; the server outlives us
    union.alive()              # True while mount and server answer
    union.status().passthrough # who reads and writes; .reason says why
    union.ensure()             # after a restart of the daemon
    union.upgrade()            # after one of the package: the mount goes on with its code
    union.stop()               # EBUSY while used; stop(lazy=True) takes it out of sight

A daemon that restarts makes the same object again and calls :meth:`Mount.ensure`: a living
server is adopted, a dead one is replaced.  A server that is killed is followed by its standby
without that; only while neither runs, users of the mount get ENOTCONN, never a hang.

A snapshot of a union's upper layer, while it is mounted and written (reflinks needed)::

    union.prepare("/snaps/s1")         # before the gate: clones, and writes out, nearly all
    gate.close()                       # hold the writers
    taken = union.take("/snaps/s1")    # one instant; what changed since prepare
    gate.open()
    union.settle("/snaps/s1")          # durable now; /snaps/s1/upper and .../links are there
    for difference in differences("/snaps/s0", "/snaps/s1"): ...

``s1/upper`` is read as a lower layer of a union (with the same lowers below it), or as a
plain folder where the union has none.  To start a volume from it, clone both folders to
``upper`` and ``work/links``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from lazarette.fuse import control, jsontext, mount, spec, syscalls
from lazarette.fuse.filler import Progress
from lazarette.fuse.serve import Started, Status
from lazarette.fuse.snapshots import Taken
from lazarette.fuse.spec import LazySpec, Spec, UnionSpec

_START_TIMEOUT = 60.0
_STATUS_TIMEOUT = 10.0
_STOP_TIMEOUT = 30.0
_SNAPSHOT_TIMEOUT = 3600.0
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount of any kind, running or not.

    Attributes:
        spec: what is mounted, and where.
    """

    spec: Spec

    def start(self) -> Started:
        """Start a server process and wait until the mount answers.

        Raises:
            OSError: what mounting failed with; ETIMEDOUT after a minute.
        """
        command = [sys.executable, "-m", "lazarette.fuse.serve"]
        try:
            done = subprocess.run(
                command,
                input=spec.render(self.spec),
                capture_output=True,
                timeout=_START_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(errno.ETIMEDOUT, "server does not start", self.spec.mountpoint) from error
        if not done.stdout:
            text = done.stderr.decode(errors="replace").strip() or "no reason given"
            raise OSError(errno.EIO, f"server does not start: {text}", self.spec.mountpoint)
        started = jsontext.decode(done.stdout, type=Started)
        if started.errno:
            raise OSError(started.errno, started.message, self.spec.mountpoint)
        return started

    def call(self, command: str, timeout: float = _STATUS_TIMEOUT, **arguments: object) -> bytes:
        """Send a command to the server; see :func:`lazarette.fuse.control.call`."""
        return bytes(control.call(self.spec.control, command, timeout, **arguments))

    def status(self) -> Status:
        """What the server says of itself; of its successor when it is killed meanwhile.

        Raises:
            OSError: it is not there or does not answer.
        """
        for _ in range(_TRIES):
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                return jsontext.decode(self.call("status"), type=Status)
        return jsontext.decode(self.call("status"), type=Status)

    def upgrade(self, python: str = sys.executable) -> Status:
        """Have the server replace itself with the code installed now; mount and files go on.

        Raises:
            OSError: EOPNOTSUPP when the mount has no standby (ask again after :meth:`stop` and
                :meth:`start`), EIO when the new code does not start: the old one goes on.
        """
        before = self.status()
        with contextlib.suppress(ConnectionResetError):
            self.call("upgrade", _STOP_TIMEOUT, python=python)
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            after = self.status()
            if after.handovers > before.handovers:
                break
            if time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, "server does not end", self.spec.mountpoint)
            time.sleep(0.01)
        if after.pid != before.pid:
            raise OSError(errno.EIO, "new server does not start", self.spec.mountpoint)
        return after

    def alive(self) -> bool:
        """Whether the mount is there and its server answers."""
        try:
            self.status()
        except OSError:
            return False
        return mount.is_mounted(self.spec.mountpoint)

    def ensure(self) -> bool:
        """Adopt a living server, or start one in place of a dead one; True when adopted.

        Raises:
            OSError: what mounting failed with; ETIMEDOUT when there is a server that does not
                answer: two of them would undo each other's work.
        """
        try:
            self.status()
        except TimeoutError:
            raise
        except OSError:
            adopted = False
        else:
            adopted = mount.is_mounted(self.spec.mountpoint)
        if adopted:
            return True
        self.clear()
        self.start()
        return False

    def clear(self) -> None:
        """Take away the mounts of dead servers at the mount point."""
        while mount.is_mounted(self.spec.mountpoint):
            mount.unmount(self.spec.mountpoint, lazy=True)

    @contextlib.contextmanager
    def processes(self) -> Iterator[list[int]]:
        """Pidfds of the server and its standby, for the length of the block.

        The standby shares the server's descriptors: what is open in them is closed when both
        have ended.  They are none when no server is there, or it does not answer.
        """
        with contextlib.ExitStack() as held:
            found: list[int] = []
            with contextlib.suppress(OSError):
                found = self._processes(held)
            yield found

    def _processes(self, held: contextlib.ExitStack) -> list[int]:
        status, found = self.status(), []
        for pid in (status.pid, status.standby):
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    found.append(os.pidfd_open(pid))
                    held.callback(os.close, found[-1])
        return found

    def stop(self, lazy: bool = False) -> None:
        """Unmount and wait for the server to end; does nothing when there is neither.

        Raises:
            OSError: EBUSY while files on it are open and ``lazy`` is not set; ETIMEDOUT when
                there is a server that does not answer or does not end, ``lazy`` not being set:
                it still works on what is shown.
        """
        if lazy:
            self._stop_lazily()
            return
        until = time.monotonic() + _STOP_TIMEOUT
        while True:  # again when it was killed meanwhile, and another server goes on
            with contextlib.ExitStack() as held:
                serving: list[int] = []
                try:
                    serving = self._processes(held)
                except TimeoutError:
                    raise
                except OSError:
                    self.clear()
                    return
                if mount.is_mounted(self.spec.mountpoint):
                    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                        self.call("stop", _STOP_TIMEOUT)
                for process in serving:
                    if not syscalls.ended(process, max(0.0, until - time.monotonic())):
                        where = self.spec.mountpoint
                        raise OSError(errno.ETIMEDOUT, "server does not end", where)

    def _stop_lazily(self) -> None:
        try:
            self.status()
        except OSError:
            self.clear()
            return
        if mount.is_mounted(self.spec.mountpoint):
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                self.call("stop", _STOP_TIMEOUT, lazy=True)


class LazyMount(Mount):
    """A mounted lazy tree; see :mod:`lazarette.fuse.lazy`."""

    spec: LazySpec

    def fill(self, bytes_per_second: float = 0.0) -> None:
        """Bring everything here in the background, at most so fast (0: without limit)."""
        self.call("fill", bytes_per_second=bytes_per_second)

    def progress(self) -> Progress:
        """How far the filling is."""
        return jsontext.decode(self.call("progress"), type=Progress)


class UnionMount(Mount):
    """A mounted union: what a volume or layer driver works with."""

    spec: UnionSpec

    def flush(self) -> None:
        """Write out dirty pages of files open for writing."""
        self.call("flush", _SNAPSHOT_TIMEOUT)

    def changed(self) -> list[bytes]:
        """Paths of the upper layer that may differ from the last snapshot.

        Raises:
            OSError: EUCLEAN when that is not known.
        """
        return jsontext.decode(self.call("changed"), type=list[bytes])

    def prepare(self, target: str) -> None:
        """See :meth:`lazarette.fuse.snapshots.Snapshots.prepare`."""
        self.call("prepare", _SNAPSHOT_TIMEOUT, target=target)

    def take(self, target: str) -> Taken:
        """See :meth:`lazarette.fuse.snapshots.Snapshots.take`."""
        reply = self.call("take", _SNAPSHOT_TIMEOUT, target=target)
        return jsontext.decode(reply, type=Taken)

    def settle(self, target: str) -> Taken:
        """See :meth:`lazarette.fuse.snapshots.Snapshots.settle`."""
        reply = self.call("settle", _SNAPSHOT_TIMEOUT, target=target)
        return jsontext.decode(reply, type=Taken)

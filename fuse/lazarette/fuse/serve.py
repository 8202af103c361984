"""The server process: ``python -m lazarette.fuse.serve``, a JSON spec on standard input.

It detaches from its parent, mounts, serves, and prints one line of JSON when the mount is
ready (``{"pid": ..., "passthrough": ..., "reason": ...}``) or has failed
(``{"errno": ..., "message": ...}``).  It lives until it is unmounted: by the ``stop``
command, SIGTERM, or umount(8).

A server that is killed is replaced by its standby, and by ``upgrade`` it replaces itself with
the code that is installed then: in both cases mount, open files and requests under way go on.

Commands of every kind: ``status``, ``stop`` (``lazy``: bool), ``upgrade`` (``python``: which
interpreter).  Unions add ``flush``,
``prepare``, ``take``, ``settle`` (``target``: folder of the snapshot) and ``changed``; lazy
trees ``fill`` (``bytes_per_second``) and ``progress``.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Mapping

import msgspec

from lazarette.fuse import journal, jsontext, mount, spec, standby
from lazarette.fuse.control import Arguments, Command, ControlSocket
from lazarette.fuse.filesystem import Filesystem
from lazarette.fuse.journal import Shared, State
from lazarette.fuse.lazy import LazyFilesystem
from lazarette.fuse.loopback import LoopbackFilesystem
from lazarette.fuse.restore import is_connection
from lazarette.fuse.server import Server
from lazarette.fuse.snapshots import Snapshots
from lazarette.fuse.source import Source
from lazarette.fuse.spec import LazySpec, LoopbackSpec, Spec, UnionSpec
from lazarette.fuse.union import UnionFilesystem, UnionOptions

log = logging.getLogger(__name__)

_WORKERS = 8
_LAZY_WORKERS = 64


class Started(msgspec.Struct, omit_defaults=True):
    """The line the process prints: where it runs, or why it does not."""

    pid: int = 0
    passthrough: bool = False
    reason: str = ""
    errno: int = 0
    message: str = ""


class Status(msgspec.Struct):
    """Answer to ``status``.

    Attributes:
        passthrough, reason: who reads and writes, and why.
        through_opens, plain_opens: opens so far of either way, for unions.
        nodes: inodes the kernel holds.
        standby: process that goes on when the server is killed, 0 for none.
        handovers: servers of this mount before this one.
        lost: nodes the present server did not find again.
    """

    pid: int
    kind: str
    mountpoint: str
    passthrough: bool
    reason: str
    through_opens: int = 0
    plain_opens: int = 0
    nodes: int = 0
    standby: int = 0
    handovers: int = 0
    lost: int = 0


def build(wanted: Spec) -> Filesystem:
    """The filesystem a spec describes."""
    if isinstance(wanted, UnionSpec):
        return UnionFilesystem(
            UnionOptions(
                wanted.lowers,
                wanted.upper,
                wanted.work,
                volatile=wanted.volatile,
                reserve_wh=wanted.reserve_wh,
                redirect=wanted.redirect,
            )
        )
    if isinstance(wanted, LoopbackSpec):
        return LoopbackFilesystem(wanted.root, wanted.work)
    return LazyFilesystem(lambda: _source(wanted), wanted.store, wanted.deadline, wanted.reads)


def _source(wanted: LazySpec) -> Source:
    """Call the function a spec names."""
    module, _, function = wanted.source.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise OSError(errno.EINVAL, f"no source {wanted.source}: {error}") from error
    source: Source = factory(**wanted.arguments)
    return source


class Process:
    """One mount with its control socket."""

    def __init__(
        self, wanted: Spec, shared: Shared | None = None, state: State | None = None
    ) -> None:
        self._spec = wanted
        self._shared = shared
        self._state = state
        self._lost = 0
        self._filesystem = build(wanted)
        allow = wanted.allow_other
        read_only = wanted.read_only
        if isinstance(wanted, UnionSpec) and wanted.upper is None:
            read_only = True
        self._options = mount.MountOptions(
            read_only=read_only, allow_other=mount.privileged() if allow is None else allow
        )
        if state is not None:
            assert shared is not None
            self._control = ControlSocket(wanted.control, self._commands(), shared.listener)
            device = shared.device
        else:
            self._control = ControlSocket(wanted.control, self._commands())
            device = self._mount()
            # not after a kill: what killed the server may have been the source
            if isinstance(self._filesystem, LazyFilesystem):
                self._filesystem.warm()
        workers = _LAZY_WORKERS if isinstance(wanted, LazySpec) else _WORKERS
        self.server = Server(
            self._filesystem,
            device,
            passthrough=wanted.passthrough,
            workers=workers,
            shared=shared,
            spec=spec.render(wanted),
        )
        if shared is not None:
            shared.listener, shared.device = self._control.fileno(), device
        if state is not None:
            self._lost = self._filesystem.resume(state)
            if self._lost:
                log.warning("%d files were not found again", self._lost)
            self.server.resume(state)

    def _mount(self) -> int:
        try:
            return mount.mount(self._spec.mountpoint, self._options)
        except BaseException:
            self._control.close()
            raise

    def _commands(self) -> Mapping[str, Command]:
        commands: dict[str, Command] = {
            "status": self._status,
            "stop": self._stop,
            "upgrade": self._upgrade,
        }
        union = self._filesystem
        if isinstance(union, UnionFilesystem) and union.dirty is not None:
            assert union.stack.upper is not None
            snapshots = Snapshots(union, union.dirty, union.stack.upper.fd, union.index)

            def on_target(method: Callable[[str], object]) -> Command:
                return lambda arguments: method(str(arguments.get("target", "")))

            commands["flush"] = lambda arguments: snapshots.flush()
            commands["changed"] = lambda arguments: snapshots.changed()
            commands["prepare"] = on_target(snapshots.prepare)
            commands["take"] = on_target(snapshots.take)
            commands["settle"] = on_target(snapshots.settle)
        if isinstance(self._filesystem, LazyFilesystem):
            lazy = self._filesystem

            def fill(arguments: Arguments) -> None:
                rate = arguments.get("bytes_per_second", 0.0)
                lazy.fill(float(rate) if isinstance(rate, int | float) else 0.0)

            commands["fill"] = fill
            commands["progress"] = lambda arguments: lazy.state()
        return commands

    def _status(self, arguments: Arguments) -> Status:
        status = Status(
            os.getpid(),
            type(self._spec).__struct_config__.tag,  # type: ignore[arg-type]
            self._spec.mountpoint,
            self.server.passthrough,
            self.server.reason,
        )
        status.lost = self._lost
        if self._shared is not None:
            status.standby, status.handovers = self._shared.keeper, self._shared.handovers
        if isinstance(self._filesystem, UnionFilesystem):
            with self._filesystem.lock:
                status.through_opens = self._filesystem.files.through_opens
                status.plain_opens = self._filesystem.files.plain_opens
                status.nodes = len(self._filesystem.tree.nodes)
        return status

    def _stop(self, arguments: Arguments) -> None:
        mount.unmount(self._spec.mountpoint, lazy=bool(arguments.get("lazy")))

    def _upgrade(self, arguments: Arguments) -> None:
        """Become the code that is installed now; on success the caller loses its connection.

        The standby, of the present code, goes on if that does not start.
        """
        if self._shared is None or not self._shared.keeper:
            raise OSError(errno.EOPNOTSUPP, "the mount has no standby")
        python = str(arguments.get("python") or sys.executable)
        command = [python, "-m", "lazarette.fuse.serve", "--resume", str(self._shared.fd)]
        self._filesystem.lock.acquire()
        try:
            held = self._filesystem.hand_over()
            for fd in held | {self._shared.fd, self._shared.device, self._shared.listener}:
                os.set_inheritable(fd, True)
            os.execv(python, command)
        finally:
            self._filesystem.take_back()
            self._filesystem.lock.release()

    def terminate(self) -> None:
        """Unmount on SIGTERM, out of sight at once if the mount is in use."""

        def work() -> None:
            try:
                mount.unmount(self._spec.mountpoint)
            except OSError as error:
                log.warning("unmounting %s lazily: %s", self._spec.mountpoint, error)
                mount.unmount(self._spec.mountpoint, lazy=True)

        threading.Thread(target=work, name="fuse-terminate", daemon=True).start()

    def run(self, ready: int = -1) -> None:
        """Serve until unmounted; the ready line goes to the descriptor ``ready``, if any."""

        def announce() -> None:
            self.server.ready.wait()
            line = Started(os.getpid(), self.server.passthrough, self.server.reason)
            os.write(ready, msgspec.json.encode(line) + b"\n")
            os.close(ready)

        self._control.start()
        if ready >= 0:
            threading.Thread(target=announce, name="fuse-ready", daemon=True).start()
        try:
            if self._state is not None:
                self.server.send_again()
            self.server.run()
        finally:
            if self._shared is not None:
                self._shared.ended = True
                if self._shared.keeper:
                    standby.dismiss(self._shared.keeper)
            self._control.close()


def _detach(wanted: Spec) -> None:
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    target = null
    if wanted.log is not None:
        target = os.open(wanted.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(target, 2)
    for fd in {null, target} - {0, 1, 2}:
        os.close(fd)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")


def _tune() -> None:
    """Room for descriptors; rarer garbage collection; quick hand-over between threads."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    sys.setswitchinterval(0.0005)


def _child(document: bytes, ready: int) -> None:
    try:
        wanted = spec.parse(document)
        _detach(wanted)
        _tune()
        _ignore_signals()
        shared = None
        if wanted.standby and standby.possible():
            shared = Shared.create()
            shared.keeper = standby.start(shared)
        process = Process(wanted, shared)
    except msgspec.MsgspecError as error:
        os.write(ready, msgspec.json.encode(Started(errno=22, message=str(error))) + b"\n")
        return
    except OSError as error:
        line = Started(errno=error.errno or 5, message=str(error))
        os.write(ready, msgspec.json.encode(line) + b"\n")
        return
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    process.run(ready)


def _ignore_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _take_over(shared: Shared, replaced: int = 0) -> None:
    """Serve on where another server of the mount stopped.

    Args:
        shared: what that left.
        replaced: standby that is to end once this server can serve; 0: it ends by itself.
    """
    state = journal.read(shared)
    keep = state.descriptors() | {shared.fd, shared.device, shared.listener}
    standby.close_others(keep)
    for fd in keep:
        with contextlib.suppress(OSError):  # closed, and that not noted any more
            os.set_inheritable(fd, False)
    if not is_connection(shared.device) or not state.meta.spec:
        shared.ended = True  # it died before anyone could use the mount, or after
        return
    keeper = standby.start(shared)
    if not replaced:
        shared.keeper = keeper
    shared.handovers += 1
    wanted = spec.parse(state.meta.spec)
    process = Process(wanted, shared, state)
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    if replaced:
        shared.keeper = keeper
        standby.dismiss(replaced)
    shared.failures = 0
    process.run()


def _run(begin: Callable[[], None]) -> None:
    """Serve as ``begin`` says; does not return in a server that follows another."""
    try:
        begin()
        return
    except standby.Successor as successor:
        shared = successor.shared
    while True:
        try:
            _take_over(shared)
        except standby.Successor:
            continue
        except BaseException:
            log.exception("taking over failed")
        os._exit(0)


def _resume(fd: int) -> int:
    """Go on in this process, which was another version of this program before."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    shared = Shared(fd)
    _tune()
    _ignore_signals()
    _run(lambda: _take_over(shared, shared.keeper))
    return 0


def main() -> int:
    """Read the spec, become a process of its own, and report on standard output."""
    if sys.argv[1:2] == ["--resume"]:
        return _resume(int(sys.argv[2]))
    document = sys.stdin.buffer.read()
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        try:
            _run(lambda: _child(document, send))
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        line = pipe.read()
    if not line:
        line = msgspec.json.encode(Started(errno=5, message="the server died")) + b"\n"
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
    return 0 if jsontext.decode(line, type=Started).errno == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

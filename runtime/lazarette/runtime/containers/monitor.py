"""conmon: the small process that keeps a container's ends while the daemon may go.

One conmon a container, another one an exec session.  It holds the terminal or pipes,
writes the log, passes data to and from attached clients through a SEQPACKET socket, and
leaves the exit code in a file.  Its folder is the bundle: ``config.json``, ``attach``,
``ctl``, pid files and, after the end, a file named like the container with the exit code.

Protocol (conmon 2.1): a byte on the start pipe lets it go on; on the sync pipe it then
says ``{"data": PID}`` or ``{"data": -1, "message": …}``.  With ``--exec-attach`` it says
``{"data": 0}`` on the attach pipe first and waits for a second byte.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime.containers.cgroups import Hierarchies, prime_move
from lazarette.runtime.containers.errors import MonitorFailed, StartFailed
from lazarette.runtime.containers.oci import OciRuntime
from lazarette.storage import process

PACKET = 8192 + 1
STDOUT, STDERR = 2, 3


class _Sync(msgspec.Struct):
    data: int
    message: str = ""


@dataclass(frozen=True)
class Started:
    """A container or exec process that was made: its pid and its monitor's."""

    pid: int
    monitor_pid: int


@dataclass(frozen=True)
class Launch:
    """How a monitor is started.

    Attributes:
        container: id for the runtime.
        unique: id of this monitor: the container's, or the exec session's.
        folder: the bundle.
        log: path of the log, None to keep none.
        tty: the process gets a terminal.
        stdin: the process gets a stdin.
        leave_stdin_open: a client that leaves does not end stdin.
        exec_spec: process file of an exec session.
        command: the program it starts, for errors.
        owner: user and group of the host who own the process's pipes.
    """

    container: str
    unique: str
    folder: Path
    log: Path | None = None
    tty: bool = False
    stdin: bool = False
    leave_stdin_open: bool = False
    exec_spec: Path | None = None
    command: str = ""
    owner: tuple[int, int] = (0, 0)


class Monitor:
    """Starts monitors.

    Args:
        conmon: the program.
        runtime: what it runs containers with.
        hierarchies: the host's control groups, into which the runtime moves processes.
    """

    def __init__(self, conmon: str, runtime: OciRuntime, hierarchies: Hierarchies) -> None:
        self._conmon = conmon
        self._runtime = runtime
        self._hierarchies = hierarchies

    async def launch(self, launch: Launch) -> Started:
        """Make a container (not yet started) or run an exec session without clients.

        Raises:
            StartFailed: the runtime could not; with Docker's exit code for it.
            MonitorFailed: conmon itself failed.
        """
        if launch.exec_spec is not None and launch.owner != (0, 0):
            session = await self.prepare_exec(launch)
            session.go()
        else:
            self._prime()
            session = await asyncio.to_thread(self._spawn, launch)
        try:
            started = await session.finish(launch.folder)
        finally:
            session.close()
        if launch.exec_spec is None and launch.owner != (0, 0):
            _give_pipes(launch)
        return started

    async def prepare_exec(self, launch: Launch) -> Session:
        """Start an exec session that waits for :meth:`Session.go`, so that clients can
        attach before its first byte.

        Raises:
            MonitorFailed: conmon itself failed.
        """
        self._prime()
        session = await asyncio.to_thread(self._spawn, launch, True)
        try:
            await session.wait_attachable()
            if launch.owner != (0, 0):
                _give_pipes(launch)
        except BaseException:
            session.close()
            raise
        return session

    def _prime(self) -> None:
        asyncio.get_running_loop().run_in_executor(None, prime_move, self._hierarchies)

    def _spawn(self, launch: Launch, attach: bool = False) -> Session:
        program = self._runtime.creator if launch.exec_spec is None else self._runtime.program
        folder = launch.folder
        argv = [
            self._conmon, "--api-version", "1",
            "-c", launch.container, "-u", launch.unique, "-n", launch.unique[:12],
            "-r", program, "--runtime-arg", "--root", "--runtime-arg", str(self._runtime.root),
            "-b", str(folder), "-p", str(folder / "pid"), "-P", str(folder / "conmon.pid"),
            "--exit-dir", str(folder), "-0", str(folder), "--full-attach",
            "--log-level", "error", "--no-sync-log",
            "-l", "none" if launch.log is None else f"k8s-file:{launch.log}",
        ]  # fmt: skip
        if launch.tty:
            argv.append("-t")
        if launch.stdin:
            argv.append("-i")
        if launch.leave_stdin_open:
            argv.append("--leave-stdin-open")
        if launch.exec_spec is not None:
            argv += ["-e", "--exec-process-spec", str(launch.exec_spec)]
            if attach:
                argv.append("--exec-attach")
        sync_read, sync_write = os.pipe()
        start_read, start_write = os.pipe()
        attach_read, attach_write = os.pipe()
        env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "TZ": "UTC",
            "_OCI_SYNCPIPE": str(sync_write),
            "_OCI_STARTPIPE": str(start_read),
        }
        if attach:
            env["_OCI_ATTACHPIPE"] = str(attach_write)
        pipes = sync_read, start_write, attach_read
        session = Session(pipes, self._runtime.name, launch.command)
        try:
            child = process.spawn(
                argv, env=env, cwd=str(folder), pass_fds=(sync_write, start_read, attach_write)
            )
        except BaseException:
            session.close()
            raise
        finally:
            for fd in (sync_write, start_read, attach_write):
                os.close(fd)
        os.write(start_write, b"x")
        child.wait()  # conmon goes to the background at once
        if child.returncode != 0:
            session.close()
            raise MonitorFailed(f"conmon ended with code {child.returncode} at start")
        return session


class Session:
    """The daemon's ends of a monitor's pipes while it starts."""

    def __init__(self, pipes: tuple[int, int, int], runtime: str, command: str) -> None:
        self._sync, self._start, self._attach = pipes
        self._runtime, self._command = runtime, command

    async def wait_attachable(self) -> None:
        """Wait until clients can connect to the exec session's socket."""
        said = await _read_line(self._attach)
        if not said:
            raise MonitorFailed("conmon ended before its exec session could be attached to")

    def go(self) -> None:
        """Let the waiting exec session run."""
        os.write(self._start, b"x")

    async def finish(self, folder: Path) -> Started:
        """Wait for the pid.

        Raises:
            StartFailed: the runtime could not start it.
            MonitorFailed: conmon died.
        """
        said = await _read_line(self._sync)
        if not said:
            raise MonitorFailed("conmon ended without a word")
        sync = jsontext.decode(said.splitlines()[0], type=_Sync)
        if sync.data < 0:
            raise start_failure(sync.message, self._runtime, self._command)
        return Started(sync.data, _monitor_pid(folder))

    def close(self) -> None:
        """Close the pipes."""
        for fd in (self._sync, self._start, self._attach):
            if fd >= 0:
                os.close(fd)
        self._sync = self._start = self._attach = -1


async def _read_line(fd: int) -> bytes:
    """Read from a pipe until a newline or its end, without a thread."""
    loop = asyncio.get_running_loop()
    os.set_blocking(fd, False)
    collected = b""
    done: asyncio.Future[None] = loop.create_future()

    def readable() -> None:
        nonlocal collected
        try:
            part = os.read(fd, 65536)
        except BlockingIOError:
            return
        collected += part
        if (not part or b"\n" in part) and not done.done():
            done.set_result(None)

    loop.add_reader(fd, readable)
    try:
        await done
    finally:
        loop.remove_reader(fd)
    return collected.strip()


def start_failure(message: str, runtime: str, command: str = "") -> StartFailed:
    """The runtime's words as the error clients know (exit codes 125 to 128).

    Args:
        message: what it said.
        runtime: its name.
        command: the program that was to be started.
    """
    text = re.sub(r"\s+", " ", message).strip()
    low = text.lower()
    program = re.search(
        r"(?:executable file|exec:?) [`\"']?([^`'\"]+)[`'\"]?:? (?:not found|in)", text
    )
    name = program[1] if program else ""
    if "executable file" in low and "not found" in low:
        tail = text
        if "/" in name:
            tail = f'exec: "{name}": stat {name}: no such file or directory'
        elif name:
            tail = f'exec: "{name}": executable file not found in $PATH'
        return StartFailed(f"{tail}: unknown", 127, runtime)
    if "no such file or directory" in low:
        return StartFailed(f"{low}: unknown", 127, runtime)
    if low.startswith("open executable:") and command:  # crun's word for what is no file too
        return StartFailed(f'exec: "{command}": permission denied: unknown', 126, runtime)
    refusals = ("permission denied", "is a directory", "exec format error", "not permitted")
    if any(refusal in low for refusal in refusals):
        # the words by which the docker command line chooses its exit code
        words = low if "permission denied" in low else f"{low}: permission denied"
        return StartFailed(f"{words}: unknown", 126, runtime)
    return StartFailed(f"{text}: unknown", 128, runtime)


def _give_pipes(launch: Launch) -> None:
    """Let a remapped user open the ``/dev/stdout`` of a process anew.

    Of the runtimes only crun does so, and only for a container's first process.
    """
    descriptors = Path(f"/proc/{_monitor_pid(launch.folder)}/fd")
    for each in descriptors.iterdir():
        with suppress(FileNotFoundError):  # it goes on closing what it has no use for
            if os.readlink(each).startswith("pipe:"):
                os.chown(each, *launch.owner)


def _monitor_pid(folder: Path) -> int:
    return int((folder / "conmon.pid").read_text())


def connect(folder: Path) -> socket.socket:
    """A connection to a monitor's attach socket, whatever the length of its path.

    Raises:
        OSError: the monitor is gone.
    """
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            made.connect(f"/proc/self/fd/{directory}/attach")
        except BaseException:
            made.close()
            raise
        return made
    finally:
        os.close(directory)


def end(folder: Path) -> None:
    """Kill a monitor whose exec session has not begun; it never will."""
    with suppress(ProcessLookupError):
        os.kill(_monitor_pid(folder), signal.SIGKILL)


def resize(folder: Path, height: int, width: int) -> None:
    """Set the size of the terminal.

    Raises:
        OSError: the monitor is gone.
    """
    _control(folder, f"1 {height} {width}\n")


def reopen_log(folder: Path) -> None:
    """Make the monitor open its log anew, after the old one was renamed."""
    _control(folder, "2 0 0\n")


def _control(folder: Path, line: str) -> None:
    fd = os.open(folder / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def exit_time(folder: Path, unique: str) -> int:
    """When the monitor wrote the exit code, nanoseconds since the epoch; 0 if it did not."""
    try:
        return (folder / unique).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def read_exit(folder: Path, unique: str) -> int | None:
    """The exit code the monitor left, None when there is none (yet)."""
    try:
        text = (folder / unique).read_text().strip()
    except FileNotFoundError:
        return None
    return int(text) if text.lstrip("-").isdecimal() else None

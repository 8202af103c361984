"""Further processes in running containers (``docker exec``)."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lazarette.runtime.containers import monitor as conmon
from lazarette.runtime.containers import pidfd, spec
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.errors import ExecNotFound, StartFailed, WrongState
from lazarette.runtime.containers.lifecycle import Lifecycle
from lazarette.runtime.containers.model import ExecRequest, words
from lazarette.runtime.containers.monitor import Launch, Monitor
from lazarette.runtime.containers.record import Status
from lazarette.runtime.containers.rootfs import resolve_user
from lazarette.runtime.containers.spec import HostFacts
from lazarette.runtime.containers.streams import (
    Attach,
    ClientStream,
    frame,
    parse_detach_keys,
    pump,
)
from lazarette.storage.errors import InvalidArgument, LazaretteError

CANNOT_START = 126
"""Exit code of a session whose program could not be started, missing ones included."""

log = logging.getLogger(__name__)


@dataclass
class ExecSession:
    """One process that was, or will be, started in a container.

    Attributes:
        id: 64 hex digits.
        container: in which it runs.
        request: as asked.
        folder: its monitor's.
        pid: as the host sees it; 0 before its start.
        exit_code: None until it ended.
        started: it cannot be started again.
    """

    id: str
    container: Container
    request: ExecRequest
    folder: Path
    pid: int = 0
    exit_code: int | None = None
    started: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self.started and self.exit_code is None

    @property
    def command(self) -> list[str]:
        """Program and arguments."""
        return words(self.request.cmd)


class ExecSessions:
    """Makes and runs exec sessions.

    Args:
        lifecycle: for events and background work.
        monitor: starts conmon.
        facts: what the host can do.
    """

    def __init__(self, lifecycle: Lifecycle, monitor: Monitor, facts: HostFacts) -> None:
        self._lifecycle = lifecycle
        self._monitor = monitor
        self._facts = facts
        self._sessions: dict[str, ExecSession] = {}

    def create(self, container: Container, request: ExecRequest) -> ExecSession:
        """Note a session; nothing runs yet.

        Raises:
            InvalidArgument: no command, or detach keys that are none.
            WrongState: the container does not run, or is paused.
        """
        if not words(request.cmd):
            raise InvalidArgument("No exec command specified")
        parse_detach_keys(request.detach_keys)
        self._check(container)
        session_id = secrets.token_hex(32)
        session = ExecSession(
            session_id, container, request, container.bundle / "exec" / session_id[:32]
        )
        self._sessions[session_id] = session
        container.sessions[session_id] = session
        self._emit(session, "exec_create: " + " ".join(session.command))
        return session

    @staticmethod
    def _check(container: Container) -> None:
        status = container.state.status
        if status is Status.PAUSED:
            raise WrongState(
                f"Container {container.name} is paused, unpause the container before exec"
            )
        if status is Status.RESTARTING:
            raise WrongState(
                f"Container {container.id} is restarting, wait until the container is running"
            )
        if not container.state.running:
            raise WrongState(f"container {container.id} is not running")

    def get(self, reference: str) -> ExecSession:
        """A session by its id.

        Raises:
            ExecNotFound: there is none.
        """
        session = self._sessions.get(reference)
        if session is None:
            raise ExecNotFound(reference)
        return session

    def drop(self, session: ExecSession) -> None:
        """Forget one session: of a command of our own, that nobody will ask about."""
        self._sessions.pop(session.id, None)
        session.container.sessions.pop(session.id, None)

    def forget(self, container: Container) -> None:
        """Drop the sessions of a container that is removed."""
        for session_id in container.sessions:
            self._sessions.pop(session_id, None)
        container.sessions.clear()

    def _emit(self, session: ExecSession, action: str, **more: str) -> None:
        self._lifecycle.emit(session.container, action, execID=session.id, **more)

    # ---- running

    async def start(self, session: ExecSession, console: list[int] | None = None) -> None:
        """Run it without a client.

        Raises:
            StartFailed: its program could not be started.
            WrongState: it ran before, or the container does not run.
        """
        self._begin(session)
        try:
            launch = await asyncio.to_thread(self._prepare, session, console)
            started = await self._monitor.launch(launch)
        except BaseException as failed:
            self._failed(session, failed)
            raise
        self._runs(session, started)

    async def run_attached(
        self,
        session: ExecSession,
        raw: bool,
        console: list[int] | None,
        hijack: Callable[[], Awaitable[ClientStream]],
    ) -> None:
        """Run it with a client attached, until it ends or the client goes.

        Args:
            session: which.
            raw: the client wants bytes without frames.
            console: height and width of its terminal.
            hijack: takes over the client's connection; called once nothing can be lost.

        Raises:
            WrongState: it ran before, or the container does not run.
            MonitorFailed: conmon failed before the client's connection was taken over.
        """
        self._begin(session)
        request = session.request
        attach = Attach(
            stdin=request.attach_stdin,
            stdout=request.attach_stdout,
            stderr=request.attach_stderr,
            tty=raw,
            detach_keys=parse_detach_keys(request.detach_keys),
        )
        with ExitStack() as held:
            try:
                launch = await asyncio.to_thread(self._prepare, session, console)
                starting = await self._monitor.prepare_exec(launch)
                held.callback(starting.close)
                client, monitor = await self._take_over(launch, hijack)
            except BaseException as failed:
                self._failed(session, failed)
                raise
            starting.go()
            try:
                started = await starting.finish(launch.folder)
            except LazaretteError as failed:
                monitor.close()
                self._failed(session, failed)
                text = f"OCI runtime exec failed: exec failed: {_reason(failed)}\r\n".encode()
                await client.write(text if raw else frame(1, text))
                return
        self._runs(session, started)
        left_first = await pump(client, monitor, attach)
        if left_first:
            self._emit(session, "exec_detach")
        else:
            await session.ended.wait()

    @staticmethod
    async def _take_over(
        launch: Launch, hijack: Callable[[], Awaitable[ClientStream]]
    ) -> tuple[ClientStream, socket.socket]:
        """The client's connection and the monitor's, of a session that has not begun."""
        monitor = conmon.connect(launch.folder)
        try:
            return await hijack(), monitor
        except BaseException:
            # nobody will see what it does, so that it must not begin
            conmon.end(launch.folder)
            monitor.close()
            raise

    def _begin(self, session: ExecSession) -> None:
        if session.started:
            raise WrongState(f"Error: Exec command {session.id} is already running")
        self._check(session.container)
        session.started = True

    def _prepare(self, session: ExecSession, console: list[int] | None) -> Launch:
        tty = session.request.tty
        session.folder.mkdir(parents=True, mode=0o700)
        container, request = session.container, session.request
        definition = container.definition
        root = container.open_root()
        try:
            groups = tuple(definition.host.group_add or ()) if not request.user else ()
            user = resolve_user(root, request.user or definition.config.user, groups)
        finally:
            os.close(root)
        env = spec.environment(definition, definition.config.hostname, user.home)
        given = {entry.partition("=")[0]: entry for entry in [*env, *(request.env or [])]}
        if tty:
            given.setdefault("TERM", "TERM=xterm")
        process = spec.further_process(
            definition,
            user,
            session.command,
            self._facts,
            env=[entry for entry in given.values() if "=" in entry],
            cwd=request.working_dir,
            terminal=tty,
            privileged=request.privileged,
        )
        size = console or request.console_size
        if tty and size and len(size) == 2 and any(size):
            process["consoleSize"] = {"height": size[0], "width": size[1]}
        file = session.folder / "process.json"
        file.write_bytes(msgspec.json.encode(process))
        return Launch(
            container=container.id,
            unique=session.id,
            folder=session.folder,
            tty=tty,
            stdin=request.attach_stdin,
            exec_spec=file,
            command=session.command[0],
            owner=container.owner,
        )

    def _runs(self, session: ExecSession, started: conmon.Started) -> None:
        session.pid = started.pid
        self._emit(session, "exec_start: " + " ".join(session.command))
        pidfd.on_exit(started.monitor_pid, lambda: self._ended(session))

    def _failed(self, session: ExecSession, failed: BaseException) -> None:
        session.exit_code = CANNOT_START if isinstance(failed, StartFailed) else 128
        session.ended.set()
        shutil.rmtree(session.folder, ignore_errors=True)

    def _ended(self, session: ExecSession) -> None:
        code = conmon.read_exit(session.folder, session.container.id)
        session.exit_code = 137 if code is None else code
        shutil.rmtree(session.folder, ignore_errors=True)
        session.ended.set()
        self._emit(session, "exec_die", exitCode=str(session.exit_code))

    async def resize(self, session: ExecSession, height: int, width: int) -> None:
        """Set the size of its terminal.

        Raises:
            WrongState: it does not run.
        """
        if not session.running:
            raise WrongState(f"cannot resize exec {session.id}: it is not running")
        try:
            conmon.resize(session.folder, height, width)
        except OSError as gone:
            raise WrongState(f"cannot resize exec {session.id}: {gone.strerror}") from gone


def _reason(failed: LazaretteError) -> str:
    if isinstance(failed, StartFailed):
        return f"unable to start container process: {failed.reason}"
    return failed.message

"""Start, stop, kill, pause and the end of containers.

The end of a run is seen by a descriptor of its monitor process; what the monitor left in
its exit file is the truth about it, also for a daemon that was not there.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from typing import Protocol

import msgspec

from lazarette.runtime.containers import monitor as conmon
from lazarette.runtime.containers import pidfd, spec
from lazarette.runtime.containers.cgroups import remove_empty
from lazarette.runtime.containers.container import Container, WaitFor
from lazarette.runtime.containers.errors import StartFailed, WrongState
from lazarette.runtime.containers.monitor import Launch, Monitor
from lazarette.runtime.containers.oci import OciRuntime
from lazarette.runtime.containers.record import Status
from lazarette.runtime.containers.setup import Preparer
from lazarette.runtime.containers.spec import HostFacts
from lazarette.runtime.containers.store import ContainerStore
from lazarette.runtime.events import EventBus
from lazarette.storage import process
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import InvalidArgument, LazaretteError, NotModified

DEFAULT_STOP_TIMEOUT = 10
LOST = 137
"""Exit code of a run whose monitor vanished without leaving one."""

log = logging.getLogger(__name__)


class AfterExit(Protocol):
    """Decides what follows the end of a run: a restart, a removal or nothing."""

    def restarts(self, container: Container) -> bool:
        """Whether the policy starts it again; sets its back-off."""
        ...

    def follow_up(self, container: Container) -> None:
        """Start the timer or the removal; called outside the container's lock."""
        ...

    async def never_began(self, container: Container) -> None:
        """A run could not begin: a container that is to remove itself is removed on return."""
        ...

    def started(self, container: Container) -> None:
        """A run began: health checks and log rotation may."""
        ...


class Lifecycle:
    """Moves containers through their states.

    Args:
        store: their records.
        preparer: what runs need on the host.
        monitor: starts conmon.
        runtime: the OCI runtime.
        facts: what the host can do.
        events: told of everything.
        clock: stamps starts and ends.
    """

    def __init__(
        self,
        store: ContainerStore,
        preparer: Preparer,
        monitor: Monitor,
        runtime: OciRuntime,
        facts: HostFacts,
        events: EventBus,
        clock: Clock,
    ) -> None:
        self._store = store
        self._preparer = preparer
        self._monitor = monitor
        self._runtime = runtime
        self._facts = facts
        self._events = events
        self._clock = clock
        self._watches: dict[str, Callable[[], None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.after: AfterExit | None = None

    def emit(self, container: Container, action: str, **attributes: str) -> None:
        """Publish an event of a container."""
        self._events.publish("container", action, container.id, container.attributes(**attributes))

    def in_background(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run something the caller does not wait for, to its end."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Stop watching; containers run on."""
        for stop in self._watches.values():
            stop()
        self._watches.clear()
        remove_empty(self._facts.hierarchies, self._preparer.cgroup_parent)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- start

    async def start(self, container: Container, *, by_policy: bool = False) -> None:
        """Start a container that does not run.

        One that is to remove itself is gone when its start has failed, before the error
        reaches whoever asked for the start.

        Raises:
            NotModified: it runs already.
            WrongState: it is paused, or being removed.
            StartFailed: its program could not be started.
        """
        async with container.lock:
            state = container.state
            if state.status is Status.PAUSED:
                raise WrongState("cannot start a paused container, try unpause instead")
            if state.running:
                raise NotModified(f"container {container.name} is running already")
            if container.removing or state.status in (Status.REMOVING, Status.DEAD):
                raise WrongState("container is marked for removal and cannot be started")
            self._cancel_restart(container)
            fault: BaseException | None = None
            try:
                await self._start(container)
            except BaseException as failed:  # noqa: BLE001 - raised again once the lock is free
                await self._start_failed(container, failed)
                fault = failed
            else:
                if not by_policy:
                    state.restart_count = 0
                    state.backoff_ns = 0
                self._store.save_state(container.id, state)
        if fault is not None:
            if self.after is not None:
                await asyncio.shield(self.after.never_began(container))
            raise fault
        self.emit(container, "start")
        self.watch(container)
        if self.after is not None:
            self.after.started(container)

    async def _start(self, container: Container) -> None:
        definition, state = container.definition, container.state
        owner = await asyncio.to_thread(self._prepare, container)
        config = definition.config
        started = await self._monitor.launch(
            Launch(
                container=container.id,
                unique=container.id,
                folder=container.bundle,
                log=container.log_path,
                tty=config.tty,
                stdin=config.open_stdin,
                leave_stdin_open=config.open_stdin and not config.stdin_once,
                command=definition.command[0],
                owner=owner,
            )
        )
        self._connect_waiting(container)
        await asyncio.to_thread(self._run, container)
        state.status = Status.RUNNING
        state.pid, state.monitor_pid = started.pid, started.monitor_pid
        state.pid_start = pidfd.start_time(started.pid)
        state.started_ns = self._clock.now_ns()
        state.exit_code, state.error, state.oom_killed = 0, "", False
        state.stopped_by_hand, state.restart_due = False, False

    def _prepare(self, container: Container) -> tuple[int, int]:
        """Make what a run needs; the user and group of the host it runs as, 0 for any of
        the host's own."""
        if container.root_mounted or container.bundle.exists():
            self._preparer.release(container)  # what a killed daemon left
        prepared = self._preparer.prepare(container)
        config = spec.build(container.definition, prepared, self._facts)
        (container.bundle / "config.json").write_bytes(msgspec.json.encode(config))
        if prepared.idmap is None:
            return 0, 0
        return prepared.idmap.to_host(prepared.user.uid, prepared.user.gid)

    def _run(self, container: Container) -> None:
        done = process.run(self._runtime.command("start", container.id), check=False)
        if done.code != 0:
            said = done.stderr.decode(errors="replace")
            command = container.definition.command[0]
            raise conmon.start_failure(said, self._runtime.name, command)

    @staticmethod
    def _connect_waiting(container: Container) -> None:
        waiting, container.waiting = container.waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(conmon.connect(container.bundle))

    async def _start_failed(self, container: Container, failed: BaseException) -> None:
        state = container.state
        state.status = Status.CREATED if not state.started_ns else Status.EXITED
        state.exit_code = failed.code if isinstance(failed, StartFailed) else 128
        state.error = str(failed)
        state.pid = state.monitor_pid = 0
        state.restart_due = False
        if isinstance(failed, StartFailed):
            state.finished_ns = self._clock.now_ns()
        try:
            await asyncio.shield(asyncio.to_thread(self._preparer.release, container))
        except LazaretteError as bad:
            log.warning("cleaning up after the failed start of %s: %s", container.name, bad)
        self._store.save_state(container.id, state)
        container.end_waiting()
        container.has_ended()

    @staticmethod
    def _cancel_restart(container: Container) -> None:
        if container.restart_timer is not None:
            container.restart_timer.cancel()
            container.restart_timer = None

    # ---- end

    def watch(self, container: Container) -> None:
        """Notice the end of a running container."""

        def ended() -> None:
            self._watches.pop(container.id, None)
            self.in_background(self.ended(container))

        self._watches[container.id] = pidfd.on_exit(container.state.monitor_pid, ended)

    async def ended(self, container: Container) -> None:
        """Put the end of a run into the books and clean up after it."""
        async with container.lock:
            state = container.state
            if not state.running:
                return
            code = conmon.read_exit(container.bundle, container.id)
            state.oom_killed = (container.bundle / "oom").exists()
            state.exit_code = LOST if code is None else code
            ended_ns = conmon.exit_time(container.bundle, container.id)
            state.finished_ns = ended_ns or self._clock.now_ns()
            try:
                await asyncio.to_thread(self._preparer.release, container)
            except LazaretteError as bad:
                log.warning("cleaning up after %s: %s", container.name, bad)
            runtime = max(0, state.finished_ns - state.started_ns) // NANOSECONDS
            if state.oom_killed:
                self.emit(container, "oom")
            state.pid = state.monitor_pid = 0
            self._stop_health(container)
            again = self.after is not None and self.after.restarts(container)
            state.status = Status.RESTARTING if again else Status.EXITED
            state.restart_due = again
            gone = container.definition.host.auto_remove and not again
            if not gone:
                self._store.save_state(container.id, state)
            self.emit(
                container,
                "die",
                exitCode=str(state.exit_code),
                execDuration=str(runtime),
            )
            if not again:
                container.end_waiting()
        if not gone:
            container.has_ended()
        if self.after is not None:
            self.after.follow_up(container)
        elif gone:
            container.has_ended()

    @staticmethod
    def _stop_health(container: Container) -> None:
        if container.health_task is not None:
            container.health_task.cancel()
            container.health_task = None

    # ---- signals

    def require_running(self, container: Container) -> None:
        """Refuse what needs a running container.

        Raises:
            WrongState: it does not run.
        """
        if not container.state.running:
            raise WrongState(f"container {container.id} is not running")

    async def kill(self, container: Container, text: str) -> None:
        """Send a signal to the first process.

        Raises:
            InvalidArgument: no such signal.
            WrongState: it does not run.
        """
        number = pidfd.parse_signal(text or "KILL")
        if not number:
            raise InvalidArgument(f"Invalid signal: {text}")
        if not container.state.running:
            raise WrongState(
                f"cannot kill container: {container.name}: container {container.id} is not running"
            )
        if number in (signal.SIGKILL, self.stop_signal(container)):
            container.state.stopped_by_hand = True
        self._signal(container, number)
        self.emit(container, "kill", signal=str(number))
        if number == signal.SIGKILL:
            future = container.expect(WaitFor.NOT_RUNNING)
            try:
                async with asyncio.timeout(10):
                    await future
            except TimeoutError:
                log.warning("container %s does not end after SIGKILL", container.name)

    def _signal(self, container: Container, number: int) -> None:
        state = container.state
        pidfd.send(state.pid, state.pid_start, number)
        if number == signal.SIGKILL and state.status is Status.PAUSED:
            self._preparer.group(container).set_frozen(False, self._clock)

    def stop_signal(self, container: Container) -> int:
        """The signal that asks it to stop."""
        wanted = container.definition.config.stop_signal
        text = wanted if isinstance(wanted, str) else ""
        return pidfd.parse_signal(text) or int(signal.SIGTERM)

    def stop_timeout(self, container: Container) -> int:
        """Seconds it is given to stop."""
        wanted = container.definition.config.stop_timeout
        return wanted if isinstance(wanted, int) else DEFAULT_STOP_TIMEOUT

    async def stop(self, container: Container, timeout: int | None = None, text: str = "") -> None:
        """Ask a container to stop, and kill it after ``timeout`` seconds (negative: never).

        Raises:
            NotModified: it does not run.
        """
        state = container.state
        if state.status is Status.RESTARTING:
            self._cancel_restart(container)
            state.stopped_by_hand, state.restart_due = True, False
            state.status = Status.EXITED
            self._store.save_state(container.id, state)
            container.has_ended()
            self.emit(container, "stop")
            return
        if not state.running:
            raise NotModified(f"container {container.name} does not run")
        number = pidfd.parse_signal(text) if text else self.stop_signal(container)
        if not number:
            raise InvalidArgument(f"Invalid signal: {text}")
        state.stopped_by_hand = True
        container.stopping = True
        try:
            await self._stop(container, number, timeout)
        finally:
            container.stopping = False
        self.emit(container, "stop")

    async def _stop(self, container: Container, number: int, timeout: int | None) -> None:
        limit = self.stop_timeout(container) if timeout is None else timeout
        ended = container.expect(WaitFor.NOT_RUNNING)
        self._signal(container, number)
        self.emit(container, "kill", signal=str(number))
        if container.state.status is Status.PAUSED:
            await self.unpause(container)
        try:
            async with asyncio.timeout(None if limit < 0 else limit):
                await asyncio.shield(ended)
            return
        except TimeoutError:
            log.info("container %s ignores signal %d, killing it", container.name, number)
        if container.state.running:
            self._signal(container, signal.SIGKILL)
            self.emit(container, "kill", signal="9")
        try:
            async with asyncio.timeout(10):
                await asyncio.shield(ended)
        except TimeoutError:
            raise WrongState(
                f"cannot stop container: {container.name}: it did not end after SIGKILL"
            ) from None

    async def restart(
        self, container: Container, timeout: int | None = None, text: str = ""
    ) -> None:
        """Stop it if it runs, then start it."""
        removes = container.definition.host.auto_remove
        container.definition.host.auto_remove = False
        try:
            await self.stop(container, timeout, text)
        except NotModified:
            pass
        finally:
            container.definition.host.auto_remove = removes
        await self.start(container)
        self.emit(container, "restart")

    # ---- pause

    async def pause(self, container: Container) -> None:
        """Freeze every process.

        Raises:
            WrongState: it does not run, or is frozen already.
        """
        async with container.lock:
            self.require_running(container)
            if container.state.status is Status.PAUSED:
                raise WrongState(f"Container {container.id} is already paused")
            group = self._preparer.group(container)
            await asyncio.to_thread(group.set_frozen, True, self._clock)
            container.state.status = Status.PAUSED
            self._store.save_state(container.id, container.state)
        self.emit(container, "pause")

    async def unpause(self, container: Container) -> None:
        """Let every process go on.

        Raises:
            WrongState: it is not frozen.
        """
        async with container.lock:
            if container.state.status is not Status.PAUSED:
                raise WrongState(f"Container {container.id} is not paused")
            group = self._preparer.group(container)
            await asyncio.to_thread(group.set_frozen, False, self._clock)
            container.state.status = Status.RUNNING
            self._store.save_state(container.id, container.state)
        self.emit(container, "unpause")

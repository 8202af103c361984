"""Health checks: probes in running containers, and what they say of them.

A probe is a process of its own, started by the runtime in the container.  One that takes
too long is killed with everything it started (case A34): leaves first, so that parents
reap their children and nothing is left as a zombie of a first process that never waits.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
from typing import TYPE_CHECKING

import msgspec

from lazarette.runtime.containers import spec
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.model import Healthcheck
from lazarette.runtime.containers.record import Health, HealthProbe, Status
from lazarette.runtime.containers.rootfs import resolve_user
from lazarette.storage import process
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import LazaretteError

if TYPE_CHECKING:
    from lazarette.runtime.containers.manager import ContainerManager

INTERVAL = TIMEOUT = 30 * NANOSECONDS
START_INTERVAL = 5 * NANOSECONDS
RETRIES = 3
KEPT_PROBES = 5
LONGEST_OUTPUT = 4096
TIMED_OUT = -1
REAPING = NANOSECONDS
ENDING = 5 * NANOSECONDS
DEAD = (b"Z", b"X")

log = logging.getLogger(__name__)


def probe_command(check: Healthcheck, shell: list[str] | None) -> list[str] | None:
    """What a health check runs; None when there is none."""
    test = check.test or []
    if not test or test[0] == "NONE" or len(test) < 2:
        return None
    if test[0] == "CMD-SHELL":
        return [*(shell or ["/bin/sh", "-c"]), " ".join(test[1:])]
    return test[1:] if test[0] == "CMD" else test


class HealthChecks:
    """Probes containers while they run.

    Args:
        manager: the containers.
    """

    def __init__(self, manager: ContainerManager) -> None:
        self._manager = manager

    def begin(self, container: Container, resumed: bool = False) -> None:
        """Probe a container from now on, if it has a health check."""
        config = container.definition.config
        check = config.healthcheck
        if not isinstance(check, Healthcheck):
            container.state.health = None
            return
        command = probe_command(check, config.shell if isinstance(config.shell, list) else None)
        if command is None:
            container.state.health = None
            return
        if not resumed or container.state.health is None:
            container.state.health = Health()
        if container.health_task is not None:
            container.health_task.cancel()
        container.health_task = self._manager.lifecycle.in_background(
            self._watch(container, check, command)
        )

    async def _watch(self, container: Container, check: Healthcheck, command: list[str]) -> None:
        clock = self._manager.clock
        began = container.state.started_ns
        timeout = (check.timeout or TIMEOUT) / NANOSECONDS
        while container.state.running:
            health = container.state.health
            if health is None:
                return
            starting = clock.now_ns() - began < check.start_period
            interval = check.interval or INTERVAL
            if starting and health.status == "starting":
                interval = min(interval, check.start_interval or START_INTERVAL)
            await asyncio.sleep(interval / NANOSECONDS)
            if container.state.status is not Status.RUNNING:
                continue
            probe = await self._probe(container, command, timeout)
            if container.state.status is Status.RUNNING:
                starting = probe.start_ns - began < check.start_period
                self._note(container, health, probe, check, starting)

    def _note(
        self,
        container: Container,
        health: Health,
        probe: HealthProbe,
        check: Healthcheck,
        starting: bool,
    ) -> None:
        before = health.status
        health.log = [*health.log[-(KEPT_PROBES - 1) :], probe]
        if probe.exit_code == 0:
            health.failing_streak, health.status = 0, "healthy"
        elif not (starting and before == "starting"):
            health.failing_streak += 1
            if health.failing_streak >= (check.retries or RETRIES):
                health.status = "unhealthy"
        if health.status != before:
            self._manager.store.save_state(container.id, container.state)
            self._manager.lifecycle.emit(container, f"health_status: {health.status}")

    async def _probe(self, container: Container, command: list[str], timeout: float) -> HealthProbe:
        clock = self._manager.clock
        begin = clock.now_ns()
        try:
            code, output = await self._run(container, command, timeout)
        except (LazaretteError, OSError) as bad:
            code, output = 1, str(bad).encode()
        if code == TIMED_OUT:
            output = f"Health check exceeded timeout ({_seconds(timeout)})".encode()
        if len(output) > LONGEST_OUTPUT:
            output = output[: LONGEST_OUTPUT - 3] + b"..."
        return HealthProbe(begin, clock.now_ns(), code, output.decode(errors="replace"))

    async def _run(
        self, container: Container, command: list[str], timeout: float
    ) -> tuple[int, bytes]:
        name = f"health-{secrets.token_hex(4)}"
        file = container.bundle / f"{name}.json"
        pid_file = container.bundle / f"{name}.pid"
        file.write_bytes(msgspec.json.encode(self._process(container, command)))
        self._manager.lifecycle.emit(container, "exec_create: " + " ".join(command))
        read, write = os.pipe()
        try:
            argv = self._manager.runtime.command(
                "exec", "--process", str(file), "--pid-file", str(pid_file), container.id
            )
            child = process.spawn(argv, stdout=write, stderr=write)
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        output = bytearray()
        loop = asyncio.get_running_loop()
        os.set_blocking(read, False)
        loop.add_reader(read, _collect, read, output)
        try:
            ended = asyncio.ensure_future(asyncio.to_thread(child.wait))
            self._manager.lifecycle.emit(container, "exec_start: " + " ".join(command))
            try:
                async with asyncio.timeout(timeout):
                    code = await asyncio.shield(ended)
            except (TimeoutError, asyncio.CancelledError) as why:
                await asyncio.to_thread(self._end_tree, child.pid)
                await ended
                if isinstance(why, asyncio.CancelledError):
                    raise
                code = TIMED_OUT
            _collect(read, output)
        finally:
            loop.remove_reader(read)
            os.close(read)
            file.unlink(missing_ok=True)
            pid_file.unlink(missing_ok=True)
        self._manager.lifecycle.emit(container, "exec_die", exitCode=str(code))
        return code, bytes(output)

    def _process(self, container: Container, command: list[str]) -> dict[str, object]:
        definition = container.definition
        root = container.open_root()
        try:
            user = resolve_user(
                root, definition.config.user, tuple(definition.host.group_add or ())
            )
        finally:
            os.close(root)
        env = spec.environment(definition, definition.config.hostname, user.home)
        return spec.further_process(definition, user, command, self._manager.facts, env=env)

    def _end_tree(self, top: int) -> None:
        """Kill a probe with all it started, leaves first.

        A process is killed once it has reaped everything below it: killed earlier, its dead
        children would fall to the container's first process, which may never wait.  One that
        does not reap within ``REAPING`` never will, and goes all the same; what still forks
        after ``ENDING`` goes from the top.
        """
        clock = self._manager.clock
        began = clock.monotonic_ns()
        patience, size = began + REAPING, -1
        while tree := family(top):
            now = clock.monotonic_ns()
            if now >= began + ENDING:
                for pid in tree:
                    _kill(pid)
                break
            if len(tree) != size:
                size, patience = len(tree), now + REAPING
            for pid, children in tree.items():
                if not children:
                    self._kill_childless(pid)
                elif now >= patience and not any(child in tree for child in children):
                    _kill(pid)
            clock.sleep(0.005)
        _kill(top)

    def _kill_childless(self, pid: int) -> None:
        """Kill a process unless it forks just now: stopped, it is looked at once more."""
        _kill(pid, signal.SIGSTOP)
        for _ in range(20):
            if _process_state(pid) in (b"T", *DEAD):
                break
            self._manager.clock.sleep(0.001)
        if children_of(pid):
            _kill(pid, signal.SIGCONT)
        else:
            _kill(pid)


def family(top: int) -> dict[int, list[int]]:
    """Running processes below one, each with its children, those not yet reaped too."""
    found: dict[int, list[int]] = {}
    queue = children_of(top)
    while queue:
        pid = queue.pop()
        if _process_state(pid) not in DEAD:
            found[pid] = children_of(pid)
            queue += found[pid]
    return found


def children_of(pid: int) -> list[int]:
    """Children of a process, also dead ones it has not waited for yet.

    From ``/proc/PID/task/TID/children``.
    """
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                found += [int(word) for word in file.read().split()]
        except OSError:
            continue
    return found


def _process_state(pid: int) -> bytes:
    """The state letter of ``/proc/PID/stat``; ``X``, dead, where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return b"X"


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _collect(fd: int, output: bytearray) -> None:
    try:
        while part := os.read(fd, 65536):
            if len(output) <= LONGEST_OUTPUT:
                output += part
    except (BlockingIOError, OSError):
        return


def _seconds(timeout: float) -> str:
    return f"{timeout:g}s"

"""Containers as the rules of protection need them, and volumes held still for a backup."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from lazarette.backup.policy.access import Ended, User
from lazarette.backup.policy.hold import Held, Holder
from lazarette.backup.policy.model import ConsistencyRule
from lazarette.backup.policy.quiesce import Quiesced
from lazarette.runtime.containers import pidfd
from lazarette.runtime.containers.container import Container, WaitFor
from lazarette.runtime.containers.exec import ExecSession
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.containers.model import ExecRequest
from lazarette.runtime.containers.record import Status
from lazarette.runtime.protection.policies import PolicyBook
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import Conflict, NotFound, NotModified, Unavailable
from lazarette.storage.process import run as run_program
from lazarette.storage.state import State
from lazarette.storage.volumes.manager import VolumeManager

log = logging.getLogger(__name__)

_FRAME = struct.Struct(">BxxxL")
_STDERR = 2
_LOOK_S = 5.0
_CLOSE_S = 5.0
_MOST_OUTPUT = 1 << 20
_ENDING_S = 1.0
_WAIT_S = 20.0


class StillEnding(Unavailable):
    """A container that was asked to stop has neither ended nor used up its time."""

    number = 374


class _Client:
    """The other end of a command in a container: what it reads and what it wrote."""

    def __init__(self) -> None:
        self._input: asyncio.Queue[bytes] = asyncio.Queue()
        self.lines = asyncio.StreamReader(limit=_MOST_OUTPUT)
        self.stdout = bytearray()
        self.stderr = bytearray()

    def send(self, data: bytes) -> None:
        """Give the command something to read; empty ends its input."""
        self._input.put_nowait(data)

    async def read(self) -> bytes:
        """See :class:`ClientStream`."""
        return await self._input.get()

    async def write(self, data: bytes) -> None:
        """See :class:`ClientStream`: one frame a call."""
        stream, length = _FRAME.unpack_from(data)
        content = data[_FRAME.size : _FRAME.size + length]
        if stream == _STDERR:
            self.stderr += content[: max(_MOST_OUTPUT - len(self.stderr), 0)]
            return
        self.stdout += content[: max(_MOST_OUTPUT - len(self.stdout), 0)]
        self.lines.feed_data(content)


class CommandSession:
    """A command that goes on running in a container; see the rules' ``Session``."""

    def __init__(self, containers: ContainerManager, container: Container, argv: Sequence[str]):
        self._client = _Client()
        self._session = containers.execs.create(
            container,
            ExecRequest(attach_stdin=True, attach_stdout=True, attach_stderr=True, cmd=list(argv)),
        )
        self._containers = containers
        self._task = asyncio.create_task(self._attend())

    async def send(self, data: bytes) -> None:
        """See ``Session.send``."""
        self._client.send(data)

    async def read_line(self) -> bytes:
        """See ``Session.read_line``."""
        return await self._client.lines.readline()

    async def close(self) -> None:
        """See ``Session.close``."""
        self._client.send(b"")
        done, _ = await asyncio.wait({self._task}, timeout=_CLOSE_S)
        if not done:
            _kill(self._session)
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._containers.execs.drop(self._session)

    async def end(self, timeout: float) -> Ended:
        """Let it run to its end without input; killed after so many seconds."""
        self._client.send(b"")
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self._task)
        except TimeoutError:
            _kill(self._session)
            await self.close()
            return Ended(124, stderr=f"no end after {timeout:g} s".encode())
        finally:
            await self.close()
        code = self._session.exit_code
        words = bytes(self._client.stdout), bytes(self._client.stderr)
        return Ended(code if code is not None else 1, *words)

    async def _attend(self) -> None:
        try:
            await self._containers.execs.run_attached(self._session, False, None, self._taken)
        finally:
            self._client.lines.feed_eof()

    async def _taken(self) -> _Client:
        return self._client


def _kill(session: ExecSession) -> None:
    pidfd.send(session.pid, 0, signal.SIGKILL)


class EngineAccess:
    """The containers of this daemon; implements the rules' ``ContainerAccess``."""

    def __init__(self, containers: ContainerManager) -> None:
        self._containers = containers
        self._ending: dict[str, int] = {}

    async def users(self, volumes: Sequence[str]) -> Sequence[User]:
        """See ``ContainerAccess.users``."""
        found: dict[str, Container] = {}
        for volume in volumes:
            for one in self._containers.using_volume(volume):
                mounts = one.definition.mounts
                if one.state.running and any(p.name == volume and p.rw for p in mounts):
                    found[one.id] = one
        return [
            User(
                one.id,
                one.name.lstrip("/"),
                one.definition.config.image,
                one.definition.config.labels,
                one.state.status is Status.PAUSED,
            )
            for one in found.values()
        ]

    async def execute(self, container: str, argv: Sequence[str], timeout: float) -> Ended:
        """See ``ContainerAccess.execute``."""
        session = CommandSession(self._containers, self._containers.get(container), argv)
        return await session.end(timeout)

    async def session(self, container: str, argv: Sequence[str]) -> CommandSession:
        """See ``ContainerAccess.session``."""
        return CommandSession(self._containers, self._containers.get(container), argv)

    async def execute_on_host(self, argv: Sequence[str], timeout: float) -> Ended:
        """See ``ContainerAccess.execute_on_host``."""
        done = await asyncio.to_thread(run_program, argv, timeout=timeout, check=False)
        return Ended(done.code, done.stdout, done.stderr)

    async def pause(self, container: str) -> None:
        """See ``ContainerAccess.pause``."""
        try:
            await self._containers.lifecycle.pause(self._containers.get(container))
        except (NotFound, Conflict):
            return

    async def unpause(self, container: str) -> None:
        """See ``ContainerAccess.unpause``."""
        try:
            await self._containers.lifecycle.unpause(self._containers.get(container))
        except (NotFound, Conflict):
            return

    async def stop(self, container: str) -> int:
        """See ``ContainerAccess.stop``: its own signal and timeout (case A33)."""
        one = self._containers.get(container)
        removes, one.definition.host.auto_remove = one.definition.host.auto_remove, False
        try:
            await self._containers.lifecycle.stop(one)
        except NotModified:
            pass
        finally:
            one.definition.host.auto_remove = removes
        return one.state.exit_code

    async def start(self, container: str) -> None:
        """See ``ContainerAccess.start``.

        Whoever asked it to stop may have died meanwhile: a container that still runs is
        given its stop timeout to end before it counts as one that was never asked.

        Raises:
            StillEnding: it may yet end; ask again.
        """
        try:
            one = self._containers.get(container)
            await self._wait_for_end(one)
            await self._containers.lifecycle.start(one)
        except (NotFound, NotModified):
            pass
        self._ending.pop(container, None)

    async def _wait_for_end(self, one: Container) -> None:
        if not one.state.running:
            return
        clock = self._containers.clock
        patience = max(self._containers.lifecycle.stop_timeout(one), 0) + _ENDING_S
        now = clock.monotonic_ns()
        until = self._ending.setdefault(one.id, now + round(patience * NANOSECONDS))
        left = (until - now) / NANOSECONDS
        try:
            async with asyncio.timeout(max(min(left, _WAIT_S), 0)):
                await asyncio.shield(one.expect(WaitFor.NOT_RUNNING))
        except TimeoutError:
            if left > _WAIT_S:
                raise StillEnding(f"container {one.name} is still ending") from None


class Stillness:
    """Holds the users of volumes, and sees to it that nothing stays held.

    Args:
        containers: this daemon's.
        volumes: to find their folders.
        book: whose rule counts when none is given.
        state: where holds are recorded.
        clock: time.
    """

    def __init__(
        self,
        containers: ContainerManager,
        volumes: VolumeManager,
        book: PolicyBook,
        state: State,
        clock: Clock,
    ) -> None:
        self._book = book
        self._access = EngineAccess(containers)
        self._volumes = volumes
        self._quiesced = Quiesced(state, clock)
        self._holder = Holder(self._access, self._quiesced, clock)
        self._going_on: set[int] = set()
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Release what a killed daemon left held, and go on looking after it."""
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Look after nothing any more."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    @asynccontextmanager
    async def still(
        self, run: int, volumes: Sequence[str], rule: ConsistencyRule | None
    ) -> AsyncIterator[Held]:
        """Hold the users of volumes while the block runs; see :class:`Holder`.

        Args:
            run: its number in the journal.
            volumes: their names.
            rule: of the policy; None takes that of the first volume's.

        Raises:
            HookFailed: a command before it failed.
            ProfileFailed: a database could not be made consistent.
        """
        self._going_on.add(run)
        try:
            roots = await asyncio.to_thread(self._roots, volumes)
            if rule is None:
                rule = await asyncio.to_thread(self._rule, volumes)
            async with self._holder.still(run, volumes, roots, rule) as held:
                yield held
        finally:
            self._going_on.discard(run)

    def _rule(self, volumes: Sequence[str]) -> ConsistencyRule:
        policy = self._book.of(volumes[0])
        return ConsistencyRule() if policy is None else policy.consistency

    def _roots(self, volumes: Sequence[str]) -> list[bytes]:
        return [os.fsencode(self._volumes.get(volume).mountpoint) for volume in volumes]

    async def _watch(self) -> None:
        while True:
            await self.release()
            await asyncio.sleep(_LOOK_S)

    async def release_everything(self) -> None:
        """Release until nothing is held; for one that does nothing else."""
        await self.release()
        while self._quiesced.held_runs():
            await asyncio.sleep(1.0)
            await self.release()

    async def release(self) -> None:
        """End the holds of all runs that are not going on."""
        done = await self._quiesced.release_all(self._access, but=list(self._going_on))
        for run, problems in done.items():
            log.warning("released what run %d had left held", run)
            for problem in problems:
                log.error("releasing run %d: %s", run, problem)

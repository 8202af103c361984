"""One container in the daemon's memory: record, lock, waiters, attached clients, sessions."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from lazarette.runtime.config import Config
from lazarette.runtime.containers.errors import WrongState
from lazarette.runtime.containers.logs import ContainerLog, Rotation, parse_options
from lazarette.runtime.containers.record import Definition, State, Status
from lazarette.storage.errors import InvalidArgument
from lazarette.storage.idmaps import IdMap

if TYPE_CHECKING:
    from lazarette.runtime.containers.exec import ExecSession


class WaitFor(Enum):
    """What ``wait`` waits for."""

    NOT_RUNNING = "not-running"
    NEXT_EXIT = "next-exit"
    REMOVED = "removed"


@dataclass(frozen=True)
class Places:
    """Where a daemon keeps things of its containers.

    Attributes:
        data: folders that survive a reboot, one a container.
        run: folders that do not: bundles, sockets, pid files.
        roots: where remapped users reach the root of their container.
    """

    data: Path
    run: Path
    roots: Path

    @classmethod
    def of(cls, config: Config) -> Places:
        """The places of a daemon."""
        run = config.exec_root
        return cls(config.data_root / "containers", run / "containers", run / "roots")


@dataclass
class Container:
    """A container and everything the daemon holds for it while it runs.

    Attributes:
        definition, state: what is in the database.
        places: where its files are.
        lock: held while it is started, cleaned up or removed.
        waiting: clients attached before its start.
        sessions: exec sessions by id.
        root_mounted: its run holds a mount of its root.
        idmap: whom its users are on the host in this run; None: they are the host's.
        health_task, restart_timer: what goes on beside it.
        stopping: a stop by hand is under way.
        removing: a removal is under way.
    """

    definition: Definition
    state: State
    places: Places
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: list[asyncio.Future[socket.socket | None]] = field(default_factory=list)
    sessions: dict[str, ExecSession] = field(default_factory=dict)
    root_mounted: bool = False
    idmap: IdMap | None = None
    health_task: asyncio.Task[None] | None = None
    restart_timer: asyncio.TimerHandle | None = None
    stopping: bool = False
    removing: bool = False
    _waiters: dict[WaitFor, list[asyncio.Future[int]]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The id, 64 hex digits."""
        return self.definition.id

    @property
    def name(self) -> str:
        """The name without a slash."""
        return self.definition.name

    @property
    def data(self) -> Path:
        """Its folder that survives a reboot."""
        return self.places.data / self.id

    @property
    def bundle(self) -> Path:
        """Its folder of the current run."""
        return self.places.run / self.id

    @property
    def shown_root(self) -> Path:
        """Where its root is mounted for remapped users."""
        return self.places.roots / self.id

    @property
    def owner(self) -> tuple[int, int]:
        """User and group of the host that its root is."""
        return (0, 0) if self.idmap is None else self.idmap.root

    @property
    def log_path(self) -> Path | None:
        """Where conmon writes its log, None when it keeps none."""
        if self.definition.host.log_config.type == "none":
            return None
        return self.data / f"{self.id}.log"

    @property
    def log(self) -> ContainerLog | None:
        """Its log, None when it keeps none."""
        path = self.log_path
        if path is None:
            return None
        settings = self.definition.host.log_config
        try:
            rotation = parse_options(settings.type, settings.config)
        except InvalidArgument:
            rotation = Rotation()
        return ContainerLog(path, rotation)

    def open_root(self) -> int:
        """A descriptor of the root its first process sees; the caller closes it.

        Raises:
            WrongState: that process has ended, whether or not its end was noticed yet.
        """
        path, flags = f"/proc/{self.state.pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            return os.open(path, flags)
        except (FileNotFoundError, ProcessLookupError) as gone:
            raise WrongState(f"container {self.id} is not running") from gone

    @asynccontextmanager
    async def files_lock(self) -> AsyncIterator[None]:
        """Keep a container that does not run from being started while its files are open."""
        if self.state.running:
            yield
            return
        async with self.lock:
            yield

    def attributes(self, **more: str) -> dict[str, str]:
        """What its events tell: labels, image, name and more."""
        labels = self.definition.config.labels
        return {**labels, "image": self.definition.image_ref, "name": self.name, **more}

    def expect(self, condition: WaitFor) -> asyncio.Future[int]:
        """A future for the exit code once the condition holds.

        It is registered when this returns, so that nothing that happens later is missed.
        """
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        idle = self.state.status in (Status.CREATED, Status.EXITED, Status.DEAD)
        if condition is WaitFor.NOT_RUNNING and idle:
            future.set_result(self.state.exit_code)
        else:
            self._waiters.setdefault(condition, []).append(future)
        return future

    def has_ended(self) -> None:
        """Tell those who wait for the end of a run."""
        for condition in (WaitFor.NOT_RUNNING, WaitFor.NEXT_EXIT):
            self._tell(condition)

    def is_gone(self) -> None:
        """Tell everybody: the container was removed."""
        for condition in WaitFor:
            self._tell(condition)
        self.end_waiting()

    def _tell(self, condition: WaitFor) -> None:
        for future in self._waiters.pop(condition, []):
            if not future.done():
                future.set_result(self.state.exit_code)

    def end_waiting(self) -> None:
        """Let clients go that attached to a run that will not be."""
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

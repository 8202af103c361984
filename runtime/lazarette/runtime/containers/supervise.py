"""What follows a start and an end: restart policies, removal, health checks, log rotation."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from lazarette.runtime.containers import monitor as conmon
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.errors import ContainerNotFound
from lazarette.runtime.containers.health import HealthChecks
from lazarette.runtime.containers.logs import ContainerLog
from lazarette.runtime.containers.record import Status
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import LazaretteError, NotModified

if TYPE_CHECKING:
    from lazarette.runtime.containers.manager import ContainerManager

FIRST_BACKOFF = NANOSECONDS // 10
LONGEST_BACKOFF = 60 * NANOSECONDS
SETTLED = 10 * NANOSECONDS
"""A run that lasted this long starts the back-off anew."""
_ROTATION_CHECK = 1.0

log = logging.getLogger(__name__)


class Supervisor:
    """Implements :class:`lazarette.runtime.containers.lifecycle.AfterExit`.

    Args:
        manager: the containers.
    """

    def __init__(self, manager: ContainerManager) -> None:
        self._manager = manager
        self._health = HealthChecks(manager)

    # ---- end

    def restarts(self, container: Container) -> bool:
        """Whether the policy starts it again; sets its back-off."""
        state, policy = container.state, container.definition.host.restart_policy
        if state.stopped_by_hand or container.stopping or container.removing:
            return False
        wanted = policy.name in ("always", "unless-stopped") or (
            policy.name == "on-failure"
            and state.exit_code != 0
            and (not policy.maximum_retry_count or state.restart_count < policy.maximum_retry_count)
        )
        if not wanted:
            return False
        if state.finished_ns - state.started_ns >= SETTLED or not state.backoff_ns:
            state.backoff_ns = FIRST_BACKOFF
        else:
            state.backoff_ns = min(state.backoff_ns * 2, LONGEST_BACKOFF)
        return True

    def follow_up(self, container: Container) -> None:
        """Start the timer of the restart, or remove a container that is to remove itself."""
        if container.state.restart_due:
            delay = container.state.backoff_ns / NANOSECONDS
            loop = asyncio.get_running_loop()
            container.restart_timer = loop.call_later(
                delay, lambda: self._manager.lifecycle.in_background(self._restart(container))
            )
        elif container.definition.host.auto_remove and not container.removing:
            self._manager.lifecycle.in_background(self._remove(container))

    async def never_began(self, container: Container) -> None:
        """See :class:`lazarette.runtime.containers.lifecycle.AfterExit`."""
        if container.definition.host.auto_remove and not container.removing:
            await self._remove(container)

    async def _restart(self, container: Container) -> None:
        container.restart_timer = None
        if container.state.status is not Status.RESTARTING:
            return
        container.state.restart_count += 1
        try:
            await self._manager.lifecycle.start(container, by_policy=True)
        except NotModified:
            return
        except LazaretteError as bad:
            log.warning("restarting container %s: %s", container.name, bad)
            state = container.state
            state.finished_ns = self._manager.clock.now_ns()
            if not container.removing and self.restarts(container):
                state.status, state.restart_due = Status.RESTARTING, True
                self.follow_up(container)

    async def _remove(self, container: Container) -> None:
        try:
            await self._manager.remove(container, force=True, volumes=True)
        except ContainerNotFound:
            return
        except LazaretteError as bad:
            log.warning("removing container %s after its end: %s", container.name, bad)
            container.has_ended()

    # ---- start

    def started(self, container: Container) -> None:
        """A run began: probe its health and rotate its log while it lasts."""
        self._health.begin(container)
        kept = container.log
        if kept is not None and kept.rotation.max_size:
            self._manager.lifecycle.in_background(self._rotate(container, kept))

    def resumed(self, container: Container) -> None:
        """A run goes on under a new daemon."""
        self._health.begin(container, resumed=True)
        kept = container.log
        if kept is not None and kept.rotation.max_size:
            self._manager.lifecycle.in_background(self._rotate(container, kept))

    async def _rotate(self, container: Container, kept: ContainerLog) -> None:
        pid = container.state.pid
        with self._manager.watch.following(kept.path.parent) as changed:
            while container.state.running and container.state.pid == pid:
                try:
                    await asyncio.to_thread(
                        kept.rotate_if_due, lambda: conmon.reopen_log(container.bundle)
                    )
                except OSError as gone:
                    log.debug("rotating the log of %s: %s", container.name, gone)
                changed.clear()
                try:
                    async with asyncio.timeout(_ROTATION_CHECK):
                        await changed.wait()
                except TimeoutError:
                    continue
                await asyncio.sleep(0.05)

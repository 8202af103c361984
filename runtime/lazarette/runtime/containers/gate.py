"""The write gate of containers: freezes those that use a set of volumes for an instant.

What is frozen is recorded before it is frozen and forgotten after it is thawed, so that
the next start of a killed daemon lets everything go on; a timer thaws it when the holder
forgets to (case A11).
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lazarette.runtime.containers.record import Status
from lazarette.storage.errors import LazaretteError

if TYPE_CHECKING:
    from lazarette.runtime.containers.manager import ContainerManager

DEFAULT_LIMIT = 2.0

log = logging.getLogger(__name__)


class FreezerGate:
    """Freezes containers; implements :class:`lazarette.storage.volumes.contract.WriteGate`.

    May be used from any thread.

    Args:
        containers: ids of those to hold; ended or paused ones are left alone.
        manager: knows their control groups.
        limit: seconds after which they are thawed whatever the holder does.
    """

    def __init__(
        self,
        containers: Sequence[str],
        manager: ContainerManager,
        limit: float = DEFAULT_LIMIT,
    ) -> None:
        self._ids = list(containers)
        self._manager = manager
        self._limit = limit
        self._id = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._frozen: list[str] = []
        self._timer: threading.Timer | None = None
        self.expired = False

    def close(self) -> None:
        """Freeze all; on a fault all are thawed again and the fault is raised."""
        if not self._ids:
            return
        with self._lock:
            self.expired = False
            self._manager.store.close_gate(self._id, self._ids)
            self._timer = threading.Timer(self._limit, self._expire)
            self._timer.daemon = True
            self._timer.start()
            try:
                for container_id in self._ids:
                    self._freeze(container_id)
            except BaseException:
                self._thaw()
                raise

    def _freeze(self, container_id: str) -> None:
        try:
            container = self._manager.get(container_id)
        except LazaretteError:
            return
        if container.state.status is not Status.RUNNING:
            return
        self._frozen.append(container_id)
        group = self._manager.preparer.group(container)
        group.set_frozen(True, self._manager.clock, timeout=self._limit)

    def open(self) -> None:
        """Thaw all; does nothing when the gate is open."""
        with self._lock:
            self._thaw()

    def _expire(self) -> None:
        with self._lock:
            if self._frozen:
                self.expired = True
                log.warning("write gate held longer than %g s, opened", self._limit)
            self._thaw()

    def _thaw(self) -> None:
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        frozen, self._frozen = self._frozen, []
        for container_id in frozen:
            thaw(self._manager, container_id)
        self._manager.store.open_gate(self._id)


def thaw(manager: ContainerManager, container_id: str) -> None:
    """Let a container go on, unless it was paused by hand or is gone."""
    try:
        container = manager.get(container_id)
        if container.state.status is not Status.PAUSED:
            manager.preparer.group(container).set_frozen(False, manager.clock)
    except LazaretteError as bad:
        log.warning("thawing container %s: %s", container_id, bad)


def open_left_closed(manager: ContainerManager) -> None:
    """Thaw what a killed daemon left frozen; called at start."""
    for gate, containers in manager.store.closed_gates().items():
        for container_id in containers:
            thaw(manager, container_id)
        manager.store.open_gate(gate)

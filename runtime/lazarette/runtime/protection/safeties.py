"""Snapshots taken before a volume was changed go after some days."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from lazarette.runtime.protection import watching
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import LazaretteError
from lazarette.storage.volumes.manager import VolumeManager

log = logging.getLogger(__name__)

PREFIXES = ("before-restore-", "before-rollback-", "before-standby-")
_DAY_NS = 86_400 * NANOSECONDS
_LOOK_S = 3600.0


class Safeties:
    """Removes old safety snapshots.

    Args:
        volumes: whose.
        busy: volumes that are being changed now; theirs stay.
        days: how long they stay.
        clock: time.
    """

    def __init__(
        self,
        volumes: VolumeManager,
        busy: Callable[[], Collection[str]],
        days: int,
        clock: Clock,
    ) -> None:
        self._volumes = volumes
        self._busy = busy
        self._days = days
        self._clock = clock
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, now and every hour."""
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Look no more."""
        await watching.end(self._watcher)

    def sweep(self) -> list[tuple[str, str]]:
        """Remove those that are old; which, as volume and snapshot."""
        limit = self._clock.now_ns() - self._days * _DAY_NS
        gone = []
        for volume in self._volumes.list():
            if volume.name in self._busy() or volume.driver not in self._volumes.drivers:
                continue
            for one in self._volumes.snapshots(volume.name):
                if one.id.startswith(PREFIXES) and one.created_ns < limit:
                    self._volumes.delete_snapshot(volume.name, one.id)
                    gone.append((volume.name, one.id))
                    log.info("%s@%s is removed after %d days", volume.name, one.id, self._days)
        return gone

    async def _watch(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.sweep)
            except LazaretteError as bad:
                log.warning("safety snapshots: %s", bad)
            except Exception:
                log.exception("safety snapshots")
            await asyncio.sleep(_LOOK_S)

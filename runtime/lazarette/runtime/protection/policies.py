"""Policies of volumes: when they are backed up, and what is kept."""

from __future__ import annotations

from lazarette.storage.clock import Clock
from lazarette.storage.errors import NotFound, Unsupported
from lazarette.storage.state import State
from lazarette.storage.volumes.manager import VolumeManager


class PolicyNotFound(NotFound):
    """The volume has no policy."""

    number = 372


class PolicyBook:
    """The policies of a daemon."""

    def __init__(self, state: State, volumes: VolumeManager, clock: Clock) -> None:
        self._state = state
        self._volumes = volumes
        self._clock = clock

    async def start(self) -> None:
        """Follow the policies."""

    async def stop(self) -> None:
        """Follow them no more."""

    def text(self, volume: str) -> str:
        """A volume's policy as it is kept with its data."""
        return ""

    def next_run(self, volume: str) -> str:
        """When the next backup is due, RFC 3339; empty for never."""
        return ""

    def describe(self, volume: str) -> dict[str, object]:
        """What applies to a volume, from where, and the next run."""
        raise PolicyNotFound(f"volume {volume} has no policy", hint="laz policy set")

    def describe_all(self) -> list[dict[str, object]]:
        """Every policy."""
        return []

    async def set(self, volume: str, **settings: str) -> None:
        """Give a volume a policy."""
        raise Unsupported("policies are not built yet")

    async def remove(self, volume: str) -> None:
        """Take a volume's policy away."""

    def overdue(self, volume: str, last_good_ns: int) -> bool:
        """Whether a backup should have been made by now."""
        return False

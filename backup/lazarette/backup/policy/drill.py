"""Restore drills: proof that a backup comes back, and how long that takes.

The newest good backup is restored into a scratch volume, the container's image is started
on it in a network of its own, and a check runs in it: the profile's (a query,
``pg_amcheck``) or the user's command, which succeeds by exit code 0.  The time from the
beginning to the first good answer is the measured RTO.  Whatever was made is removed, also
when the drill fails or is cancelled; what a killed daemon left is found by its name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

from lazarette.backup.policy.access import Ended
from lazarette.backup.policy.model import SCRATCH_PREFIX
from lazarette.backup.policy.outcome import Outcome, Result, failed
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import LazaretteError

PREFIX = SCRATCH_PREFIX
_PAUSE = 0.2


class DrillAccess(Protocol):
    """What a drill asks of the runtime.  Every method raises only LazaretteError."""

    async def restore(self, volume: str, snapshot: str, into: str) -> str:
        """Restore a volume's snapshot (empty: the newest good one) into a new volume.

        Returns:
            The snapshot's id.
        """
        ...

    async def start(self, volume: str, scratch: str, name: str) -> str:
        """Start what uses ``volume`` on ``scratch`` instead, isolated from all networks.

        Returns:
            The container's id.
        """
        ...

    async def execute(self, container: str, argv: Sequence[str], timeout: float) -> Ended:
        """Run a command in the container."""
        ...

    async def remove_container(self, name: str) -> None:
        """Kill and remove a container; nothing when there is none."""
        ...

    async def remove_volume(self, name: str) -> None:
        """Remove a scratch volume; nothing when there is none."""
        ...

    async def leftovers(self) -> Sequence[tuple[str, str]]:
        """Containers and scratch volumes whose names begin with :data:`PREFIX`, in pairs."""
        ...


@dataclass(frozen=True, slots=True)
class DrillLimits:
    """Seconds: for the whole drill, and until the check must have succeeded after the start."""

    whole: float = 3600.0
    check: float = 180.0


async def drill(
    run: int,
    volume: str,
    check: Sequence[str],
    access: DrillAccess,
    clock: Clock,
    *,
    snapshot: str = "",
    limits: DrillLimits | None = None,
) -> Outcome:
    """Carry out one drill; never raises but for cancellation.

    Args:
        run: its number in the journal; makes the names unique.
        volume: whose backup.
        check: the command; tried again until it succeeds or its time is up.
        access: the runtime.
        clock: to measure.
        snapshot: which; empty takes the newest good one.
        limits: how long.
    """
    name = f"{PREFIX}{run}"
    times = limits or DrillLimits()
    try:
        async with AsyncExitStack() as made, asyncio.timeout(times.whole):
            began = clock.monotonic_ns()
            made.push_async_callback(access.remove_volume, name)
            restored = await access.restore(volume, snapshot, name)
            made.push_async_callback(access.remove_container, name)
            container = await access.start(volume, name, name)
            ended = await _check(container, check, access, clock, times.check)
            took = clock.monotonic_ns() - began
            if ended.code != 0:
                return Outcome(
                    Result.FAILED,
                    error=f"the check of the restored {volume} failed: {ended.last_words()}",
                    snapshot=restored,
                )
            return Outcome(Result.OK, snapshot=restored, restore_ns=took)
    except TimeoutError:
        return failed(f"the drill of {volume} took longer than {times.whole:g} s")
    except LazaretteError as wrong:
        return failed(f"the drill of {volume} failed: {wrong.message}")


async def _check(
    container: str, argv: Sequence[str], access: DrillAccess, clock: Clock, seconds: float
) -> Ended:
    """Run the check until it succeeds; the last answer when its time is up."""
    end = clock.monotonic_ns() + round(seconds * NANOSECONDS)
    while True:
        left = (end - clock.monotonic_ns()) / NANOSECONDS
        ended = await access.execute(container, argv, max(left, 1.0))
        if ended.code == 0 or clock.monotonic_ns() >= end:
            return ended
        await asyncio.sleep(_PAUSE)


async def sweep(access: DrillAccess, but: Sequence[int] = ()) -> int:
    """Remove what drills of a killed daemon left; how many there were.

    Args:
        access: the runtime.
        but: numbers of runs that are going on.
    """
    going_on = {f"{PREFIX}{run}" for run in but}
    found = [pair for pair in await access.leftovers() if not going_on & set(pair)]
    for container, volume in found:
        if container:
            await access.remove_container(container)
        if volume:
            await access.remove_volume(volume)
    return len(found)

"""Time as an injected value: integer nanoseconds, never read from the system elsewhere.

Ruff bans ``time.time`` and ``datetime.now`` outside this module, so that every rule
about time (retention, schedules, leases, "too young to trust") can be tested with
:class:`FakeClock`.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol

NANOSECONDS = 1_000_000_000


class Clock(Protocol):
    """What the code may know of time."""

    def now_ns(self) -> int:
        """Wall clock, nanoseconds since the epoch (UTC)."""
        ...

    def monotonic_ns(self) -> int:
        """A clock that never steps, for durations and deadlines, nanoseconds."""
        ...

    def sleep(self, seconds: float) -> None:
        """Block for that long."""
        ...


class SystemClock:
    """The host's clocks."""

    def now_ns(self) -> int:
        """See :meth:`Clock.now_ns`."""
        return time.time_ns()

    def monotonic_ns(self) -> int:
        """See :meth:`Clock.monotonic_ns`; goes on while the machine is suspended.

        A lease's holder must notice that others' clocks went on (CLOCK_MONOTONIC would not).
        """
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def sleep(self, seconds: float) -> None:
        """See :meth:`Clock.sleep`."""
        time.sleep(seconds)


class FakeClock:
    """A clock that moves only when told to; sleeping moves it.

    Args:
        start_ns: first value of the wall clock, nanoseconds since the epoch.
    """

    def __init__(self, start_ns: int = 1_700_000_000 * NANOSECONDS) -> None:
        self._wall = start_ns
        self._steady = 0

    def now_ns(self) -> int:
        """See :meth:`Clock.now_ns`."""
        return self._wall

    def monotonic_ns(self) -> int:
        """See :meth:`Clock.monotonic_ns`."""
        return self._steady

    def sleep(self, seconds: float) -> None:
        """Advance both clocks by that long."""
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let that much real time pass."""
        step = round(seconds * NANOSECONDS)
        self._wall += step
        self._steady += step

    def step(self, seconds: float) -> None:
        """Set the wall clock forward or back by hand; no real time passes."""
        self._wall += round(seconds * NANOSECONDS)


def rfc3339(ns: int) -> str:
    """``2026-11-25T10:04:30.123456789Z``: the form the Engine API uses for times.

    Args:
        ns: nanoseconds since the epoch; 0 stands for "never" and gives Go's zero time.
    """
    if ns == 0:
        return "0001-01-01T00:00:00Z"
    seconds, fraction = divmod(ns, NANOSECONDS)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"

"""Doing again what others undo meanwhile, until there is little left."""

from __future__ import annotations

import time
from collections.abc import Callable


def until_quick(
    once: Callable[[], object],
    goal_ns: int,
    most: int,
    now: Callable[[], int] = time.monotonic_ns,
) -> None:
    """Call ``once`` until it takes no longer than a time, or gets little quicker.

    Args:
        once: one pass.
        goal_ns: what counts as quick.
        most: passes.
        now: a clock, nanoseconds.
    """
    previous: int | None = None
    for _ in range(most):
        started = now()
        once()
        took = now() - started
        if took <= goal_ns or (previous is not None and took > previous * 3 // 4):
            return
        previous = took

"""Waiting for what happens by itself: long enough for a busy machine, no longer than needed."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(
    done: Callable[[], object], what: str = "", seconds: float = 90.0, pause: float = 0.05
) -> float:
    """Wait until ``done()`` is true.

    Returns:
        How long that took, in seconds.

    Raises:
        AssertionError: with ``what``, when it was not true after ``seconds``.
    """
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < seconds, what or "it never came"
        time.sleep(pause)
    return time.monotonic() - began

"""One daemon of a host at a time chooses subnets.

A subnet is free when no route leads there.  Between the look at the routes and the bridge
that makes one another daemon would find the same subnet free.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = Path("/run/lazarette-subnets.lock")


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other daemon, and no other thread, is in such a block."""
    lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)

"""Tasks that look after something for as long as a daemon runs."""

from __future__ import annotations

import asyncio
from contextlib import suppress


async def end(watcher: asyncio.Task[None] | None) -> None:
    """Cancel a watcher and wait until it is over; None is one that was never begun.

    Raises:
        Exception: what the watcher had failed with before.
    """
    if watcher is not None:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher

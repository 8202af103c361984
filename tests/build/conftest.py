"""One builder for all tests of a worker: it makes nothing but images."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.builds import Bench, discard

from lazarette.runtime.events import EventBus
from lazarette.storage.clock import SystemClock


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    if os.geteuid() != 0:
        pytest.skip("needs root for layers")
    root = Path(tempfile.mkdtemp(prefix="laz-test-builds-"))
    loop = asyncio.new_event_loop()
    made = Bench(root, EventBus(SystemClock(), loop))
    try:
        yield made
    finally:
        made.close()
        loop.close()
        discard(root)

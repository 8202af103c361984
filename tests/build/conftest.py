"""One builder for all tests of a worker: it makes nothing but images."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.builds import Bench, discard
from tests.support.layers import KINDS, Kind

from lazarette.runtime.events import EventBus
from lazarette.storage.clock import SystemClock


@contextmanager
def _bench(kind: Kind) -> Iterator[Bench]:
    if os.geteuid() != 0:
        pytest.skip("needs root for layers")
    root = Path(tempfile.mkdtemp(prefix="laz-test-builds-"))
    loop = asyncio.new_event_loop()
    (root / "layers").mkdir()
    made = Bench(root, EventBus(SystemClock(), loop), kind)
    try:
        yield made
    finally:
        made.close()
        loop.close()
        discard(root)


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    """On the default driver."""
    with _bench(KINDS[0]) as made:
        yield made


@pytest.fixture(scope="session")
def driven(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """On the driver the test is for."""
    with _bench(request.param) as made:
        yield made

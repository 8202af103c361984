"""An image store on real overlay layers, in a folder of the test's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from lazarette.runtime.events import EventBus
from lazarette.runtime.images.compression import UnpackLimits
from lazarette.runtime.images.store import ImageStore
from lazarette.storage.clock import FakeClock
from lazarette.storage.layers.overlay import OverlayLayerDriver
from lazarette.storage.state import State


@pytest.fixture
async def reopen(tmp_path: Path) -> AsyncIterator[Callable[[], ImageStore]]:
    """Opens the same store again, as a restarted daemon does."""
    opened: list[State] = []
    clock = FakeClock()
    events = EventBus(clock)

    def make(limits: UnpackLimits | None = None) -> ImageStore:
        state = State(tmp_path / "state.db")
        opened.append(state)
        driver = OverlayLayerDriver(tmp_path / "layers", clock)
        driver.recover()
        store = ImageStore(tmp_path / "images", driver, state, events, clock, limits)
        store.recover()
        return store

    yield make
    for state in opened:
        state.close()


@pytest.fixture
async def store(reopen: Callable[[], ImageStore]) -> ImageStore:
    return reopen()

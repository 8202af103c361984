"""A store on real layers beside a real registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.registry import Registry, registry

from lazarette.runtime.events import EventBus
from lazarette.runtime.images.store import ImageStore
from lazarette.storage.clock import SystemClock
from lazarette.storage.layers.overlay import OverlayLayerDriver
from lazarette.storage.state import State


@pytest.fixture
async def make_store(tmp_path: Path) -> object:
    """Makes an empty store, or opens again the one of that name."""
    opened: list[State] = []
    clock = SystemClock()
    events = EventBus(clock)

    def make(name: str = "store") -> ImageStore:
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        state = State(root / "state.db")
        opened.append(state)
        driver = OverlayLayerDriver(root / "layers", clock)
        driver.recover()
        store = ImageStore(root / "images", driver, state, events, clock)
        store.recover()
        return store

    yield make
    for state in opened:
        state.close()


@pytest.fixture
async def store(make_store: Callable[..., ImageStore]) -> ImageStore:
    return make_store()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Registry]:
    with registry(tmp_path / "registry") as running:
        yield running

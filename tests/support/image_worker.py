"""A process that works on an image store until it is killed: ``python -m … ROOT``.

Prints ``ready`` once, then loads, builds, tags, saves and removes without end.
"""

from __future__ import annotations

import asyncio
import io
import sys
from pathlib import Path

from tests.support.images import busybox_archive, file, tar_of

from lazarette.runtime.events import EventBus
from lazarette.runtime.images import archive, save
from lazarette.runtime.images.commit import extend
from lazarette.runtime.images.model import RunConfig
from lazarette.runtime.images.reference import parse
from lazarette.runtime.images.removal import Remover
from lazarette.runtime.images.store import ImageStore
from lazarette.storage.clock import SystemClock
from lazarette.storage.layers.overlay import OverlayLayerDriver
from lazarette.storage.state import State

MARK = "mark"


def open_store(root: Path, loop: asyncio.AbstractEventLoop) -> tuple[ImageStore, State]:
    """The store in a folder, recovered, and its database."""
    clock = SystemClock()
    state = State(root / "state.db")
    driver = OverlayLayerDriver(root / "layers", clock)
    driver.recover()
    store = ImageStore(root / "images", driver, state, EventBus(clock, loop), clock)
    store.recover()
    return store, state


def work(store: ImageStore) -> None:
    """Every operation once."""
    remover = Remover(store)
    with busybox_archive("a:1", "b:1").open("rb") as stream:
        (base,) = archive.load(store, stream)
    names = []
    image = base
    for number in range(3):
        name = f"built:{number}"
        layer = tar_of([file(MARK, name.encode()), file(f"file{number}", bytes(50_000))])
        image = extend(store, image, config=RunConfig(), created_by=name, layer=io.BytesIO(layer))
        store.tag(image.id, parse(name))
        names.append(name)
    packed = io.BytesIO()
    save.save(store, names, packed)
    for name in reversed(names):
        remover.remove(name)
    packed.seek(0)
    archive.load(store, packed)
    for name in ("a:1", "b:1", *names):
        if store.find(name) is not None:
            remover.remove(name, force=True)


def main() -> None:
    """Work until killed."""
    loop = asyncio.new_event_loop()
    store, _ = open_store(Path(sys.argv[1]), loop)
    print("ready", flush=True)
    while True:
        work(store)


if __name__ == "__main__":
    main()

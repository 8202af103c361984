"""A process that works on an image store until it is killed: ``python -m … ROOT REGISTRY``.

Prints ``ready`` once, then loads, builds, tags, saves, pushes, pulls and removes without end.
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
from lazarette.runtime.images.progress import discard
from lazarette.runtime.images.reference import Reference, parse
from lazarette.runtime.images.registries import Registries
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


async def exchange(registries: Registries, store: ImageStore, name: Reference) -> None:
    """Send an image to the registry, forget it, and fetch it again."""
    await registries.push(name, auth="", platform=None, progress=discard)
    Remover(store).remove(str(name), force=True)
    await registries.pull(name, auth="", platform=None, progress=discard)
    Remover(store).remove(str(name), force=True)


def work(store: ImageStore, loop: asyncio.AbstractEventLoop, registry: str) -> None:
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
    remote = parse(f"{registry}/built:remote")
    store.tag(image.id, remote)
    for name in reversed(names):
        remover.remove(name)
    loop.run_until_complete(exchange(Registries(store), store, remote))
    store.tag(base.id, parse("a:2"))
    names = ["a:2", "b:1"]
    packed = io.BytesIO()
    save.save(store, names, packed)
    for name in reversed(names):
        remover.remove(name)
    packed.seek(0)
    archive.load(store, packed)
    for name in ("a:1", *names):
        if store.find(name) is not None:
            remover.remove(name, force=True)


def main() -> None:
    """Work until killed."""
    loop = asyncio.new_event_loop()
    store, _ = open_store(Path(sys.argv[1]), loop)
    print("ready", flush=True)
    while True:
        work(store, loop, sys.argv[2])


if __name__ == "__main__":
    main()

"""Copy-up: an empty volume starts with what the image has at the place it covers.

Case A20: the volume gets the folder's content and its own owner, mode, times and
attributes; links stay links.  One copy at a time for each volume, so that two containers
racing for the first use both find the complete content.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.record import MountPoint
from lazarette.runtime.containers.rootfs import open_in_root
from lazarette.storage.layers.contract import LayerDriver
from lazarette.storage.volumes import content
from lazarette.storage.volumes.manager import VolumeManager

_locks: dict[str, threading.Lock] = {}
_guard = threading.Lock()


@contextmanager
def _copying_to(volume: str) -> Iterator[None]:
    with _guard:
        lock = _locks.setdefault(volume, threading.Lock())
    with lock:
        yield


def populate(container: Container, layers: LayerDriver, volumes: VolumeManager) -> None:
    """Fill the empty volumes of a new container from its image."""
    wanted = [
        point
        for point in container.definition.mounts
        if point.type == "volume" and point.copy and not point.subpath
    ]
    if not wanted:
        return
    layer = container.definition.layer
    rootfs = layers.mount(layer)
    try:
        root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY)
        try:
            for point in wanted:
                _fill(root, point, volumes, f"copy-{container.id}")
        finally:
            os.close(root)
    finally:
        layers.unmount(layer)


def _fill(root: int, point: MountPoint, volumes: VolumeManager, user: str) -> None:
    try:
        source = open_in_root(root, point.destination, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # nothing there, or no folder: the volume stays as it is
    try:
        with _copying_to(point.name):
            folder = volumes.mount(point.name, user)
            try:
                content.populate(folder, source)
            finally:
                volumes.unmount(point.name, user)
    finally:
        os.close(source)

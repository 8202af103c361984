"""Copy-up: an empty volume starts with what the image has at the place it covers.

Case A20: the volume gets the folder's content and its own owner, mode, times and
attributes; links stay links.  :meth:`VolumeManager.populate` does the copying, one copy at
a time for each volume and wholly or not at all; here is found what is to be copied.
"""

from __future__ import annotations

import os

from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.rootfs import open_in_root
from lazarette.storage.layers.contract import LayerDriver
from lazarette.storage.volumes.manager import VolumeManager


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
                _fill(root, point.destination, point.name, volumes)
        finally:
            os.close(root)
    finally:
        layers.unmount(layer)


def _fill(root: int, destination: str, volume: str, volumes: VolumeManager) -> None:
    try:
        source = open_in_root(root, destination, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # nothing there, or no folder: the volume stays as it is
    try:
        volumes.populate(volume, source)
    finally:
        os.close(source)

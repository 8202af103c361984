"""``--output``: the tree of a built image as a tar or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from lazarette.runtime.builds.errors import ContextError
from lazarette.runtime.images.model import Image
from lazarette.runtime.images.store import ImageStore
from lazarette.storage import beneath
from lazarette.storage.errors import InvalidArgument
from lazarette.storage.layers.apply import LayerReader
from lazarette.storage.layers.tar import TreeWriter


def write_tree(images: ImageStore, image: Image, out: BinaryIO) -> None:
    """Write an image's final tree as a tar."""
    writer = TreeWriter(out)
    if image.layer is not None:
        driver = images.layers.driver
        root = driver.mount(image.layer)
        try:
            with beneath.opened(root) as top:
                for entry in beneath.walk(top):
                    if entry.path:
                        writer.entry(entry.path, entry.parent, entry.name, entry.status)
        finally:
            driver.unmount(image.layer)
    writer.close()


def unpack_tree(tar: BinaryIO, folder: Path) -> None:
    """Unpack such a tar into a folder of the client; nothing is written outside of it.

    Raises:
        ContextError: the tar is broken or hostile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with beneath.opened(folder) as top:
        try:
            LayerReader(top, None).apply(tar)
        except InvalidArgument as bad:
            raise ContextError(f"build output cannot be unpacked: {bad.message}") from bad

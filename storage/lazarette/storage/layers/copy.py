"""Layers as plain copies: for hosts that have nothing better.

Every layer costs the space and time of its whole tree, less where the disk has reflinks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lazarette.storage import beneath, extents, space
from lazarette.storage.changes import Change
from lazarette.storage.clock import Clock
from lazarette.storage.compare import by_extents, everything, tree_changes
from lazarette.storage.layers.contract import LayerCapabilities, LayerUsage
from lazarette.storage.layers.full import FullLayerDriver
from lazarette.storage.refresh import copy_tree


class CopyLayerDriver(FullLayerDriver):
    """Layers as copies of their parents.

    Args:
        root: the driver's folder.
        clock: unused by this driver; every driver is made alike.
    """

    def __init__(self, root: Path, clock: Clock) -> None:
        super().__init__(root, beneath.remove_path)
        self._reflinks = extents.reflinks_work(root)

    @property
    def capabilities(self) -> LayerCapabilities:
        """See :class:`LayerCapabilities`."""
        return LayerCapabilities(
            name="copy", copy_on_write=False, directory_rename=True, maps_owners=True
        )

    def close(self) -> None:
        """See :meth:`LayerDriver.close`: there is nothing to let go."""

    def _fill(self, parent: Path | None, staged: Path) -> None:
        tree = staged / "tree"
        tree.mkdir(mode=0o755)
        os.chmod(tree, 0o755)
        if parent is not None:
            with beneath.opened(parent) as source, beneath.opened(tree) as target:
                copy_tree(source, target)

    def _compare(self, parent: Path, own: Path) -> Iterator[Change]:
        with beneath.opened(parent) as base, beneath.opened(own) as target:
            suspects = by_extents if self._reflinks else everything
            yield from tree_changes(base, target, suspects, reflinks=self._reflinks)

    def usage(self, key: str) -> LayerUsage:
        """See :meth:`LayerDriver.usage`: the whole tree, less what it shares."""
        return space.tree_usage(self._tree(key), shared=self._reflinks)

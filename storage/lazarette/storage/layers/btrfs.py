"""Layers as btrfs subvolumes: a new one is a snapshot of its parent, in constant time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lazarette.storage import beneath, btrfs, mounts, space, syscalls
from lazarette.storage.btrfs_changes import subvolume_changes
from lazarette.storage.changes import Change
from lazarette.storage.clock import Clock
from lazarette.storage.layers.contract import LayerCapabilities, LayerUsage
from lazarette.storage.layers.full import FullLayerDriver
from lazarette.storage.pool import Pool, PoolFormat


class BtrfsLayerDriver(FullLayerDriver):
    """Layers as subvolumes of a native btrfs, or of a pool file where the host has another.

    Args:
        root: the driver's folder.
        clock: unused by this driver; every driver is made alike.
        pool_size: fixed size of a pool file, bytes; by default it grows by itself.
    """

    def __init__(self, root: Path, clock: Clock, *, pool_size: int | None = None) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.pool: Pool | None = None
        base = root
        with beneath.opened(root) as folder:
            native = btrfs.is_btrfs(folder)
        if not native:
            base = root / "pool"
            self.pool = Pool(root / "pool.btrfs", base, PoolFormat.BTRFS, pool_size)
            self.pool.open()
        super().__init__(base, _destroy)

    @property
    def capabilities(self) -> LayerCapabilities:
        """See :class:`LayerCapabilities`."""
        return LayerCapabilities(
            name="btrfs",
            copy_on_write=True,
            directory_rename=True,
            maps_owners=True,
            needs=("btrfs", "loop devices (on a host with another filesystem)"),
        )

    def close(self) -> None:
        """See :meth:`LayerDriver.close`: unmounts the pool."""
        if self.pool is not None:
            self.pool.close()

    def _fill(self, parent: Path | None, staged: Path) -> None:
        with beneath.opened(staged) as into:
            if parent is None:
                btrfs.create_subvolume(into, b"tree")
                os.chmod(staged / "tree", 0o755)
                return
            with beneath.opened(parent) as source:
                btrfs.snapshot_subvolume(source, into, b"tree", read_only=False)

    def commit(self, key: str) -> None:
        """See :meth:`LayerDriver.commit`; the subvolume becomes read-only too."""
        super().commit(key)
        with beneath.opened(self._tree(key)) as tree:
            btrfs.set_read_only(tree, True)

    def commit_as(self, key: str, new_key: str, *, size: int, diff_id: str) -> None:
        """See :meth:`CommitsInPlace.commit_as`; the subvolume becomes read-only too."""
        super().commit_as(key, new_key, size=size, diff_id=diff_id)
        with beneath.opened(self._tree(new_key)) as tree:
            btrfs.set_read_only(tree, True)

    def _compare(self, parent: Path, own: Path) -> Iterator[Change]:
        with beneath.opened(own) as tree:
            syscalls.syncfs(tree)
        return subvolume_changes(parent, own)

    def usage(self, key: str) -> LayerUsage:
        """See :meth:`LayerDriver.usage`: extents no other layer shares."""
        tree = self._tree(key)
        with beneath.opened(tree) as root:
            syscalls.syncfs(root)
        return space.tree_usage(tree, shared=True)


def _destroy(path: Path) -> None:
    mounts.detach_beneath(path)
    with beneath.opened(path.parent) as parent:
        btrfs.destroy_tree(parent, os.fsencode(path.name))

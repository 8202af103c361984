"""Layers stacked in user space, for hosts whose kernel has no overlay or may not mount it.

A server process a mount, which outlives this one; a dead one is replaced when its layer
is mounted again.  Layers are kept as the kernel's driver keeps them.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazarette.fuse.client import UnionMount
from lazarette.fuse.spec import UnionSpec
from lazarette.storage import beneath
from lazarette.storage.clock import Clock
from lazarette.storage.errors import MissingFeature
from lazarette.storage.idmaps import IdMap
from lazarette.storage.layers.contract import LayerCapabilities
from lazarette.storage.layers.stacked import StackedLayerDriver
from lazarette.storage.mounts import MountFailed


class FuseLayerDriver(StackedLayerDriver):
    """Layers stacked by our own server.

    Args:
        root: the driver's folder.
        clock: unused by this driver; every driver is made alike.
    """

    def __init__(self, root: Path, clock: Clock) -> None:
        super().__init__(root)
        self._run = root / "run"
        self._run.mkdir(exist_ok=True, mode=0o700)

    @property
    def capabilities(self) -> LayerCapabilities:
        """See :class:`LayerCapabilities`."""
        return LayerCapabilities(
            name="fuse",
            copy_on_write=True,
            directory_rename=False,
            maps_owners=False,
            needs=("fuse",),
        )

    def recover(self) -> None:
        """See :meth:`LayerDriver.recover`; layers whose server died are mounted anew."""
        super().recover()
        for key in self.keys():
            if self._shelf.mounted(key):
                self._revive(key)

    def _revive(self, key: str) -> None:
        union = self._union(*self._parts(key), self._shelf.target(key))
        if union is not None and not union.alive():
            union.ensure()

    def _parts(self, key: str) -> tuple[list[Path], Path | None, Path | None]:
        record = self._shelf.record(key)
        own = self._shelf.folder(key)
        chain = [self._shelf.folder(layer) / "diff" for layer in self._shelf.chain(key)]
        if record.committed or record.parent is None:
            return chain, None, None
        return chain[1:], own / "diff", own / "work"

    def _union(
        self, lower: list[Path], upper: Path | None, work: Path | None, target: Path
    ) -> UnionMount | None:
        if upper is None and len(lower) == 1:
            return None  # a plain bind, without server
        name = hashlib.sha256(os.fsencode(target)).hexdigest()[:24]
        return UnionMount(
            UnionSpec(
                mountpoint=str(target),
                control=str(self._run / f"{name}.sock"),
                lowers=[str(path) for path in lower],
                upper=None if upper is None else str(upper),
                work=None if work is None else str(work),
                read_only=upper is None,
                volatile=True,
                allow_other=True,
            )
        )

    def close(self) -> None:
        """See :meth:`LayerDriver.close`: there is nothing to let go."""

    def _stack(
        self,
        lower: list[Path],
        upper: Path | None,
        work: Path | None,
        target: Path,
        idmap: IdMap | None,
    ) -> None:
        if idmap is not None:
            raise MissingFeature(
                "the layer driver fuse cannot map owners",
                hint="start the container with --userns=host, or use another layer driver",
            )
        union = self._union(lower, upper, work, target)
        assert union is not None
        try:
            union.ensure()
        except OSError as refused:
            raise MountFailed(f"mounting the layer at {target}: {refused.strerror}") from refused

    @contextmanager
    def _opened(self, lower: list[Path]) -> Iterator[int]:
        target = self._run / secrets.token_hex(8)
        target.mkdir()
        union = self._union(lower, None, None, target)
        assert union is not None
        try:
            self._stack(lower, None, None, target, None)
            with beneath.opened(target) as folder:
                yield folder
        finally:
            union.stop(lazy=True)
            beneath.remove_path(target)

"""What all steps of a build share, and the layers they make.

A step that changes files works on an active layer that is mounted for it.  Afterwards the
layer's tar goes to the image store, which names it by its content, and the layer itself
becomes that of the image.  Active layers of builds are named ``build-…`` so that those of
a killed daemon are found and removed at the next start.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol

from lazarette.runtime.builds.cache import BuildCache
from lazarette.runtime.builds.context import Context
from lazarette.runtime.builds.named import NamedContexts
from lazarette.runtime.builds.options import BuildOptions
from lazarette.runtime.builds.progress import Emit
from lazarette.runtime.builds.runner import StepRunner
from lazarette.runtime.builds.tree import Tree
from lazarette.runtime.images.model import layer_key
from lazarette.runtime.images.store import ImageStore
from lazarette.storage import beneath
from lazarette.storage.changes import Change, ChangeKind
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import Cancelled
from lazarette.storage.idmaps import IdMap
from lazarette.storage.layers.contract import LayerDriver

LAYER_PREFIX = "build-"


class Pull(Protocol):
    """Fetches an image into the store."""

    def __call__(self, ref: str, platform: str, options: BuildOptions, emit: Emit) -> None:
        """Fetch; blocks.

        Raises:
            NotFound: no registry has it.
        """
        ...


@dataclass(frozen=True)
class MadeLayer:
    """A layer a step made: digest of its tar, chain id on its parents, bytes of its files."""

    diff_id: str
    chain: str
    size: int


@dataclass(frozen=True)
class Services:
    """The parts of the daemon a build uses.

    Attributes:
        images: image store.
        layers: layer driver.
        runner: runs RUN steps.
        cache: records of steps.
        clock: dates everything.
        root: folder for contexts, cache mounts and downloads.
        pull: fetches base images.
    """

    images: ImageStore
    layers: LayerDriver
    runner: StepRunner
    cache: BuildCache
    clock: Clock
    root: Path
    pull: Pull


class Work:
    """One build while it runs.

    Args:
        services: parts of the daemon.
        options: of the build.
        context: its context.
        named: further contexts, by name.
        folder: for its temporary files.
    """

    def __init__(
        self,
        services: Services,
        options: BuildOptions,
        context: Context,
        named: NamedContexts,
        folder: Path,
    ) -> None:
        self.services = services
        self.options = options
        self.context = context
        self.named = named
        self.folder = folder
        self.id = secrets.token_hex(32)
        self.cancelled = Event()

    def check(self) -> None:
        """Stop here if the build was cancelled."""
        if self.cancelled.is_set():
            raise Cancelled("build cancelled")

    def now_ns(self) -> int:
        """The time that stands in the image: SOURCE_DATE_EPOCH or now."""
        epoch = self.options.source_date_epoch
        return self.services.clock.now_ns() if epoch is None else epoch * NANOSECONDS

    @contextmanager
    def mounted(self, key: str | None, idmap: IdMap | None = None) -> Iterator[Path]:
        """A committed layer's tree, to read; an empty folder for none.

        It is seen through a layer of the build's own, so that whatever a killed daemon
        leaves mounted is known by its name and nobody else's.
        """
        if key is None:
            empty = self.folder / "empty"
            empty.mkdir(exist_ok=True)
            yield empty
            return
        with self.active(key, idmap) as layer:
            yield layer.root

    @contextmanager
    def active(self, parent: str | None, idmap: IdMap | None = None) -> Iterator[ActiveLayer]:
        """A new layer on a parent, mounted for the block and gone after it.

        Args:
            parent: the layer below.
            idmap: it is mounted with; see :meth:`LayerDriver.mount`.
        """
        layers = self.services.layers
        key = f"{LAYER_PREFIX}{secrets.token_hex(16)}"
        layers.prepare(key, parent)
        try:
            root = layers.mount(key, idmap)
            active = ActiveLayer(self, key, root)
            try:
                with Tree(root) as tree:
                    active.tree = tree
                    yield active
            finally:
                active.unmount()
        finally:
            layers.remove(key)


class ActiveLayer:
    """A layer being written.

    Attributes:
        key: its name in the driver.
        root: where it is mounted.
        tree: the same, opened.
    """

    tree: Tree

    def __init__(self, work: Work, key: str, root: Path) -> None:
        self._work = work
        self._mounted = True
        self.key = key
        self.root = root

    def unmount(self) -> None:
        """Unmount, once."""
        if self._mounted:
            self._mounted = False
            self._work.services.layers.unmount(self.key)

    def keep(self, parent_chain: str, ignored: Set[bytes] = frozenset()) -> MadeLayer | None:
        """Hand the layer to the image store.

        Args:
            parent_chain: chain id of the layer below; empty if there is none.
            ignored: folders that count as unchanged if nothing else is changed.

        Returns:
            The layer; None if nothing was changed.
        """
        services = self._work.services
        changes = list(services.layers.changes(self.key))
        if all(c.kind is ChangeKind.MODIFIED and c.path in ignored for c in changes):
            return None
        size = self._measured(changes)
        self.tree.close()
        self.unmount()
        with services.layers.diff(self.key) as tar:
            stored = services.images.layers.with_diff_id(services.images.blobs.put_layer(tar))
        layer = services.images.layers.adopt(parent_chain or None, self.key, stored, size)
        return MadeLayer(layer.diff_id, layer.chain, layer.size)

    def _measured(self, changes: Sequence[Change]) -> int:
        """Bytes of the files; with SOURCE_DATE_EPOCH nothing is younger than that after it."""
        epoch = self._work.options.source_date_epoch
        limit = None if epoch is None else epoch * NANOSECONDS
        size = 0
        for change in reversed(changes):  # what is in a folder before the folder itself
            status = self.tree.status(change.path)
            if status is None:
                continue
            if stat.S_ISREG(status.st_mode):
                size += status.st_size
            if limit is not None and status.st_mtime_ns > limit:
                with self.tree.parent(change.path) as (folder, name):
                    os.utime(name, ns=(limit, limit), dir_fd=folder, follow_symlinks=False)
        return size


def remove_leftovers(layers: LayerDriver, root: Path) -> None:
    """Remove what the builds of a killed daemon left; called once at start."""
    for key in layers.keys():  # noqa: SIM118 - a method of the driver
        if key.startswith(LAYER_PREFIX):
            layers.unmount(key)
            layers.remove(key)
    running = root / "running"
    if running.exists():
        beneath.remove_path(running)


def parent_layer(chain: str) -> str | None:
    """The layer driver's key of a chain id that may be empty."""
    return layer_key(chain) if chain else None

"""What drivers have in common whose layers are stacked by a union filesystem."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from lazarette.storage import beneath, copying, mounts, space, syscalls
from lazarette.storage.changes import Change
from lazarette.storage.idmaps import IdMap
from lazarette.storage.layers.apply import DirectWhiteouts, LayerReader
from lazarette.storage.layers.contract import Applied, LayerCapabilities, LayerUsage
from lazarette.storage.layers.shelf import LayerRecord, Shelf
from lazarette.storage.layers.stackformat import OverlayWhiteouts, layer_changes, write_diff
from lazarette.storage.layers.tar import TreeWriter, streamed


class StackedLayerDriver(ABC):
    """A driver whose layers are stacked by a union filesystem; subclasses mount it.

    Args:
        root: the driver's folder.
    """

    def __init__(self, root: Path) -> None:
        self._shelf = Shelf(root, beneath.remove_path)

    @property
    @abstractmethod
    def capabilities(self) -> LayerCapabilities:
        """See :class:`LayerCapabilities`."""

    @abstractmethod
    def _stack(
        self,
        lower: list[Path],
        upper: Path | None,
        work: Path | None,
        target: Path,
        idmap: IdMap | None,
    ) -> None:
        """Mount a union, the first of ``lower`` topmost; without upper it is read-only."""

    @abstractmethod
    def _opened(self, lower: list[Path]) -> AbstractContextManager[int]:
        """The read-only union of several layers as a descriptor of its root."""

    def recover(self) -> None:
        """See :meth:`LayerDriver.recover`."""
        self._shelf.recover()

    @abstractmethod
    def close(self) -> None:
        """See :meth:`LayerDriver.close`."""

    # ---- making

    def prepare(self, key: str, parent: str | None) -> None:
        """See :meth:`LayerDriver.prepare`."""
        with self._shelf.lock:
            if not self._shelf.admit(key, parent, committed=False):
                return
            staged = self._stage(parent)
            self._shelf.appear(staged, key, LayerRecord(parent))

    def _stage(self, parent: str | None) -> Path:
        staged = self._shelf.stage()
        (staged / "diff").mkdir(mode=0o755)
        (staged / "work").mkdir(mode=0o711)
        if parent is not None:
            above = self._shelf.folder(parent)
            with beneath.opened(above) as source, beneath.opened(staged) as target:
                status = os.stat(b"diff", dir_fd=source)
                copying.copy_metadata(source, b"diff", status, target, b"diff")
        return staged

    def apply(self, key: str, parent: str | None, stream: BinaryIO) -> Applied:
        """See :meth:`LayerDriver.apply`."""
        with self._shelf.lock:
            if not self._shelf.admit(key, parent, committed=True):
                known = self._shelf.record(key)
                return Applied(known.size, known.diff_id)
        staged = self._stage(parent)
        try:
            with beneath.opened(staged / "diff") as root, ExitStack() as stack:
                # nothing is below a first layer, and a device 0:0 would show in its mount
                whiteouts = DirectWhiteouts() if parent is None else OverlayWhiteouts()
                applied = LayerReader(
                    root, whiteouts, lambda: stack.enter_context(self._merged(parent))
                ).apply(stream)
                syscalls.syncfs(root)
            self._shelf.appear(
                staged, key, LayerRecord(parent, True, applied.size, applied.diff_id)
            )
        except BaseException:
            self._shelf.drop(staged)
            raise
        return applied

    def commit(self, key: str) -> None:
        """See :meth:`LayerDriver.commit`."""
        with self._shelf.lock:
            if self._shelf.commit(key):
                beneath.remove_path(self._shelf.folder(key) / "work")

    def commit_as(self, key: str, new_key: str, *, size: int, diff_id: str) -> None:
        """See :meth:`CommitsInPlace.commit_as`; what the layer says of the ones below stays
        true, since its parent stays the same."""
        with beneath.opened(self._shelf.folder(key) / "diff") as root:
            syscalls.syncfs(root)
        beneath.remove_path(self._shelf.folder(key) / "work")
        self._shelf.commit_as(key, new_key, size, diff_id)

    # ---- mounting

    def mount(self, key: str, idmap: IdMap | None = None) -> Path:
        """See :meth:`LayerDriver.mount`."""
        return self._shelf.mount(key, lambda target: self._attach(key, target, idmap), idmap)

    def unmount(self, key: str, idmap: IdMap | None = None) -> None:
        """See :meth:`LayerDriver.unmount`."""
        self._shelf.unmount(key, idmap)

    def _attach(self, key: str, target: Path, idmap: IdMap | None) -> None:
        record = self._shelf.record(key)
        own = self._shelf.folder(key)
        chain = [self._shelf.folder(layer) / "diff" for layer in self._shelf.chain(key)]
        if record.parent is None:
            mounts.bind(
                chain[0],
                target,
                recursive=False,
                read_only=record.committed,
                user_namespace=None if idmap is None else idmap.namespace,
            )
        elif record.committed:
            self._stack(chain, None, None, target, idmap)
        else:
            self._stack(chain[1:], own / "diff", own / "work", target, idmap)

    @contextmanager
    def _merged(self, key: str | None) -> Iterator[int | None]:
        """The merged tree of a layer as a descriptor, mounted nowhere."""
        if key is None:
            yield None
            return
        chain = [self._shelf.folder(layer) / "diff" for layer in self._shelf.chain(key)]
        if len(chain) == 1:
            with beneath.opened(chain[0]) as folder:
                yield folder
            return
        with self._opened(chain) as folder:
            yield folder

    # ---- reading

    def diff(self, key: str) -> AbstractContextManager[BinaryIO]:
        """See :meth:`LayerDriver.diff`."""
        self._shelf.record(key)

        def produce(out: BinaryIO) -> None:
            writer = TreeWriter(out)
            with (
                beneath.opened(self._shelf.folder(key) / "diff") as root,
                self._merged(key) as merged,
            ):
                assert merged is not None
                write_diff(writer, root, merged)
            writer.close()

        return streamed(produce)

    def changes(self, key: str) -> Iterator[Change]:
        """See :meth:`LayerDriver.changes`."""
        parent = self._shelf.record(key).parent
        found: list[Change] = []
        with (
            beneath.opened(self._shelf.folder(key) / "diff") as root,
            self._merged(parent) as below,
            self._merged(key) as merged,
        ):
            assert merged is not None
            found.extend(layer_changes(root, below, merged))
        yield from sorted(found, key=lambda change: change.path)

    def usage(self, key: str) -> LayerUsage:
        """See :meth:`LayerDriver.usage`."""
        self._shelf.record(key)
        return space_of(self._shelf.folder(key) / "diff")

    def exists(self, key: str) -> bool:
        """See :meth:`LayerDriver.exists`."""
        return self._shelf.exists(key)

    def keys(self) -> list[str]:
        """See :meth:`LayerDriver.keys`."""
        return self._shelf.keys()

    def remove(self, key: str) -> None:
        """See :meth:`LayerDriver.remove`."""
        self._shelf.remove(key)


def space_of(folder: Path) -> LayerUsage:
    """Bytes on the disk and inodes below a folder, each inode once."""
    return space.tree_usage(folder, shared=False)

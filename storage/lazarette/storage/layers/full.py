"""What drivers have in common whose layers each hold the whole tree."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from lazarette.storage import beneath, mounts, syscalls
from lazarette.storage.changes import Change, ChangeKind
from lazarette.storage.idmaps import IdMap
from lazarette.storage.layers.apply import WHITEOUT, DirectWhiteouts, LayerReader
from lazarette.storage.layers.contract import Applied, LayerCapabilities, LayerUsage
from lazarette.storage.layers.shelf import LayerRecord, Shelf
from lazarette.storage.layers.tar import TreeWriter, streamed


class FullLayerDriver(ABC):
    """A driver that makes a layer as a copy of its parent; subclasses say how.

    Args:
        root: the driver's folder on the filesystem that holds the layers.
        destroy: deletes a folder with what the driver put into it.
    """

    def __init__(self, root: Path, destroy: Callable[[Path], None]) -> None:
        self._shelf = Shelf(root, destroy)

    @property
    @abstractmethod
    def capabilities(self) -> LayerCapabilities:
        """See :class:`LayerCapabilities`."""

    @abstractmethod
    def _fill(self, parent: Path | None, staged: Path) -> None:
        """Make the folder ``tree`` in ``staged``, a copy of the parent's or empty."""

    @abstractmethod
    def _compare(self, parent: Path, own: Path) -> Iterator[Change]:
        """What differs between two trees."""

    @abstractmethod
    def close(self) -> None:
        """See :meth:`LayerDriver.close`."""

    @abstractmethod
    def usage(self, key: str) -> LayerUsage:
        """See :meth:`LayerDriver.usage`."""

    def recover(self) -> None:
        """See :meth:`LayerDriver.recover`."""
        self._shelf.recover()

    def _tree(self, key: str) -> Path:
        self._shelf.record(key)
        return self._shelf.folder(key) / "tree"

    def _stage(self, parent: str | None) -> Path:
        staged = self._shelf.stage()
        try:
            self._fill(None if parent is None else self._tree(parent), staged)
        except BaseException:
            self._shelf.drop(staged)
            raise
        return staged

    def prepare(self, key: str, parent: str | None) -> None:
        """See :meth:`LayerDriver.prepare`."""
        with self._shelf.lock:
            if self._shelf.admit(key, parent, committed=False):
                self._shelf.appear(self._stage(parent), key, LayerRecord(parent))

    def apply(self, key: str, parent: str | None, stream: BinaryIO) -> Applied:
        """See :meth:`LayerDriver.apply`."""
        with self._shelf.lock:
            if not self._shelf.admit(key, parent, committed=True):
                known = self._shelf.record(key)
                return Applied(known.size, known.diff_id)
        staged = self._stage(parent)
        try:
            with beneath.opened(staged / "tree") as root:
                applied = LayerReader(root, DirectWhiteouts()).apply(stream)
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
        self._shelf.commit(key)

    def commit_as(self, key: str, new_key: str, *, size: int, diff_id: str) -> None:
        """See :meth:`CommitsInPlace.commit_as`."""
        with beneath.opened(self._tree(key)) as root:
            syscalls.syncfs(root)
        self._shelf.commit_as(key, new_key, size, diff_id)

    def mount(self, key: str, idmap: IdMap | None = None) -> Path:
        """See :meth:`LayerDriver.mount`."""
        return self._shelf.mount(key, lambda target: self._attach(key, target, idmap), idmap)

    def _attach(self, key: str, target: Path, idmap: IdMap | None) -> None:
        mounts.bind(
            self._tree(key),
            target,
            recursive=False,
            read_only=self._shelf.record(key).committed,
            user_namespace=None if idmap is None else idmap.namespace,
        )

    def unmount(self, key: str, idmap: IdMap | None = None) -> None:
        """See :meth:`LayerDriver.unmount`."""
        self._shelf.unmount(key, idmap)

    def changes(self, key: str) -> Iterator[Change]:
        """See :meth:`LayerDriver.changes`."""
        parent = self._shelf.record(key).parent
        own = self._tree(key)
        found = _everything(own) if parent is None else self._compare(self._tree(parent), own)
        yield from sorted(
            (change for change in found if change.path), key=lambda change: change.path
        )

    def diff(self, key: str) -> AbstractContextManager[BinaryIO]:
        """See :meth:`LayerDriver.diff`."""
        tree = self._tree(key)

        def produce(out: BinaryIO) -> None:
            writer = TreeWriter(out)
            with beneath.opened(tree) as root:
                self._write(writer, root, list(self.changes(key)))
            writer.close()

        return streamed(produce)

    def _write(self, writer: TreeWriter, root: int, changes: list[Change]) -> None:
        """Changes as a tar: a folder that is gone is one whiteout, parents come first."""
        gone: set[bytes] = set()
        for change in changes:
            if change.kind is ChangeKind.RENAMED and change.origin is not None:
                gone.add(change.origin)
            elif change.kind is ChangeKind.REMOVED:
                gone.add(change.path)
        outermost = {path for path in gone if path.rpartition(b"/")[0] not in gone}
        written = {c.path for c in changes if c.kind is not ChangeKind.REMOVED}
        for path in sorted(outermost | written):
            folder, slash, name = path.rpartition(b"/")
            if path in outermost and _is_folder(root, folder):
                writer.empty(folder + slash + WHITEOUT + name)
            if path in written:
                parent, name = beneath.open_parent(root, path)
                try:
                    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
                    writer.entry(path, parent, name, status)
                finally:
                    os.close(parent)

    def exists(self, key: str) -> bool:
        """See :meth:`LayerDriver.exists`."""
        return self._shelf.exists(key)

    def keys(self) -> list[str]:
        """See :meth:`LayerDriver.keys`."""
        return self._shelf.keys()

    def remove(self, key: str) -> None:
        """See :meth:`LayerDriver.remove`."""
        self._shelf.remove(key)


def _is_folder(root: int, path: bytes) -> bool:
    """Whether a folder whose entry was removed is still one; if not, its successor hides it."""
    try:
        parent, name = beneath.open_parent(root, path)
    except OSError as gone:
        if gone.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise
    try:
        found = os.stat(name or b".", dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    finally:
        os.close(parent)
    return stat.S_ISDIR(found.st_mode)


def _everything(tree: Path) -> Iterator[Change]:
    with beneath.opened(tree) as root:
        for entry in beneath.walk(root):
            yield Change(ChangeKind.ADDED, entry.path)

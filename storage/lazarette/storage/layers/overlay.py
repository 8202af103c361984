"""Layers on the kernel's overlay filesystem.

Each layer is a folder of its own files; a mount stacks them.  Deleted is a character
device 0:0, an opaque folder has ``trusted.overlay.opaque=y`` and a renamed one
``trusted.overlay.redirect`` (Documentation/filesystems/overlayfs.rst).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lazarette.storage import beneath, copying, mounts, syscalls
from lazarette.storage.changes import Change, ChangeKind
from lazarette.storage.clock import Clock
from lazarette.storage.layers.apply import OPAQUE, WHITEOUT, DirectWhiteouts, LayerReader
from lazarette.storage.layers.contract import Applied, LayerCapabilities, LayerUsage
from lazarette.storage.layers.shelf import LayerRecord, Shelf
from lazarette.storage.layers.tar import TreeWriter, streamed
from lazarette.storage.syscalls import MountAttr

_OPAQUE_XATTR = "trusted.overlay.opaque"
_REDIRECT_XATTR = "trusted.overlay.redirect"
_METACOPY_XATTR = "trusted.overlay.metacopy"
_LONGEST_OPTION = 255
_CONFIGURED = (("redirect_dir", "on"), ("index", "off"), ("metacopy", "off"))


def is_whiteout(status: os.stat_result) -> bool:
    """Whether an entry of a layer says "deleted"."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _xattr(parent: int, name: bytes, key: str) -> bytes | None:
    try:
        return os.getxattr(f"/proc/self/fd/{parent}/".encode() + name, key, follow_symlinks=False)
    except OSError as refused:
        if refused.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


class OverlayWhiteouts:
    """Whiteouts in the form that overlay reads from a lower folder."""

    def hide(self, folder: int, name: bytes) -> None:
        """See :meth:`Whiteouts.hide`."""
        try:
            os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=folder)
        except FileExistsError:
            return  # a repeated whiteout

    def opaque(self, folder: int, own: frozenset[bytes]) -> None:
        """See :meth:`Whiteouts.opaque`; the layers below are hidden whatever ``own`` is."""
        os.setxattr(folder, _OPAQUE_XATTR, b"y")

    def hidden(self, folder: int, name: bytes) -> bool:
        """See :meth:`Whiteouts.hidden`."""
        try:
            return is_whiteout(os.stat(name, dir_fd=folder, follow_symlinks=False))
        except FileNotFoundError:
            return False


class OverlayLayerDriver:
    """Layers stacked by the kernel.

    Args:
        root: the driver's folder, on a filesystem that can be an upper folder of overlay
            (ext4, xfs, btrfs; not overlay itself).
        clock: unused by this driver; every driver is made alike.
    """

    def __init__(self, root: Path, clock: Clock) -> None:
        self._shelf = Shelf(root, beneath.remove_path)

    @property
    def capabilities(self) -> LayerCapabilities:
        """See :class:`LayerCapabilities`."""
        return LayerCapabilities(
            name="overlay", copy_on_write=True, directory_rename=True, needs=("overlay",)
        )

    def recover(self) -> None:
        """See :meth:`LayerDriver.recover`."""
        self._shelf.recover()

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
            with beneath.opened(staged / "diff") as root, self._merged(parent) as below:
                # nothing is below a first layer, and a device 0:0 would show in its mount
                whiteouts = DirectWhiteouts() if parent is None else OverlayWhiteouts()
                applied = LayerReader(root, whiteouts, below).apply(stream)
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

    # ---- mounting

    def mount(self, key: str) -> Path:
        """See :meth:`LayerDriver.mount`."""
        return self._shelf.mount(key, lambda target: self._attach(key, target))

    def unmount(self, key: str) -> None:
        """See :meth:`LayerDriver.unmount`."""
        self._shelf.unmount(key)

    def _attach(self, key: str, target: Path) -> None:
        record = self._shelf.record(key)
        own = self._shelf.folder(key)
        chain = [self._shelf.folder(layer) / "diff" for layer in self._shelf.chain(key)]
        if record.parent is None:
            mounts.bind(chain[0], target, recursive=False, read_only=record.committed)
        elif record.committed:
            stack(chain, None, None, target)
        else:
            stack(chain[1:], own / "diff", own / "work", target)

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
        mount = _stacked(chain, None, None)
        try:
            folder = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
            try:
                yield folder
            finally:
                os.close(folder)
        finally:
            os.close(mount)

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
                _write_diff(writer, root, merged)
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
            for met in _entries(root, merged):
                found.extend(_changes_of(met, below, merged))
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
    total = 0
    seen: set[int] = set()
    with beneath.opened(folder) as root:
        for entry in beneath.walk(root):
            if entry.path and entry.status.st_ino not in seen:
                seen.add(entry.status.st_ino)
                total += entry.status.st_blocks * 512
    return LayerUsage(total, len(seen))


def stack(lower: list[Path], upper: Path | None, work: Path | None, target: Path) -> None:
    """Mount layers on each other, the first of ``lower`` topmost.

    Raises:
        MountFailed: the kernel refused, with its reason.
    """
    mount = _stacked(lower, upper, work)
    try:
        mounts.attach(mount, target)
    finally:
        os.close(mount)


def _stacked(lower: list[Path], upper: Path | None, work: Path | None) -> int:
    """A detached overlay mount."""
    kept: list[int] = []

    def short(path: Path) -> bytes:
        """The path itself, or where it is too long for an option, one by descriptor."""
        encoded = os.fsencode(path)
        if len(encoded) <= _LONGEST_OPTION:
            return encoded
        kept.append(os.open(encoded, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        return f"/proc/self/fd/{kept[-1]}".encode()

    options: list[tuple[str, str | bytes | None]] = [("source", "lazarette"), *_CONFIGURED]
    options += [("lowerdir+", short(path)) for path in lower]
    if upper is not None and work is not None:
        options += [("upperdir", short(upper)), ("workdir", short(work))]
    attributes = MountAttr.READ_ONLY if upper is None else MountAttr.NONE
    try:
        return mounts.filesystem("overlay", options, attributes=attributes)
    finally:
        for descriptor in kept:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Met:
    """An entry of a layer.

    Attributes:
        entry: where and what it is.
        opaque: a folder that hides what is below it.
        covered: inside a folder that does.
    """

    entry: beneath.Entry
    opaque: bool = False
    covered: bool = False


def _entries(root: int, merged: int) -> Iterator[_Met]:
    """What a layer says, parents first.

    A renamed folder's content is not in the layer but where it came from: it is read from
    the merged tree, and the folder counts as opaque.
    """
    renamed = hiding = b""
    for entry in beneath.walk(root):
        if not entry.path or (renamed and entry.path.startswith(renamed)):
            continue
        renamed = b""
        if not (hiding and entry.path.startswith(hiding)):
            hiding = b""
        covered = bool(hiding)
        if entry.is_folder:
            moved = _xattr(entry.parent, entry.name, _REDIRECT_XATTR) is not None
            opaque = moved or _xattr(entry.parent, entry.name, _OPAQUE_XATTR) == b"y"
            yield _Met(entry, opaque, covered)
            if moved:
                renamed = entry.path + b"/"
                yield from _moved(merged, entry.path)
            elif opaque and not covered:
                hiding = entry.path + b"/"
        elif _xattr(entry.parent, entry.name, _METACOPY_XATTR) is not None:
            holder, name = beneath.open_parent(merged, entry.path)
            try:
                yield _Met(beneath.Entry(entry.path, holder, name, entry.status), covered=covered)
            finally:
                os.close(holder)
        else:
            yield _Met(entry, covered=covered)


def _moved(merged: int, path: bytes) -> Iterator[_Met]:
    holder, name = beneath.open_parent(merged, path)
    try:
        folder = beneath.open_folder(holder, name)
    finally:
        os.close(holder)
    try:
        for entry in beneath.walk(folder):
            if entry.path:
                entry.path = path + b"/" + entry.path
                yield _Met(entry, covered=True)
    finally:
        os.close(folder)


def _write_diff(writer: TreeWriter, root: int, merged: int) -> None:
    """A layer as a tar."""
    for met in _entries(root, merged):
        entry = met.entry
        folder, slash, name = entry.path.rpartition(b"/")
        if is_whiteout(entry.status):
            writer.empty(folder + slash + WHITEOUT + name)
            continue
        writer.entry(entry.path, entry.parent, entry.name, entry.status)
        if met.opaque:
            writer.empty(entry.path + b"/" + OPAQUE)


def _changes_of(met: _Met, below: int | None, merged: int) -> Iterator[Change]:
    entry = met.entry
    was = None if below is None else _status(below, entry.path)
    if is_whiteout(entry.status):
        if was is not None:
            yield Change(ChangeKind.REMOVED, entry.path)
        return
    kind = ChangeKind.ADDED if was is None else ChangeKind.MODIFIED
    regular = stat.S_ISREG(entry.status.st_mode)
    yield Change(kind, entry.path, ranges=None if regular else ())
    if (
        (met.opaque or (met.covered and entry.is_folder))
        and was is not None
        and stat.S_ISDIR(was.st_mode)
        and below is not None
    ):
        now = _names(merged, entry.path)
        for name in sorted(_names(below, entry.path) - now):
            yield Change(ChangeKind.REMOVED, entry.path + b"/" + name)


def _status(root: int, path: bytes) -> os.stat_result | None:
    try:
        holder, name = beneath.open_parent(root, path)
    except OSError as missing:
        if missing.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    try:
        return os.stat(name, dir_fd=holder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    finally:
        os.close(holder)


def _names(root: int, path: bytes) -> set[bytes]:
    holder, name = beneath.open_parent(root, path)
    try:
        folder = beneath.open_folder(holder, name)
    finally:
        os.close(holder)
    try:
        return {os.fsencode(entry) for entry in os.listdir(folder)}
    finally:
        os.close(folder)

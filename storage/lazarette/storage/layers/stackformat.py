"""Layers on disk in the format of the kernel's overlay filesystem.

Each layer is a folder of its own entries.  A deleted one is a character device 0:0, an
opaque folder has ``trusted.overlay.opaque=y``, a renamed one ``trusted.overlay.redirect``,
and a file whose content is still below ``trusted.overlay.metacopy``
(Documentation/filesystems/overlayfs.rst).  The kernel's driver and the one in user space
keep layers alike, so both read them with this module.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from lazarette.storage import beneath
from lazarette.storage.changes import Change, ChangeKind
from lazarette.storage.layers.apply import OPAQUE, WHITEOUT, Own
from lazarette.storage.layers.tar import TreeWriter

_OPAQUE_XATTR = "trusted.overlay.opaque"
_REDIRECT_XATTR = "trusted.overlay.redirect"
_METACOPY_XATTR = "trusted.overlay.metacopy"


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

    def opaque(self, folder: int, path: bytes, own: Own) -> None:
        """See :meth:`Whiteouts.opaque`; the layers below are hidden whatever ``own`` is."""
        os.setxattr(folder, _OPAQUE_XATTR, b"y")

    def hidden(self, folder: int, name: bytes) -> bool:
        """See :meth:`Whiteouts.hidden`."""
        try:
            return is_whiteout(os.stat(name, dir_fd=folder, follow_symlinks=False))
        except FileNotFoundError:
            return False


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


def write_diff(writer: TreeWriter, root: int, merged: int) -> None:
    """Write a layer as an OCI layer tar.

    Args:
        writer: where to.
        root: descriptor of the layer's own folder.
        merged: of its merged tree, for what is only referred to in the layer.
    """
    for met in _entries(root, merged):
        entry = met.entry
        folder, slash, name = entry.path.rpartition(b"/")
        if is_whiteout(entry.status):
            writer.empty(folder + slash + WHITEOUT + name)
            continue
        writer.entry(entry.path, entry.parent, entry.name, entry.status)
        if met.opaque:
            writer.empty(entry.path + b"/" + OPAQUE)


def layer_changes(root: int, below: int | None, merged: int) -> Iterator[Change]:
    """What a layer changes, in the order of the walk.

    Args:
        root: descriptor of the layer's own folder.
        below: of the parent's merged tree.
        merged: of its own merged tree.
    """
    for met in _entries(root, merged):
        yield from _changes_of(met, below, merged)


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
        return set(beneath.names(folder))
    finally:
        os.close(folder)

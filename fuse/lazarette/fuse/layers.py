"""Layers on disk, in the format of the kernel's overlayfs.

Source: ``Documentation/filesystems/overlayfs.rst``.  A layer is an ordinary folder in which

* a character device 0:0 (*whiteout*) hides the name from all layers below;
* a folder with the xattr ``PREFIX.opaque`` = ``y`` hides all names of its lower folders;
* a folder with ``PREFIX.redirect`` continues below under another name (``b``) or from the
  root of the layers (``/a/b``); written only by a union with ``redirect``;
* ``PREFIX.impure`` = ``y`` marks a folder in which some entry keeps the inode number it had
  before copy-up, or is a whiteout to users.

PREFIX is ``trusted.overlay``, or ``user.overlay`` for a server without privileges.  Xattrs of
our own under the same prefix, which the kernel hides but leaves alone: ``lazarette.ino``
(inode number before copy-up, 8 bytes little-endian), ``lazarette.links`` (links of an indexed
file that are not links on disk, 8 bytes signed little-endian) and ``lazarette.whiteout`` (an
empty file without permissions that users see as a character device 0:0: they stacked an
overlay on this union).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lazarette.fuse.native import Status

DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MOST_LOWERS = 500
_PATH_LIMIT = 4000
_INO_BITS = 48


def is_whiteout(st: Status) -> bool:
    """Whether an entry of a layer is a whiteout."""
    return st.st_rdev == 0 and stat.S_ISCHR(st.st_mode)


def open_beneath(fd: int, path: bytes) -> int:
    """Open the folder ``path`` (any length) below ``fd``, following no symlink at its end."""
    if len(path) <= _PATH_LIMIT:
        return os.open(path or b".", DIRECTORY, dir_fd=fd)
    parts = path.split(b"/")
    current = os.open(b".", DIRECTORY, dir_fd=fd)
    for part in parts:
        try:
            deeper = os.open(part, DIRECTORY, dir_fd=current)
        finally:
            os.close(current)
        current = deeper
    return current


@contextmanager
def opened_beneath(fd: int, path: bytes) -> Iterator[int]:
    """:func:`open_beneath`, closed again afterwards."""
    opened = open_beneath(fd, path)
    try:
        yield opened
    finally:
        os.close(opened)


def entry_path(fd: int, name: bytes) -> bytes:
    """A path to ``name`` in the folder ``fd``, for calls that take no folder descriptor."""
    return b"/proc/self/fd/%d/%s" % (fd, name)


def descriptor_path(fd: int) -> bytes:
    """A path to what ``fd`` is; it must be followed as a link."""
    return b"/proc/self/fd/%d" % fd


class Format:
    """Names of the xattrs of the format, and reading and writing of them."""

    def __init__(self, privileged: bool) -> None:
        self.prefix = b"trusted.overlay." if privileged else b"user.overlay."
        self.opaque = self.prefix + b"opaque"
        self.redirect = self.prefix + b"redirect"
        self.impure = self.prefix + b"impure"
        self.metacopy = self.prefix + b"metacopy"
        self.ino = self.prefix + b"lazarette.ino"
        self.links = self.prefix + b"lazarette.links"
        self.node = self.prefix + b"lazarette.whiteout"
        self._escape = self.prefix + b"overlay."

    def stored(self, name: bytes) -> bytes:
        """The name under which a user's xattr is kept: one that begins with PREFIX is escaped."""
        if name.startswith(self.prefix):
            return self._escape + name[len(self.prefix) :]
        return name

    def shown(self, name: bytes) -> bytes | None:
        """The reverse of :meth:`stored`; None for xattrs of the format, which nobody sees."""
        if not name.startswith(self.prefix):
            return name
        if name.startswith(self._escape):
            return self.prefix + name[len(self._escape) :]
        return None

    def read(self, path: bytes, name: bytes, follow: bool = False) -> bytes | None:
        """An xattr of the format, or None."""
        try:
            return os.getxattr(path, name, follow_symlinks=follow)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.ENOENT):
                return None
            raise

    def read_ino(self, path: bytes) -> int | None:
        """The inode number an entry had before copy-up."""
        value = self.read(path, self.ino)
        return int.from_bytes(value, "little") if value is not None and len(value) == 8 else None

    def read_links(self, path: bytes) -> int | None:
        """Links of an indexed file that are not links on disk; None when it is not indexed."""
        value = self.read(path, self.links)
        if value is None or len(value) != 8:
            return None
        return int.from_bytes(value, "little", signed=True)

    def write_links(self, path: bytes, links: int) -> None:
        """Record :meth:`read_links`."""
        value = links.to_bytes(8, "little", signed=True)
        os.setxattr(path, self.links, value, follow_symlinks=False)


@dataclass(slots=True, eq=False)
class Layer:
    """One folder of the stack.

    Attributes:
        fd: descriptor of its root.
        device: number of its filesystem among those of the stack.
        passthrough: cleared when the kernel refuses its files as backing files.
    """

    fd: int
    device: int
    passthrough: bool = True


@dataclass(frozen=True, slots=True)
class LowerDir:
    """A folder inside a lower layer; ``path`` is relative to the layer's root."""

    layer: Layer
    path: bytes

    def below(self, name: bytes) -> LowerDir:
        """The folder ``name`` in it."""
        return LowerDir(self.layer, self.path + b"/" + name if self.path else name)


class Stack:
    """The layers of one union: at most one upper, then lowers from top to bottom."""

    def __init__(self, upper: str | None, lowers: list[str]) -> None:
        if len(lowers) > MOST_LOWERS:
            raise OSError(errno.EINVAL, f"more than {MOST_LOWERS} lower layers")
        self._devices: dict[int, int] = {}
        self.upper = self._open(upper) if upper is not None else None
        self.lowers = [self._open(path) for path in lowers]

    def _open(self, path: str) -> Layer:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        device = os.stat(fd).st_dev
        return Layer(fd, self._devices.setdefault(device, len(self._devices)))

    def number(self, layer: Layer, ino: int) -> int:
        """An inode number unique in the union, the same at every mount of the same stack."""
        if layer.device == 0:
            return ino
        if ino >> _INO_BITS:
            return hash((layer.device, ino)) & ((1 << 62) - 1) | (1 << 62)
        return ino | layer.device << _INO_BITS

    def close(self) -> None:
        """Close all roots."""
        for layer in [*([self.upper] if self.upper else []), *self.lowers]:
            os.close(layer.fd)

"""Files of containers in and out as tar: ``docker cp``, ``export``, ``diff``.

A running container is read through its own mounts.  For one that does not run its root
is mounted, with its volumes and binds where it would see them, while the copy lasts.
Every path is resolved by the kernel inside the container's root.
"""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.errors import PathNotFound
from lazarette.runtime.containers.record import MountPoint
from lazarette.runtime.containers.rootfs import make_target, open_in_root, resolve_user
from lazarette.storage import beneath
from lazarette.storage import mounts as kernel_mounts
from lazarette.storage.changes import ChangeKind
from lazarette.storage.errors import InvalidArgument, VolumeNotFound
from lazarette.storage.idmaps import IdMap, as_root
from lazarette.storage.layers.apply import LayerReader
from lazarette.storage.layers.contract import LayerDriver
from lazarette.storage.layers.tar import TreeWriter
from lazarette.storage.volumes.manager import VolumeManager

MODIFIED, ADDED, DELETED = 0, 1, 2
"""Kinds of ``docker diff``."""

_GO_TYPES = {
    stat.S_IFDIR: 1 << 31,
    stat.S_IFLNK: 1 << 27,
    stat.S_IFBLK: 1 << 26,
    stat.S_IFIFO: 1 << 25,
    stat.S_IFSOCK: 1 << 24,
    stat.S_IFCHR: 1 << 26 | 1 << 21,
}
_GO_BITS = ((stat.S_ISUID, 1 << 23), (stat.S_ISGID, 1 << 22), (stat.S_ISVTX, 1 << 20))
_OURS = frozenset(
    {"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev", "/proc", "/sys", "/dev/console"}
    | {"/dev/pts", "/dev/shm", "/dev/mqueue", "/sbin/docker-init", "/.dockerenv"}
)


def go_mode(mode: int) -> int:
    """``st_mode`` as Go's ``os.FileMode``."""
    made = stat.S_IMODE(mode) & 0o777 | _GO_TYPES.get(stat.S_IFMT(mode), 0)
    for bit, go_bit in _GO_BITS:
        if mode & bit:
            made |= go_bit
    return made


@dataclass(frozen=True)
class PathStat:
    """What is at a path of a container.

    Attributes:
        name: last part of the path.
        status: its ``lstat``.
        link_target: where a symbolic link leads, absolute; empty otherwise.
    """

    name: str
    status: os.stat_result
    link_target: str


class Archives:
    """Reads and writes files of containers.

    Args:
        layers: roots.
        volumes: named volumes.
    """

    def __init__(self, layers: LayerDriver, volumes: VolumeManager) -> None:
        self._layers = layers
        self._volumes = volumes

    @contextmanager
    def opened(self, container: Container) -> Iterator[int]:
        """A descriptor of the container's root, with what it has mounted."""
        if container.state.running:
            root = container.open_root()
            try:
                yield root
            finally:
                os.close(root)
            return
        with self.own_files(container) as root:
            user = f"archive-{container.id}"
            points = [p for p in container.definition.mounts if p.type in ("volume", "bind")]
            try:
                for point in points:
                    self._show(root, point, user)
                yield root
            finally:
                for point in reversed(points):
                    self._hide(root, point, user)

    @contextmanager
    def own_files(self, container: Container) -> Iterator[int]:
        """A descriptor of the container's root without anything mounted in it."""
        layer = container.definition.layer
        folder = self._layers.mount(layer, container.idmap)
        try:
            root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                yield root
            finally:
                os.close(root)
        finally:
            self._layers.unmount(layer)

    def _show(self, root: int, point: MountPoint, user: str) -> None:
        """Bind a volume or host folder where a running container would have it."""
        try:
            with self._source(point, user) as source:
                make_target(root, point.destination, stat.S_ISDIR(os.fstat(source).st_mode))
                target = open_in_root(root, point.destination, os.O_PATH)
                try:
                    place = os.readlink(f"/proc/self/fd/{target}")
                    kernel_mounts.bind(source, place, read_only=not point.rw)
                finally:
                    os.close(target)
        except (VolumeNotFound, FileNotFoundError):
            return

    @contextmanager
    def _source(self, point: MountPoint, user: str) -> Iterator[int]:
        folder = point.source
        if point.type == "volume":
            folder = os.fspath(self._volumes.mount(point.name, user))
        opened = os.open(folder, os.O_PATH)
        try:
            if not point.subpath:
                yield opened
                return
            inside = open_in_root(opened, point.subpath, os.O_PATH)
            try:
                yield inside
            finally:
                os.close(inside)
        finally:
            os.close(opened)

    def _hide(self, root: int, point: MountPoint, user: str) -> None:
        try:
            target = open_in_root(root, point.destination, os.O_PATH)
        except FileNotFoundError:
            return
        path = os.readlink(f"/proc/self/fd/{target}")
        os.close(target)
        if kernel_mounts.is_mount_point(path):
            kernel_mounts.unmount(path, detach=True)
        if point.type == "volume":
            self._volumes.unmount(point.name, user)

    # ---- out

    def stat(self, container: Container, root: int, path: str) -> PathStat:
        """What is at a path; a link at its end is not followed, unless a slash follows it.

        Raises:
            PathNotFound: nothing is there.
        """
        absolute = posixpath.join("/", path)
        flags = os.O_PATH if absolute.endswith(("/", "/.")) else os.O_PATH | os.O_NOFOLLOW
        try:
            fd = open_in_root(root, absolute, flags)
        except OSError as bad:
            raise PathNotFound(path, container.name) from bad
        try:
            status = os.fstat(fd)
            target = ""
            if stat.S_ISLNK(status.st_mode):
                text = os.readlink("", dir_fd=fd)
                target = posixpath.normpath(posixpath.join(posixpath.dirname(absolute), text))
        finally:
            os.close(fd)
        return PathStat(base_name(absolute), status, target)

    def read(self, container: Container, root: int, path: str, out: BinaryIO) -> None:
        """Write what is at a path as a tar: one entry, or a folder with all below it.

        Raises:
            PathNotFound: nothing is there.
        """
        found = self.stat(container, root, path)
        absolute = posixpath.join("/", path)
        writer = TreeWriter(out, container.idmap)
        if stat.S_ISDIR(found.status.st_mode):
            fd = open_in_root(root, absolute, os.O_RDONLY | os.O_DIRECTORY)
            try:
                shown = {p.destination for p in container.definition.mounts}
                place = posixpath.normpath(absolute)
                prefix = b"." if found.name in ("/", ".") else os.fsencode(found.name)
                _write_folder(writer, fd, prefix, place, shown)
            finally:
                os.close(fd)
        else:
            parent = open_in_root(root, posixpath.dirname(absolute), os.O_PATH | os.O_DIRECTORY)
            try:
                name = os.fsencode(found.name)
                writer.entry(name, parent, name, found.status)
            finally:
                os.close(parent)
        writer.close()

    def export(self, container: Container, out: BinaryIO) -> None:
        """Write the whole root, without anything mounted in it, as a tar."""
        with self.own_files(container) as root:
            writer = TreeWriter(out, container.idmap)
            for entry in beneath.walk(root):
                if entry.path:
                    writer.entry(entry.path, entry.parent, entry.name, entry.status)
            writer.close()

    def changes(self, container: Container) -> list[tuple[str, int]]:
        """What differs from the image: path and kind, sorted by path."""
        made: dict[str, int] = {}
        for change in self._layers.changes(container.definition.layer):
            path = "/" + os.fsdecode(change.path)
            if change.kind is ChangeKind.RENAMED and change.origin is not None:
                made["/" + os.fsdecode(change.origin)] = DELETED
                made[path] = ADDED
            elif change.kind is ChangeKind.REMOVED:
                made[path] = DELETED
            else:
                made[path] = ADDED if change.kind is ChangeKind.ADDED else MODIFIED
        ours = self._made_by_us(container) & set(made)
        for path in ours:
            if made[path] != DELETED:
                del made[path]
        for path in {posixpath.dirname(path) for path in ours}:
            prefix = path.rstrip("/") + "/"
            if made.get(path) == MODIFIED and not any(p.startswith(prefix) for p in made):
                del made[path]
        made.pop("/", None)
        return sorted(made.items())

    @staticmethod
    def _made_by_us(container: Container) -> set[str]:
        """Mount points: they appear in the layer without anybody having written them."""
        return {*_OURS, *(point.destination for point in container.definition.mounts)}

    # ---- in

    def write(
        self,
        container: Container,
        root: int,
        path: str,
        stream: BinaryIO,
        *,
        keep_types: bool = False,
        own: bool = False,
    ) -> None:
        """Unpack a tar into a folder of the container.

        Args:
            container: which.
            root: its root, from :meth:`opened`.
            path: the folder.
            stream: the tar, uncompressed.
            keep_types: refuse to put a file over a folder or the reverse.
            own: everything belongs to the container's user.

        Raises:
            PathNotFound: the folder does not exist.
            InvalidArgument: it is no folder, is marked read-only, or the tar is hostile.
        """
        try:
            folder = open_in_root(root, path, os.O_RDONLY | os.O_DIRECTORY)
        except NotADirectoryError as bad:
            raise InvalidArgument("extraction point is not a directory") from bad
        except OSError as bad:
            raise PathNotFound(path, container.name) from bad
        try:
            _refuse_read_only(container, root, folder)
            owner = None
            if own:
                user = resolve_user(root, container.definition.config.user)
                owner = (user.uid, user.gid)
            with as_root(container.idmap):
                _Unpacker(folder, keep_types, owner, container.idmap).apply(stream)
        finally:
            os.close(folder)


def base_name(path: str) -> str:
    """The last part of a path as Go's ``filepath.Base`` says it: ``.`` for ``x/.``."""
    if not path.strip("/"):
        return "/"
    return path.rstrip("/").rsplit("/", 1)[-1] or "/"


def _write_folder(
    writer: TreeWriter, folder: int, prefix: bytes, place: str, shown: set[str]
) -> None:
    """Write a folder; of what is mounted in it only what the container asked for."""
    for entry in beneath.walk(folder):
        name = prefix + b"/" + entry.path if entry.path else prefix
        if not entry.mount_point:
            writer.entry(name, entry.parent, entry.name, entry.status)
            continue
        inside = posixpath.join(place, os.fsdecode(entry.path))
        if inside not in shown:
            writer.entry(name, entry.parent, entry.name, entry.status)
            continue
        fd = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=entry.parent)
        try:
            _write_folder(writer, fd, name, inside, shown)
        finally:
            os.close(fd)


def _refuse_read_only(container: Container, root: int, folder: int) -> None:
    on_root = os.fstat(folder).st_dev == os.fstat(root).st_dev
    if on_root and container.definition.host.readonly_rootfs:
        raise InvalidArgument("container rootfs is marked read-only")
    if os.fstatvfs(folder).f_flag & os.ST_RDONLY:
        raise InvalidArgument("mounted volume is marked read-only")


class _Unpacker(LayerReader):
    """Unpacks a tar over what is there."""

    def __init__(
        self,
        root: int,
        keep_types: bool,
        owner: tuple[int, int] | None,
        idmap: IdMap | None,
    ) -> None:
        super().__init__(root, None, idmap=idmap)
        self._keep_types = keep_types
        self._owner = owner

    def _place(
        self, tar: tarfile.TarFile, member: tarfile.TarInfo, folder: int, path: bytes, name: bytes
    ) -> None:
        if self._keep_types:
            self._refuse_other_type(member, folder, name)
        if self._owner is not None:
            member.uid, member.gid = self._owner
        super()._place(tar, member, folder, path, name)

    @staticmethod
    def _refuse_other_type(member: tarfile.TarInfo, folder: int, name: bytes) -> None:
        try:
            there = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        shown = os.fsdecode(name)
        if stat.S_ISDIR(there.st_mode) and not member.isdir():
            raise InvalidArgument(f'cannot overwrite directory "{shown}" with non-directory')
        if member.isdir() and not stat.S_ISDIR(there.st_mode):
            raise InvalidArgument(f'cannot overwrite non-directory "{shown}" with directory')

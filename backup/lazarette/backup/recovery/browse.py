"""All snapshots of a repository as a read-only tree, for looking around and copying out.

::

    VOLUME/2026-11-25T10:04:30Z-1f3a9c02/…     a snapshot, by time and beginning of its id
    VOLUME/latest                              a link to the newest

A name of a volume that holds ``/`` (a folder backed up by its path) is percent-encoded.
Served through mfusepy, the maintained fork of fusepy: it runs over libfuse 2 and 3, and
speed matters less here than being at home everywhere.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from urllib.parse import quote

import mfusepy

from lazarette.backup.repository.entries import Entry, Kind
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.tree import Content, PathNotFound, TreeReader
from lazarette.storage.clock import NANOSECONDS, rfc3339
from lazarette.storage.errors import LazaretteError

LATEST = "latest"
_KEPT = 256
_DIRECTORY = stat.S_IFDIR | 0o555

Attributes = dict[str, int]


def folder_of(volume: str) -> str:
    """The name of a volume's folder."""
    return quote(volume, safe="@:+,=!~ ")


def name_of(record: SnapshotRecord) -> str:
    """The name of a snapshot's folder."""
    second = rfc3339(record.time_ns // NANOSECONDS * NANOSECONDS or 1).partition(".")[0]
    return f"{second.rstrip('Z')}Z-{record.id[:8]}"


class BrowseFilesystem(mfusepy.Operations):  # type: ignore[misc]
    """The operations libfuse asks for; each is serial, as the trees' readers are.

    Args:
        repository: an open one; its snapshots are listed once.
    """

    use_ns = True

    def __init__(self, repository: Repository) -> None:
        repository.ready()
        self._reader = repository.reader
        self._lock = threading.Lock()
        self._volumes: dict[str, OrderedDict[str, SnapshotRecord]] = {}
        for record in repository.snapshots():
            folder = self._volumes.setdefault(folder_of(record.volume), OrderedDict())
            folder[name_of(record)] = record
        self._trees: OrderedDict[str, TreeReader] = OrderedDict()
        self._open: dict[int, Content] = {}
        self._numbers = iter(range(1, 1 << 62))

    # ---- where a path leads

    def _parts(self, path: str) -> tuple[str, str, bytes]:
        """Volume, snapshot and the path below it; empty where the path is shorter."""
        volume, _, rest = path.strip("/").partition("/")
        snapshot, _, inner = rest.partition("/")
        return volume, snapshot, os.fsencode(inner)

    def _snapshot(self, volume: str, snapshot: str) -> SnapshotRecord:
        try:
            return self._volumes[volume][snapshot]
        except KeyError:
            raise mfusepy.FuseOSError(errno.ENOENT) from None

    def _entry(self, path: str) -> Entry:
        volume, snapshot, inner = self._parts(path)
        record = self._snapshot(volume, snapshot)
        tree = self._trees.get(record.id)
        if tree is None:
            tree = self._trees[record.id] = TreeReader(self._reader, record)
            while len(self._trees) > _KEPT:
                self._trees.popitem(last=False)
        try:
            return tree.lookup(inner)
        except PathNotFound:
            raise mfusepy.FuseOSError(errno.ENOENT) from None
        except LazaretteError:
            raise mfusepy.FuseOSError(errno.EIO) from None

    # ---- operations

    def getattr(self, path: str, fh: int | None = None) -> Attributes:
        """``stat``."""
        volume, snapshot, _ = self._parts(path)
        if not volume:
            return _folder(2 + len(self._volumes))
        if not snapshot:
            if volume not in self._volumes:
                raise mfusepy.FuseOSError(errno.ENOENT)
            return _folder(2 + len(self._volumes[volume]))
        if snapshot == LATEST and path.count("/") == 2:
            newest = self._newest(volume)
            return {
                "st_mode": stat.S_IFLNK | 0o777,
                "st_nlink": 1,
                "st_size": len(newest),
                "st_ino": 1,
            }
        with self._lock:
            return _attributes(self._entry(path))

    def readdir(self, path: str, fh: int) -> Iterator[tuple[str, Attributes, int]]:
        """The names of a folder, with their attributes."""
        volume, snapshot, _ = self._parts(path)
        yield ".", _folder(2), 0
        yield "..", _folder(2), 0
        if not volume:
            for name in self._volumes:
                yield name, _folder(2), 0
        elif not snapshot:
            for name in self._volumes.get(volume, ()):
                yield name, _folder(2), 0
            yield LATEST, {"st_mode": stat.S_IFLNK | 0o777, "st_ino": 1}, 0
        else:
            with self._lock:
                found = self._listing(path)
            for entry in found:
                yield os.fsdecode(entry.name), _attributes(entry), 0

    def _listing(self, path: str) -> list[Entry]:
        record = self._snapshot(*self._parts(path)[:2])
        try:
            return self._trees[record.id].listing(self._entry(path))
        except KeyError:
            self._entry(path)
            return self._trees[record.id].listing(self._entry(path))
        except LazaretteError:
            raise mfusepy.FuseOSError(errno.EIO) from None

    def readlink(self, path: str) -> str:
        """Where a symlink leads."""
        volume, snapshot, _ = self._parts(path)
        if snapshot == LATEST and path.count("/") == 2:
            return self._newest(volume)
        with self._lock:
            return os.fsdecode(self._entry(path).content)

    def _newest(self, volume: str) -> str:
        if not self._volumes.get(volume):
            raise mfusepy.FuseOSError(errno.ENOENT)
        return next(reversed(self._volumes[volume]))

    def open(self, path: str, flags: int) -> int:
        """A handle on a file's content."""
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise mfusepy.FuseOSError(errno.EROFS)
        with self._lock:
            entry = self._entry(path)
            if entry.kind != Kind.FILE:
                raise mfusepy.FuseOSError(errno.EISDIR)
            number = next(self._numbers)
            self._open[number] = Content(self._reader, entry)
            return number

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Bytes of an open file, each chunk checked against its id."""
        with self._lock:
            try:
                return self._open[fh].read(offset, size)
            except LazaretteError:
                raise mfusepy.FuseOSError(errno.EIO) from None

    def release(self, path: str, fh: int) -> int:
        """Close a handle."""
        self._open.pop(fh, None)
        return 0

    def listxattr(self, path: str) -> list[str]:
        """Names of the extended attributes."""
        if not self._parts(path)[1] or self._parts(path)[1] == LATEST:
            return []
        with self._lock:
            extra = self._entry(path).extra
        return [os.fsdecode(name) for name in extra.xattrs] if extra else []

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        """The value of an extended attribute."""
        if not self._parts(path)[1] or self._parts(path)[1] == LATEST:
            raise mfusepy.FuseOSError(errno.ENODATA)
        with self._lock:
            extra = self._entry(path).extra
        value = extra.xattrs.get(os.fsencode(name)) if extra else None
        if value is None:
            raise mfusepy.FuseOSError(errno.ENODATA)
        return value

    def statfs(self, path: str) -> dict[str, int]:
        """A read-only filesystem without room."""
        return {"f_bsize": 4096, "f_frsize": 4096, "f_namemax": 255}


def _folder(links: int) -> Attributes:
    # readers of directories pass over entries with the inode number 0
    return {"st_mode": _DIRECTORY, "st_nlink": links, "st_ino": 1}


def _attributes(entry: Entry) -> Attributes:
    extra = entry.extra
    kind = Kind(entry.kind)
    size = len(entry.content) if kind is Kind.SYMLINK else entry.size
    return {
        "st_mode": kind.file_type | entry.mode,
        "st_nlink": extra.links if extra else 1,
        "st_uid": entry.uid,
        "st_gid": entry.gid,
        "st_size": size,
        "st_blocks": (size + 511) // 512,
        "st_rdev": extra.device if extra else 0,
        "st_ino": entry.inode,
        "st_mtime": entry.mtime,
        "st_ctime": entry.ctime_ns,
        "st_atime": entry.mtime,
    }


def serve(repository: Repository, mountpoint: str) -> None:
    """Mount and serve until it is unmounted (``fusermount3 -u`` or umount(8)), or Ctrl-C."""
    mfusepy.FUSE(
        BrowseFilesystem(repository),
        mountpoint,
        foreground=True,
        ro=True,
        fsname="lazarette",
        use_ino=True,
        default_permissions=True,
    )

"""A snapshot, or part of one, as a tar stream (POSIX.1-2001, with extended attributes)."""

from __future__ import annotations

import io
import os
import tarfile
from typing import IO

from lazarette.backup.repository.entries import Entry, Kind
from lazarette.backup.repository.guard import Kind as LeaseKind
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.tree import Content, TreeReader

_TYPES = {
    Kind.FILE: tarfile.REGTYPE,
    Kind.DIRECTORY: tarfile.DIRTYPE,
    Kind.SYMLINK: tarfile.SYMTYPE,
    Kind.FIFO: tarfile.FIFOTYPE,
    Kind.CHARACTER: tarfile.CHRTYPE,
    Kind.BLOCK: tarfile.BLKTYPE,
}
_READ = 1 << 20


def write(
    repo: Repository, snapshot: SnapshotRecord, out: IO[bytes], path: bytes = b""
) -> list[bytes]:
    """Write a snapshot's tree to a stream, which need not be seekable.

    Args:
        repo: where from.
        snapshot: which.
        out: where to.
        path: only what is at and beneath it.

    Returns:
        Paths left out: sockets, which tar cannot hold.

    Raises:
        RepositoryDamaged: something is lost; the stream is not ended then.
        PathNotFound: the snapshot has nothing at ``path``.
    """
    left_out = []
    links: dict[tuple[int, int], str] = {}
    with repo.guard.hold(LeaseKind.READ, f"tar of {snapshot.id[:12]}"):
        repo.refresh()
        tree = TreeReader(repo.reader, snapshot)
        with tarfile.open(
            fileobj=out,
            mode="w|",
            format=tarfile.PAX_FORMAT,
            encoding="utf-8",
            errors="surrogateescape",
        ) as archive:
            for where, entry in tree.walk(path):
                if entry.kind == Kind.SOCKET:
                    left_out.append(where)
                    continue
                info = _info(where, entry, links)
                content = None
                if info.type == tarfile.REGTYPE:
                    content = io.BufferedReader(_Stream(tree.content(entry)), _READ)
                archive.addfile(info, content)
    return left_out


def _info(path: bytes, entry: Entry, links: dict[tuple[int, int], str]) -> tarfile.TarInfo:
    name = os.fsdecode(path) or "."
    info = tarfile.TarInfo(name)
    info.type = _TYPES[Kind(entry.kind)]
    info.mode, info.uid, info.gid = entry.mode, entry.uid, entry.gid
    seconds, nanoseconds = divmod(entry.mtime, 1_000_000_000)
    info.mtime = seconds
    info.pax_headers = {"mtime": f"{seconds}.{nanoseconds:09d}"} if seconds >= 0 else {}
    extra = entry.extra
    if extra is not None and extra.links > 1:
        first = links.setdefault((extra.filesystem, entry.inode), name)
        if first != name:
            info.type = tarfile.LNKTYPE
            info.linkname = first
            return info
    if entry.kind == Kind.FILE:
        info.size = entry.size
    elif entry.kind == Kind.SYMLINK:
        info.linkname = os.fsdecode(entry.content)
    if extra is not None:
        info.devmajor, info.devminor = os.major(extra.device), os.minor(extra.device)
        for key, value in extra.xattrs.items():
            header = "SCHILY.xattr." + os.fsdecode(key)
            info.pax_headers[header] = value.decode("utf-8", "surrogateescape")
    return info


class _Stream(io.RawIOBase):
    def __init__(self, content: Content) -> None:
        self._content = content
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """See :class:`io.RawIOBase`."""
        data = self._content.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

"""Trees of every kind of inode, and their description for comparing two of them."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_WINDOW = 64 << 10


@dataclass(frozen=True)
class Node:
    """All that matters of an inode; times in nanoseconds."""

    kind: int
    mode: int
    owner: tuple[int, int]
    mtime: int
    size: int
    content: str
    device: int
    xattrs: tuple[tuple[str, bytes], ...]
    group: tuple[bytes, ...]


def describe(root: Path, times: bool = True) -> dict[bytes, Node]:
    """Every path below a folder, itself included as ``b""``, and what is there."""
    found: dict[bytes, tuple[os.stat_result, str, tuple[tuple[str, bytes], ...]]] = {}
    groups: dict[tuple[int, int], list[bytes]] = {}
    for path, directory, name in _walk(os.fsencode(root)):
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        place = b"/proc/self/fd/%d/%s" % (directory, name)
        content = ""
        if stat.S_ISREG(status.st_mode):
            content = _digest(name, directory)
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(name, dir_fd=directory).hex()
        found[path] = (status, content, _xattrs(place))
        if not stat.S_ISDIR(status.st_mode):
            groups.setdefault((status.st_dev, status.st_ino), []).append(path)
    return {
        path: Node(
            stat.S_IFMT(status.st_mode),
            stat.S_IMODE(status.st_mode),
            (status.st_uid, status.st_gid),
            status.st_mtime_ns if times else 0,
            status.st_size if stat.S_ISREG(status.st_mode) else 0,
            content,
            status.st_rdev,
            xattrs,
            tuple(sorted(groups.get((status.st_dev, status.st_ino), ()))),
        )
        for path, (status, content, xattrs) in found.items()
    }


def _xattrs(place: bytes) -> tuple[tuple[str, bytes], ...]:
    return tuple(
        sorted(
            (name, os.getxattr(place, name, follow_symlinks=False))
            for name in os.listxattr(place, follow_symlinks=False)
        )
    )


def _digest(name: bytes, directory: int) -> str:
    digest = hashlib.sha256()
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    try:
        size = os.fstat(descriptor).st_size
        at = 0
        while at < size:
            try:
                data_at = os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError:
                break
            at = data_at // _WINDOW * _WINDOW
            data = os.pread(descriptor, _WINDOW, at)
            if data.strip(b"\0"):
                digest.update(b"%d:" % at + data)
            at += _WINDOW
        digest.update(b"%d" % size)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _walk(root: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield b"", top, b"."
        yield from _walk_open(top, b"")
    finally:
        os.close(top)


def _walk_open(directory: int, path: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    with os.scandir(directory) as listing:
        names = sorted(os.fsencode(item.name) for item in listing)
    for name in names:
        whole = path + b"/" + name if path else name
        yield whole, directory, name
        if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            try:
                yield from _walk_open(below, whole)
            finally:
                os.close(below)


@contextmanager
def bound_socket(path: Path) -> Iterator[None]:
    """A unix socket bound at a path."""
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
        yield


def every_kind(root: Path) -> None:
    """Fill a folder with an inode of each kind and odd metadata; needs root."""
    (root / "plain.txt").write_bytes(b"plain\n" * 10)
    (root / "empty").write_bytes(b"")
    (root / "large.bin").write_bytes(os.urandom(3 << 20) + b"text " * 200_000)
    (root / "pages.db").write_bytes(os.urandom(8192) * 100 + os.urandom(4096))
    (root / "dir").mkdir(mode=0o750)
    (root / "dir" / "setuid").write_bytes(b"#!")
    os.chown(root / "dir" / "setuid", 1000, 1001)
    os.chmod(root / "dir" / "setuid", 0o6755)
    os.link(root / "plain.txt", root / "dir" / "linked")
    os.symlink("../plain.txt", root / "dir" / "link")
    os.symlink(b"nowhere/\xff\xfe", os.fsencode(root) + b"/dangling")
    os.link(root / "dangling", root / "dangling2", follow_symlinks=False)
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "loop", stat.S_IFBLK | 0o660, os.makedev(7, 99))
    os.mknod(root / "whiteout", stat.S_IFCHR, 0)
    os.mknod(root / "socket", stat.S_IFSOCK | 0o755)
    with open(root / "sparse", "wb") as file:
        file.truncate(50 << 20)
        file.seek(20 << 20)
        file.write(b"island" * 1000)
    os.setxattr(root / "plain.txt", "user.note", b"\0\xffbinary")
    os.setxattr(root / "dir", "trusted.overlay.opaque", b"y")
    os.utime(root / "empty", ns=(0, -1))
    os.utime(root / "plain.txt", ns=(0, 10_413_792_000_123_456_789))
    (root / "shut").mkdir()
    (root / "shut" / "f").write_bytes(b"f")
    os.chmod(root / "shut", 0o555)
    os.utime(root / "shut", ns=(0, 1_000_000_000_000_000_001))
    os.chown(root, 999, 999)
    os.chmod(root, 0o700)
    os.utime(root, ns=(0, 1_234_567_890_123_456_789))

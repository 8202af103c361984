"""A folder treated as the root of a filesystem: nothing named within it can lead out.

Contexts, root filesystems of stages and folders written to are all read and changed
through this.  Paths are bytes, with or without a leading slash; the kernel resolves
symlinks and ``..`` inside the root (``RESOLVE_IN_ROOT``), free of races.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazarette.runtime.builds.errors import ContextError
from lazarette.storage import beneath

MAX_LINKS = 40


class Tree:
    """An opened root.

    Args:
        root: the folder; must exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def open(self, path: bytes, flags: int) -> int:
        """Open an existing path, links followed inside the root."""
        return beneath.resolve(self.fd, path, flags | os.O_CLOEXEC)

    def status(self, path: bytes, *, follow: bool = False) -> os.stat_result | None:
        """What is at a path, or None.

        Args:
            path: where.
            follow: look at what a link points to.
        """
        flags = os.O_PATH if follow else os.O_PATH | os.O_NOFOLLOW
        try:
            found = self.open(path, flags)
        except OSError as refused:
            if refused.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise
        try:
            return os.fstat(found)
        finally:
            os.close(found)

    def is_folder(self, path: bytes) -> bool:
        """Whether there is a folder at a path, links followed."""
        status = self.status(path, follow=True)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def real(self, path: bytes) -> bytes:
        """The path without links and ``..``, no leading slash; ``b""`` for the root.

        Raises:
            FileNotFoundError: nothing is there.
        """
        found = self.open(path, os.O_PATH)
        try:
            shown = os.readlink(b"/proc/self/fd/%d" % found)
        finally:
            os.close(found)
        top = os.readlink(b"/proc/self/fd/%d" % self.fd)
        if shown == top:
            return b""
        prefix = top.rstrip(b"/") + b"/"
        if not shown.startswith(prefix):
            raise ContextError(f"{os.fsdecode(path)} is not within the folder")
        return shown[len(prefix) :]

    @contextmanager
    def folder(self, path: bytes) -> Iterator[int]:
        """A descriptor of a folder for the length of the block."""
        found = self.open(path or b".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield found
        finally:
            os.close(found)

    @contextmanager
    def parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """The folder of a path and the last name in it: ``(descriptor, name)``.

        Raises:
            ContextError: the path has no last name.
        """
        above, name = os.path.split(path.rstrip(b"/"))
        if name in (b"", b".", b".."):
            raise ContextError(f"{os.fsdecode(path)} names no file")
        with self.folder(above) as found:
            yield found, name

    def names(self, path: bytes) -> list[bytes]:
        """Names in a folder, sorted."""
        with self.folder(path) as found:
            return sorted(os.fsencode(name) for name in os.listdir(found))

    def read(self, path: bytes, limit: int) -> bytes:
        """A small regular file.

        Raises:
            FileNotFoundError: nothing is there.
            ContextError: not a regular file, or too large.
        """
        found = self.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        with open(found, "rb") as file:
            status = os.fstat(found)
            if not stat.S_ISREG(status.st_mode):
                raise ContextError(f"{os.fsdecode(path)} is not a regular file")
            if status.st_size > limit:
                raise ContextError(f"{os.fsdecode(path)} is larger than {limit} bytes")
            return file.read(limit)

    def make_folders(
        self, path: bytes, mode: int = 0o755, owner: tuple[int, int] = (0, 0)
    ) -> list[bytes]:
        """Make a folder and what is missing above it; existing ones stay as they are.

        Args:
            path: where; links on the way are followed inside the root, dangling ones too.
            mode: permission bits of new folders.
            owner: uid and gid of new folders.

        Returns:
            Real paths of the folders made, outermost first.

        Raises:
            NotADirectoryError: something else is in the way.
        """
        made: list[bytes] = []
        links = 0
        todo = [part for part in path.split(b"/") if part not in (b"", b".")][::-1]
        at = b""
        while todo:
            part = todo.pop()
            if part == b"..":
                at = os.path.dirname(at)
                continue
            own = at + b"/" + part if at else part
            status = self.status(own)
            if status is None:
                with self.folder(at) as above:
                    os.mkdir(part, mode, dir_fd=above)
                    os.chmod(part, mode, dir_fd=above)
                    os.chown(part, *owner, dir_fd=above, follow_symlinks=False)
                made.append(own)
            elif stat.S_ISLNK(status.st_mode):
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fsdecode(path))
                with self.parent(own) as (above, name):
                    target = os.readlink(name, dir_fd=above)
                if target.startswith(b"/"):
                    at = b""
                todo += [p for p in target.split(b"/") if p not in (b"", b".")][::-1]
                continue
            elif not stat.S_ISDIR(status.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", os.fsdecode(own))
            at = own
        return made

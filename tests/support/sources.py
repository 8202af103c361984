"""A source of lazy trees that is a folder, and fails or kills its server when a file says so."""

from __future__ import annotations

import errno
import os
import signal
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from lazarette.fuse.source import SourceEntry, Totals


class FolderSource:
    """Ids are paths.

    Switches: calls fail while ``broken`` exists, and kill while ``deadly`` does; what is read is
    added to ``log`` if there is one.
    """

    def __init__(self, folder: str, switches: str, block_size: int = 65536) -> None:
        self._folder = os.fsencode(folder)
        self._switches = Path(switches)
        self._block_size = block_size

    @property
    def block_size(self) -> int:
        return self._block_size

    def gate(self) -> None:
        if (self._switches / "slow").exists():
            time.sleep(0.005)
        if (self._switches / "deadly").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if (self._switches / "broken").exists():
            raise OSError(errno.EHOSTUNREACH, "the source is broken")

    def _entry(self, path: bytes, name: bytes) -> SourceEntry:
        st = os.lstat(path)
        several = st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode)
        return SourceEntry(
            name=name,
            id=b"%d" % st.st_ino if several else os.path.relpath(path, self._folder),
            mode=st.st_mode,
            uid=st.st_uid,
            gid=st.st_gid,
            size=st.st_size if stat.S_ISREG(st.st_mode) else 0,
            mtime_ns=st.st_mtime_ns,
            rdev=st.st_rdev,
            target=os.readlink(path) if stat.S_ISLNK(st.st_mode) else b"",
            links=st.st_nlink if several else 1,
            xattrs={
                os.fsencode(each): os.getxattr(path, each, follow_symlinks=False)
                for each in os.listxattr(path, follow_symlinks=False)
            },
        )

    def root(self) -> SourceEntry:
        return self._entry(self._folder, b"")

    def entries(self, folder: bytes) -> Iterable[SourceEntry]:
        self.gate()
        path = os.path.join(self._folder, folder)
        return [self._entry(os.path.join(path, name), name) for name in sorted(os.listdir(path))]

    def _path(self, file: bytes) -> bytes:
        if not file.isdigit():
            return os.path.join(self._folder, file)
        for root, _, names in os.walk(self._folder):
            for name in names:
                path = os.path.join(root, name)
                if os.lstat(path).st_ino == int(file):
                    return path
        raise OSError(errno.ENOENT, "no such id")

    def read(self, file: bytes, offset: int, length: int) -> bytes:
        self.gate()
        if (self._switches / "log").exists():
            with open(self._switches / "log", "ab") as log:
                log.write(file + b"\n")
        with open(self._path(file), "rb") as stream:
            stream.seek(offset)
            return stream.read(length)

    def totals(self) -> Totals:
        files = size = 0
        for root, _, names in os.walk(self._folder):
            for name in names:
                st = os.lstat(os.path.join(root, name))
                files += stat.S_ISREG(st.st_mode)
                size += st.st_size if stat.S_ISREG(st.st_mode) else 0
        return Totals(files, size)


def folder_source(folder: str, switches: str) -> FolderSource:
    source = FolderSource(folder, switches)
    source.gate()
    if (Path(switches) / "counted").exists():
        with open(Path(switches) / "opened", "ab") as log:
            log.write(b"1")
    return source

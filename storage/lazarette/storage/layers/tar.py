"""Writing trees as tar: PAX headers, so that every name, time, owner and xattr fits.

Format: POSIX.1-2001 (pax); xattrs as ``SCHILY.xattr.NAME`` records, as every engine reads
and writes them.  Names and xattr values are raw bytes in the records; where they are not
UTF-8 the standard's ``hdrcharset=BINARY`` says so.  Holes are kept as ``GNU.sparse`` 1.0
would need a reader that knows it, so a hole is written as zeros (they compress to nothing)
and found again by the reader.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from lazarette.storage import copying
from lazarette.storage.idmaps import IdMap

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_BLOCK = 1 << 20
XATTR = "SCHILY.xattr."

KINDS = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def text(name: bytes) -> str:
    """Bytes as the text that tarfile takes for them."""
    return name.decode("utf-8", "surrogateescape")


def raw(name: str) -> bytes:
    """The bytes behind a text of tarfile."""
    return name.encode("utf-8", "surrogateescape")


class TreeWriter:
    """Writes entries of a tree into a tar stream.

    Args:
        out: where to.
        idmap: the tree is seen with the host's owners; the archive gets the container's.
    """

    def __init__(self, out: BinaryIO, idmap: IdMap | None = None) -> None:
        self._idmap = idmap
        # not tarfile's own stream mode: its object writes from __del__ when a reader left
        self._tar = tarfile.TarFile(
            fileobj=_Counted(out),
            mode="w",
            format=tarfile.PAX_FORMAT,
            encoding="utf-8",
            errors="surrogateescape",
        )
        self._linked: dict[tuple[int, int], str] = {}

    def entry(
        self,
        path: bytes,
        parent: int,
        name: bytes,
        status: os.stat_result,
        content: Callable[[], int] | None = None,
    ) -> None:
        """Add one entry; sockets are left out, as tar has no word for them.

        Args:
            path: its path in the archive.
            parent: descriptor of its folder.
            name: its name there.
            status: its ``lstat``.
            content: opens its content where it is not what ``parent`` and ``name`` say.
        """
        kind = KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            return
        records: dict[str, str] = {}
        info = tarfile.TarInfo(text(path))
        info.pax_headers = records
        info.type = kind
        info.mode = stat.S_IMODE(status.st_mode)
        info.uid, info.gid = status.st_uid, status.st_gid
        if self._idmap is not None:
            info.uid, info.gid = self._idmap.from_host(info.uid, info.gid)
        seconds, fraction = divmod(status.st_mtime_ns, 1_000_000_000)
        info.mtime = seconds
        if fraction or seconds < 0:
            records["mtime"] = _decimal(seconds, fraction)
        if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
        if kind == tarfile.SYMTYPE:
            info.linkname = text(os.readlink(name, dir_fd=parent))
        if kind != tarfile.DIRTYPE and status.st_nlink > 1:
            first = self._linked.setdefault((status.st_dev, status.st_ino), info.name)
            if first != info.name:
                info.type, info.linkname = tarfile.LNKTYPE, first
                self._tar.addfile(info)
                return
        for key, value in copying.read_xattrs(parent, name).items():
            told = value if self._idmap is None else self._idmap.xattr_from_host(key, value)
            records[XATTR + key] = text(told)
        if kind != tarfile.REGTYPE:
            self._tar.addfile(info)
            return
        source = (
            content()
            if content is not None
            else os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        )
        with open(source, "rb", buffering=0) as file:
            info.size = status.st_size
            self._tar.addfile(info, _Exactly(file, status.st_size))

    def empty(self, path: bytes) -> None:
        """Add an empty file, as whiteouts are."""
        info = tarfile.TarInfo(text(path))
        info.mode = 0
        self._tar.addfile(info)

    def close(self) -> None:
        """Write the end of the archive."""
        self._tar.close()


def _decimal(seconds: int, fraction: int) -> str:
    """A pax time; negative ones count down from the next second."""
    if seconds >= 0:
        return f"{seconds}.{fraction:09d}"
    total = -(seconds * 1_000_000_000 + fraction)
    return f"-{total // 1_000_000_000}.{total % 1_000_000_000:09d}"


def parse_time(decimal: str) -> int:
    """Nanoseconds of a pax time, exactly."""
    sign = -1 if decimal.startswith("-") else 1
    whole, _, part = decimal.lstrip("-").partition(".")
    return sign * (int(whole or 0) * 1_000_000_000 + int(part[:9].ljust(9, "0")))


class _Counted(io.RawIOBase):
    """A stream that cannot seek but knows how much went through it."""

    def __init__(self, out: BinaryIO) -> None:
        super().__init__()
        self._out = out
        self._written = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: ReadableBuffer) -> int:
        view = memoryview(data)
        self._out.write(view)
        self._written += view.nbytes
        return view.nbytes


class _Exactly(io.RawIOBase):
    """A file read as if it had the size its header says: cut, or filled up with zeros."""

    def __init__(self, file: io.RawIOBase | io.FileIO, size: int) -> None:
        self._file = file
        self._left = size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        got = bytearray()
        while len(got) < wanted:
            block = self._file.read(wanted - len(got))
            if not block:
                got += bytes(wanted - len(got))
                break
            got += block
        self._left -= wanted
        return bytes(got)


@contextmanager
def streamed(produce: Callable[[BinaryIO], None]) -> Iterator[BinaryIO]:
    """The output of a writer as a readable stream; leaving early stops the writer.

    A fault of the writer is raised at the end of the block, after the reader saw a short
    stream.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with open(writing, "wb", buffering=_BLOCK) as out:
                produce(out)
        except BrokenPipeError:
            return
        except BaseException as failed:  # noqa: BLE001 - raised again on the reader's side
            failures.append(failed)

    worker = threading.Thread(target=work, name="tar writer", daemon=True)
    worker.start()
    try:
        with open(reading, "rb", buffering=_BLOCK) as stream:
            yield stream
    finally:
        worker.join()
    if failures:
        raise failures[0]

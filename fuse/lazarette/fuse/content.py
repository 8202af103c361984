"""Content that is still being fetched: blocks on demand, each exactly once.

An incomplete file carries the xattr ``trusted.overlay.lazarette.content``: see
:class:`Mark`.  When the last block is here and synced, the xattr and the presence map go,
and the file is an ordinary one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lazarette.fuse import layers, syscalls
from lazarette.fuse.layers import Format
from lazarette.fuse.presence import PresenceMap, boot_id
from lazarette.fuse.source import Source

log = logging.getLogger(__name__)

_MARK = struct.Struct("=QQ?")
_MOST_AT_ONCE = 4 << 20
_KEPT_AT_ONCE = 256 << 10
"""Bytes that are written without a pause for those who wait for the file to be still."""
SPAN = 16 << 20
"""Bytes of a file that one filler brings: long enough for long requests to the store."""
_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 1.0
_AROUND = 1 << 20
# The kernel asks once more for pages that could not be read ahead.
_TWICE = 1.0
_PUNCH = syscalls.FALLOC_PUNCH_HOLE | syscalls.FALLOC_KEEP_SIZE
_FULL = (errno.ENOSPC, errno.EDQUOT)


def content_xattr(form: Format) -> bytes:
    """Name of the xattr that marks an incomplete file."""
    return form.prefix + b"lazarette.content"


@dataclass(frozen=True, slots=True)
class Mark:
    """Value of the xattr of an incomplete file.

    Attributes:
        identity: the source's id of the content.
        size: bytes in the source.
        limit: from here on nothing is fetched any more: the file was cut off here once.
        cutting: a truncation to ``limit`` has begun and must be done before anything else.
    """

    identity: bytes
    size: int
    limit: int
    cutting: bool = False

    def pack(self) -> bytes:
        """As stored."""
        return _MARK.pack(self.size, self.limit, self.cutting) + self.identity

    @staticmethod
    def parse(value: bytes) -> Mark:
        """The reverse of :meth:`pack`."""
        size, limit, cutting = _MARK.unpack_from(value)
        return Mark(value[_MARK.size :], size, limit, cutting)


def with_retry(deadline: float, call: Callable[[], bytes], stopping: threading.Event) -> bytes:
    """Repeat a call of the source until it succeeds or ``deadline`` seconds have gone (0: once).

    Args:
        deadline: seconds.
        call: of the source.
        stopping: set when nobody waits for it any more.

    Raises:
        OSError: EIO, after the deadline or once ``stopping`` is set.
    """
    end = time.monotonic() + deadline
    pause = _FIRST_PAUSE
    while True:
        try:
            return call()
        except OSError as error:
            if time.monotonic() + pause > end or stopping.wait(pause):
                if deadline:
                    log.warning("giving up on the source: %s", error)
                raise OSError(errno.EIO, "the source does not answer") from error
            pause = min(2 * pause, _LONGEST_PAUSE)


class Content:
    """One incomplete file; all methods may be called from any thread.

    Args:
        registry: that it belongs to.
        fd: the local file, open for reading and writing; closed with the content.
        key: device and inode number of the local file.
        mark: what the file's xattr says.
    """

    def __init__(self, registry: Contents, fd: int, key: tuple[int, int], mark: Mark) -> None:
        self._registry = registry
        self._fd = fd
        self._key = key
        self._mark = mark
        self._block = registry.source.block_size
        blocks = (mark.size + self._block - 1) // self._block
        name = b"%x.%x" % key
        self._map = PresenceMap(
            registry.maps, name, mark.identity, blocks, self._block, registry.boot
        )
        self._busy: set[int] = set()
        self._changed = threading.Condition()
        self._lost = -1, 0.0
        self.users = 0
        self.finished = False
        if mark.cutting:
            self._cut()

    @property
    def _blocks(self) -> int:
        """Blocks that are fetched at all."""
        return (self._mark.limit + self._block - 1) // self._block

    def _span(self, offset: int, length: int) -> range:
        first = offset // self._block
        last = (offset + length + self._block - 1) // self._block
        return range(min(first, self._blocks), min(last, self._blocks))

    def has(self, offset: int, length: int) -> bool:
        """Whether a range is here."""
        present = self._map
        return all(block in present for block in self._span(offset, length))

    def ensure(self, offset: int, length: int, deadline: float | None = None) -> None:
        """Bring a range here.

        Args:
            offset, length: of the range.
            deadline: seconds, if other than usual; 0 asks the source once.

        Raises:
            OSError: EIO when the source does not answer before the deadline.
        """
        patience = self._registry.deadline if deadline is None else deadline
        while True:
            with self._changed:
                span = self._span(offset, length)  # a truncation may shorten it meanwhile
                missing = [block for block in span if block not in self._map]
                if not missing:
                    break
                mine = [block for block in missing if block not in self._busy]
                if not mine:
                    self._changed.wait()
                    continue
                self._busy.update(mine)
            try:
                for first, count in _runs(mine, max(1, _MOST_AT_ONCE // self._block)):
                    self._fetch(first, count, patience)
            finally:
                with self._changed:
                    self._busy.difference_update(mine)
                    self._changed.notify_all()
        self._finish_if_whole()

    def read(self, offset: int, length: int) -> bytes:
        """Read, bringing here first the range and, if that goes well, what is around it.

        A source gives that much for the price of a block.  A full disk is no reason to fail: what
        there is no room for is given without being kept.

        Raises:
            OSError: EIO when the source does not answer before the deadline.
        """
        lost, when = self._lost
        if lost == offset and time.monotonic() < when + _TWICE:
            raise OSError(errno.EIO, "the source does not answer")
        try:
            self._bring(offset, length)
        except OSError as error:
            if error.errno in _FULL:
                return self._read_past(offset, length)
            self._lost = offset, time.monotonic()
            raise
        return os.pread(self._fd, length, offset)

    def _bring(self, offset: int, length: int) -> None:
        start = offset // _AROUND * _AROUND
        end = -(-(offset + length) // _AROUND) * _AROUND
        until = time.monotonic() + self._registry.deadline
        try:
            self.ensure(start, end - start, 0)
        except OSError:
            left = until - time.monotonic()
            if left <= 0:
                raise
            self.ensure(offset, length, left)

    def _read_past(self, offset: int, length: int) -> bytes:
        """Read block by block; the source's bytes of those that are not here."""
        pieces = []
        end = min(offset + length, os.fstat(self._fd).st_size)
        while offset < end:
            block = offset // self._block
            stop = min(end, (block + 1) * self._block)
            pieces.append(self._part(block, offset, stop - offset))
            offset = stop
        return b"".join(pieces)

    def _part(self, block: int, offset: int, length: int) -> bytes:
        data = b""
        if not self.has(offset, length):
            start, data = self._of_source(block, 1, self._registry.deadline)
            data = data[offset - start : offset - start + length]
        with self._changed:  # nobody writes or cuts meanwhile
            here = self.has(offset, length)
            local = os.pread(self._fd, length, offset)
        # The source has nothing past the limit: there the local file is all there is.
        return local if here else data + local[len(data) :]

    def _of_source(self, first: int, count: int, deadline: float) -> tuple[int, bytes]:
        """Where blocks begin, and the source's bytes of them; none when they are cut off."""
        start = first * self._block
        length = min(count * self._block, self._mark.limit - start)
        if length <= 0:
            return start, b""
        registry = self._registry
        data = with_retry(
            deadline,
            lambda: registry.source.read(self._mark.identity, start, length),
            registry.stopping,
        )
        if len(data) != length:
            raise OSError(errno.EIO, "the source gave a wrong length")
        return start, data

    def _fetch(self, first: int, count: int, deadline: float) -> None:
        start, data = self._of_source(first, count, deadline)
        few = max(1, _KEPT_AT_ONCE // self._block)
        for block in range(first, first + count, few):
            at = (block - first) * self._block
            self._keep(block, min(few, first + count - block), start + at, data[at:])

    def _keep(self, first: int, count: int, start: int, data: bytes) -> None:
        """Write blocks that came; ``data`` may be longer, or end where the file is cut off."""
        data = data[: count * self._block]
        if not data:
            return
        with self._changed:
            before = os.fstat(self._fd)
            _write_sparse(self._fd, data, start)
            os.utime(self._fd, ns=(before.st_atime_ns, before.st_mtime_ns))
            self._map.add(first, count)

    def write(self, data: bytes, offset: int) -> int:
        """Write locally; parts of blocks are fetched first, whole ones need not be."""
        end = offset + len(data)
        first_whole = (offset + self._block - 1) // self._block
        for edge in (offset, max(end - 1, offset)):
            if edge < self._mark.limit and not self._covered(edge // self._block, offset, end):
                self.ensure(edge, 1)
        whole = [
            block
            for block in range(first_whole, min(self._blocks, end // self._block + 1))
            if self._covered(block, offset, end)
        ]
        self._claim(whole)
        try:
            with self._changed:
                done = self._counting(os.pwrite(self._fd, data, offset), data, offset)
                for block in whole:
                    if self._covered(block, offset, offset + done):
                        self._map.add(block, 1)
        finally:
            with self._changed:
                self._busy.difference_update(whole)
                self._changed.notify_all()
        self._finish_if_whole()
        return done

    def _counting(self, done: int, data: bytes, offset: int) -> int:
        """How much of a write counts: where a full disk cut it short, only whole blocks do.

        A part of a block that is not here would give way to the source's bytes later.

        Raises:
            OSError: ENOSPC when that is nothing.
        """
        end = offset + done
        block, part = divmod(end, self._block)
        if done == len(data) or not part or end >= self._mark.limit or block in self._map:
            return done
        start = end - part
        with contextlib.suppress(OSError):
            syscalls.fallocate(self._fd, _PUNCH, start, part)
        if start <= offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return start - offset

    def _covered(self, block: int, start: int, end: int) -> bool:
        """Whether a range covers all a block has of the source."""
        low = block * self._block
        return start <= low and end >= min(low + self._block, self._mark.limit)

    def _claim(self, blocks: list[int]) -> None:
        """Wait until nobody fetches these blocks, and keep others from it."""
        with self._changed:
            while not self._busy.isdisjoint(blocks):
                self._changed.wait()
            self._busy.update(blocks)

    def truncate(self, size: int) -> None:
        """Set the size; what is cut off is never fetched again, whatever dies meanwhile."""
        if size >= self._mark.limit:
            with self._changed:
                os.ftruncate(self._fd, size)
            return
        if size % self._block:
            self.ensure(size, 1)
        rest = list(range(size // self._block, self._blocks))
        self._claim(rest)
        try:
            self._store(replace(self._mark, limit=size, cutting=True))
            self._cut()
        finally:
            with self._changed:
                self._busy.difference_update(rest)
                self._changed.notify_all()
        self._finish_if_whole()

    def _cut(self) -> None:
        """Do the truncation that the mark announces, and take the announcement back."""
        with self._changed:
            os.ftruncate(self._fd, self._mark.limit)
        self._store(replace(self._mark, cutting=False))

    def _store(self, mark: Mark) -> None:
        if not self.finished:
            path = layers.descriptor_path(self._fd)
            os.setxattr(path, self._registry.attribute, mark.pack())
        self._mark = mark

    def sync(self, data_only: bool) -> None:
        """fsync(2): the data, then the knowledge that it is here."""
        with self._changed:
            bits = self._map.snapshot()
        if data_only:
            os.fdatasync(self._fd)
        else:
            os.fsync(self._fd)
        with self._changed:
            if not self.finished and self._map.unsafe:
                self._map.settle(bits)

    def fetch_all(self) -> None:
        """Bring everything here."""
        for start in self.spans():
            self.fill(start)

    def spans(self) -> Iterator[int]:
        """Where to :meth:`fill`, so that the file is whole when each of these has been."""
        yield 0  # also where nothing is missing but that this is noted
        start = SPAN
        while start < self._mark.limit and not self.finished:
            if not self.has(start, SPAN):
                yield start
            start += SPAN

    def fill(
        self,
        start: int,
        pace: Callable[[int], None] = lambda length: None,
        deadline: float | None = None,
    ) -> None:
        """Bring the span that begins at an offset; ``pace`` is told the bytes of each step first.

        Raises:
            OSError: EIO when the source does not answer before the deadline.
        """
        for offset in range(start, start + SPAN, _MOST_AT_ONCE):
            length = min(_MOST_AT_ONCE, self._mark.limit - offset)
            if self._registry.stopping.is_set():
                return
            if length <= 0:
                break
            if not self.has(offset, length):
                pace(length)
            self.ensure(offset, length, deadline)
        self._finish_if_whole()  # also what was cut to nothing by a server that died then

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Nobody brings or writes anything meanwhile."""
        with self._changed:
            yield

    def _finish_if_whole(self) -> None:
        with self._changed:
            if self.finished or self._busy or self._map.missing(self._blocks):
                return
            self.finished = True
        os.fdatasync(self._fd)
        path = layers.descriptor_path(self._fd)
        os.removexattr(path, self._registry.attribute)
        with self._changed:
            self._map.remove()
        self._registry.note_finished()

    def close(self) -> None:
        """Close what is open, and drop the map of a file that has no name any more."""
        if os.fstat(self._fd).st_nlink:
            self._map.close()
        else:
            self._map.remove()
        os.close(self._fd)


class Contents:
    """All incomplete files that are in use.

    Args:
        source: where content comes from.
        maps: descriptor of the folder of presence maps.
        form: names of xattrs.
        deadline: seconds a call of the source is repeated.
    """

    def __init__(self, source: Source, maps: int, form: Format, deadline: float) -> None:
        self.source = source
        self.maps = maps
        self.attribute = content_xattr(form)
        self.deadline = deadline
        self.boot = boot_id()
        self.stopping = threading.Event()
        self.finished_files = 0
        self._open: dict[tuple[int, int], Content] = {}
        self._lock = threading.Lock()

    def note_finished(self) -> None:
        """One more file is whole."""
        with self._lock:
            self.finished_files += 1

    def acquire(self, fd: int) -> Content | None:
        """The content of an open file, or None when it is whole; give it back by release."""
        path = layers.descriptor_path(fd)
        st = os.stat(fd)
        key = (st.st_dev, st.st_ino)
        with self._lock:
            content = self._open.get(key)
            if content is None:
                try:
                    value = os.getxattr(path, self.attribute)
                except OSError as error:
                    if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                        return None
                    raise
                own = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                content = Content(self, own, key, Mark.parse(value))
                self._open[key] = content
            content.users += 1
        return content

    def hold(self, content: Content) -> None:
        """Acquire once more what somebody has acquired."""
        with self._lock:
            content.users += 1

    def release(self, content: Content) -> None:
        """Give back what :meth:`acquire` gave."""
        with self._lock:
            content.users -= 1
            if content.users:
                return
            self._open = {key: each for key, each in self._open.items() if each is not content}
        content.close()

    @contextlib.contextmanager
    def still(self, key: tuple[int, int]) -> Iterator[bool]:
        """Nothing is brought into a file meanwhile: its times are other ones for that moment.

        Args:
            key: device and inode number of the local file.

        Yields:
            Whether somebody has acquired its content; if not, nobody does meanwhile.
        """
        with self._lock:
            content = self._open.get(key)
            if content is None:
                yield False
                return
        with content.still():
            yield True

    def in_use(self) -> list[Content]:
        """Those acquired now."""
        with self._lock:
            return list(self._open.values())


def _runs(blocks: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Runs of neighbouring blocks, each at most ``most`` long: first block and count."""
    start = previous = blocks[0]
    for block in blocks[1:]:
        if block != previous + 1 or block - start >= most:
            yield start, previous - start + 1
            start = block
        previous = block
    yield start, previous - start + 1


def _write_sparse(fd: int, data: bytes, offset: int) -> None:
    """Write all of ``data``, leaving holes where whole pages are zero (the file is empty there)."""
    page = 65536
    zero = bytes(page)
    view = memoryview(data)
    start = 0
    for position in range(0, len(data), page):
        if data[position : position + page] == zero:
            _write_all(fd, view[start:position], offset + start)
            start = position + page
    _write_all(fd, view[start:], offset + start)


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done

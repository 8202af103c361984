"""Writing files of a restore: what its worker threads do."""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable, Sequence

import msgspec

from lazarette.backup import native
from lazarette.backup.repository.chunks import ChunkReader
from lazarette.backup.repository.entries import Entry
from lazarette.backup.repository.format import RepositoryDamaged
from lazarette.backup.restore_metadata import Metadata
from lazarette.backup.stores.contract import Buffer
from lazarette.backup.tree import Part

CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
UPDATE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PAGE = 4096
_STEP = 64 << 10
"""What is written at once where a part of it differs, bytes."""
_ZEROS = bytes(1 << 20)
_ROW = 64
"""Most parts of a file asked for at once: more than a block has."""


class Target(msgspec.Struct):
    """A file to be written.

    Attributes:
        directory: open directory it goes into.
        entry: as recorded.
        path: for messages.
        sparse: runs of zeros become holes.
        delta: read what is there first and write only what differs.
        descriptor: it, open; -1 until it is made.
        waiting: segments outstanding.
        damage: what could not be read from the repository.
        fault: what the filesystem refused.
        written: bytes written.
    """

    directory: int
    entry: Entry
    path: bytes
    sparse: bool = False
    delta: bool = False
    descriptor: int = -1
    waiting: int = 0
    damage: list[str] = []
    fault: OSError | None = None
    written: int = 0
    lock: threading.Lock = msgspec.field(default_factory=threading.Lock)


class SmallFiles(msgspec.Struct):
    """Files written whole by one worker, metadata and all."""

    files: list[tuple[Target, list[Part]]] = []
    bytes: int = 0
    error: BaseException | None = None

    def run(self, writer: Writer) -> None:
        """Make, fill and dress them."""
        rows = []
        plain = []
        read = iter(writer.chunks([part for _, parts in self.files for part in parts]))
        for target, parts in self.files:
            try:
                data = _joined([_sound(one) for one in itertools.islice(read, len(parts))])
            except RepositoryDamaged as bad:
                target.damage.append(str(bad))
                if not writer.keep_damaged:
                    continue
                data = bytes(target.entry.size)
            if writer.metadata.plain(target.entry):
                plain.append((target, data))
                rows.append(_row(writer, target, data))
                continue
            try:
                self._write(writer, target, data)
            except OSError as failed:
                target.fault = failed
        for (target, data), (stage, error) in zip(plain, native.write_files(rows), strict=True):
            if stage in (native.STAGE_OPEN, native.STAGE_WRITE):
                target.fault = OSError(error, os.strerror(error))
                continue
            target.written = len(data)
            if stage == native.STAGE_METADATA:
                self._dress(writer, target)

    @staticmethod
    def _dress(writer: Writer, target: Target) -> None:
        """Set metadata of a file that is there, telling what is refused."""
        try:
            descriptor = os.open(target.entry.name, native.OPEN_FILE, dir_fd=target.directory)
            try:
                writer.metadata.set_open(descriptor, target.entry, target.path)
            finally:
                os.close(descriptor)
        except OSError as failed:
            target.fault = failed

    @staticmethod
    def _write(writer: Writer, target: Target, data: Buffer) -> None:
        name = target.entry.name
        descriptor = os.open(name, CREATE, 0o600, dir_fd=target.directory)
        try:
            writer.metadata.prepare(descriptor, target.entry, target.path)
            write_all(descriptor, memoryview(data), 0)
            target.written = len(data)
            writer.metadata.set_open(descriptor, target.entry, target.path)
        finally:
            os.close(descriptor)


def _sound(piece: Buffer | RepositoryDamaged) -> Buffer:
    if isinstance(piece, RepositoryDamaged):
        raise piece
    return piece


def _joined(pieces: list[Buffer]) -> Buffer:
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _other_length(part: Part) -> RepositoryDamaged:
    name = "" if part.chunk is None else part.chunk.hex()
    return RepositoryDamaged(f"chunk {name} has another length than recorded")


def _row(
    writer: Writer, target: Target, data: Buffer
) -> tuple[int, bytes, Buffer, int, int, int, int, int]:
    entry = target.entry
    uid, gid = writer.metadata.owner(entry)
    when = divmod(entry.mtime_ns, 1_000_000_000)
    return (target.directory, entry.name, data, entry.mode, uid, gid, *when)


class PartRun(msgspec.Struct):
    """Parts of a large file for one worker."""

    target: Target
    parts: list[Part]
    error: BaseException | None = None

    def run(self, writer: Writer) -> None:
        """Write them, those that lie together at once."""
        written = 0
        gathered: list[memoryview] = []
        start = size = at = 0
        while at < len(self.parts):
            part = self.parts[at]
            try:
                count, read = writer.row(self.parts, at)
            except RepositoryDamaged as bad:
                with self.target.lock:
                    self.target.damage.append(f"{part.length} bytes at {part.offset}: {bad}")
                at += 1
                continue
            data = memoryview(read)
            if gathered and (part.offset != start + size or size >= 1 << 20):
                written += self._put(start, gathered)
                gathered = []
            if not gathered:
                start, size = part.offset, 0
            gathered.append(data)
            size += len(data)
            at += count
        if gathered:
            written += self._put(start, gathered)
        with self.target.lock:
            self.target.written += written

    def _put(self, offset: int, pieces: list[memoryview]) -> int:
        target = self.target
        try:
            if target.delta:
                return _put_delta(target.descriptor, offset, pieces)
            if target.sparse:
                return _put_sparse(target.descriptor, offset, pieces)
            return _put_vector(target.descriptor, offset, pieces)
        except OSError as failed:
            target.fault = failed
            return 0


def _put_vector(descriptor: int, offset: int, pieces: list[memoryview]) -> int:
    total = sum(map(len, pieces))
    done = os.pwritev(descriptor, pieces, offset)
    if done < total:
        write_all(descriptor, memoryview(b"".join(pieces))[done:], offset + done)
    return total


def _put_delta(descriptor: int, offset: int, pieces: list[memoryview]) -> int:
    written = 0
    for piece in pieces:
        there = os.pread(descriptor, len(piece), offset)
        starts = range(0, len(piece), _STEP) if there != piece else ()
        for at in starts:
            part = piece[at : at + _STEP]
            if there[at : at + _STEP] != part:
                write_all(descriptor, part, offset + at)
                written += len(part)
        offset += len(piece)
    return written


def _put_sparse(descriptor: int, offset: int, pieces: list[memoryview]) -> int:
    """Write all but whole pages of zeros."""
    written = 0
    for piece in pieces:
        start = 0
        for at in range(0, len(piece), _PAGE):
            end = min(at + _PAGE, len(piece))
            if piece[at:end] == _ZEROS[: end - at]:
                if start < at:
                    write_all(descriptor, piece[start:at], offset + start)
                    written += at - start
                start = end
        if start < len(piece):
            write_all(descriptor, piece[start:], offset + start)
            written += len(piece) - start
        offset += len(piece)
    return written


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """``pwrite`` until all is written."""
    while data:
        done = os.pwrite(descriptor, data, offset)
        data = data[done:]
        offset += done


Job = SmallFiles | PartRun


class Writer:
    """What every worker thread of a restore uses.

    Args:
        reader: of the repository's chunks.
        metadata: sets owners, modes, times.
        keep_damaged: keep a file with holes where its chunks are lost.
        threads: how many.
        finished: called in the thread that collects, with each job done.
    """

    def __init__(
        self,
        reader: ChunkReader,
        metadata: Metadata,
        keep_damaged: bool,
        threads: int,
        finished: Callable[[Job], None],
    ) -> None:
        self._reader = reader
        self.metadata = metadata
        self.keep_damaged = keep_damaged
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._finished = finished
        self.outstanding = 0
        self._threads = [
            threading.Thread(target=self._loop, name="restore", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def chunk(self, part: Part) -> Buffer:
        """The bytes of a part, zeros for a hole.

        Raises:
            RepositoryDamaged: they are lost or wrong.
        """
        if part.chunk is None:
            return bytes(part.length)
        data = self._reader.get(part.chunk)
        if len(data) != part.length:
            raise _other_length(part)
        return data

    def chunks(self, parts: Sequence[Part]) -> list[Buffer | RepositoryDamaged]:
        """:meth:`chunk` of several parts: their bytes, or what is wrong with them."""
        read = iter(self._reader.get_all([part.chunk for part in parts if part.chunk is not None]))
        found: list[Buffer | RepositoryDamaged] = []
        for part in parts:
            data = bytes(part.length) if part.chunk is None else next(read)
            if not isinstance(data, RepositoryDamaged) and len(data) != part.length:
                data = _other_length(part)
            found.append(data)
        return found

    def row(self, parts: Sequence[Part], first: int) -> tuple[int, Buffer]:
        """Bytes of several parts that lie together in the file and in one block.

        Returns:
            How many from the first one on, at least one, and their bytes, joined.

        Raises:
            RepositoryDamaged: those of the first are lost or wrong.
        """
        end = parts[first].offset
        chunks: list[bytes] = []
        for part in itertools.islice(parts, first, None):
            if part.chunk is None or part.offset != end or len(chunks) == _ROW:
                break
            chunks.append(part.chunk)
            end += part.length
        count, data = self._reader.get_row(chunks)
        if len(data) == sum(part.length for part in parts[first : first + count]):
            return count, data
        return 1, self.chunk(parts[first])

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self.outstanding += 1
        self._jobs.put(job)

    def collect(self, limit: int) -> None:
        """Take back finished jobs until at most ``limit`` are outstanding."""
        while self.outstanding > limit or (self.outstanding and not self._done.empty()):
            job = self._done.get()
            self.outstanding -= 1
            if job.error is not None:
                raise job.error
            self._finished(job)

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.run(self)
            except BaseException as failed:  # noqa: BLE001 - handed to the thread that waits
                job.error = failed
            self._done.put(job)

    def stop(self) -> None:
        """End the threads after what is queued."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

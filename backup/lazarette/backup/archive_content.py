"""Reading files into chunks: what the worker threads of a backup do.

A worker takes a :class:`Task` from the queue, does it alone (read, cut, hash, compress,
encrypt into its own pack) and hands it back.  Nothing else is shared.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property
from typing import Protocol

import msgspec

from lazarette.backup import memory, native, scan
from lazarette.backup.chunker import MAX_SIZE, Chunker
from lazarette.backup.pagemaps import Delta, PageMap, PageMaps, changed_pages, delta
from lazarette.backup.repository.entries import PART, Entry
from lazarette.backup.repository.format import ID_SIZE, PAGE, Crypt, pieces
from lazarette.backup.repository.ingest import Ingest, Lane

SMALL = 128 << 10
"""Files up to this size are one chunk and are read in batches."""
BLOCK = 64 << 10
"""Grid of files changed in place, bytes."""
SEGMENT = 32 << 20
"""Most content one task covers, so that one large file keeps every worker busy."""
_BUFFER = 4 << 20
_READ = 1 << 20


class SmallFile(msgspec.Struct):
    """A file to be read whole into one chunk."""

    directory: int
    entry: Entry
    path: bytes
    fault: OSError | None = None
    unstable: bool = False


class Batch(msgspec.Struct):
    """Small files read together."""

    files: list[SmallFile] = []
    bytes: int = 0
    error: BaseException | None = None

    def run(self, worker: Worker) -> None:
        """Read, hash and store them."""
        wanted = [(file.directory, file.entry.name, file.entry.size) for file in self.files]
        read: list[tuple[Entry, bytes]] = []
        for file, row in zip(self.files, native.read_files(wanted), strict=True):
            try:
                data = _take(file, row)
            except OSError as failed:
                file.fault = failed
                continue
            worker.bytes_read += len(data)
            if data:
                read.append((file.entry, data))
            else:
                file.entry.content = b""
        if not read:
            return
        crypt = worker.crypt
        ids = crypt.chunk_ids([data for _, data in read])
        claimed = worker.ingest.claim_many(b"".join(ids), ids)
        for (entry, data), chunk, new in zip(read, ids, claimed, strict=True):
            entry.content = PART.pack(chunk, len(data))
            if new:
                worker.lane.add(chunk, data)


def _take(file: SmallFile, row: native.Small) -> bytes:
    """What was read of a file, its entry completed.

    Raises:
        OSError: it cannot be read.
    """
    error, inode, data, flags, attributes = row
    if error:
        raise OSError(error, os.strerror(error))
    if inode is None or data is None:
        return _read_small(file)
    entry = file.entry
    _fill(entry, inode, len(data))
    if attributes > 0 or flags & scan.KEPT_FLAGS:
        found = scan.xattrs(scan.beside(file.directory, entry.name)) if attributes > 0 else {}
        scan.put_extras(entry, found, flags & scan.KEPT_FLAGS)
    return data


def _fill(entry: Entry, inode: native.Inode, size: int) -> None:
    """Set an entry's metadata from an inode, keeping its name, and its size as read."""
    fresh = scan.entry_of(entry.name, inode)
    entry.mode, entry.uid, entry.gid = fresh.mode, fresh.uid, fresh.gid
    entry.mtime_ns, entry.ctime_ns, entry.inode = fresh.mtime_ns, fresh.ctime_ns, fresh.inode
    entry.extra = fresh.extra
    entry.size = size


def _read_small(file: SmallFile) -> bytes:
    """Content of a small file; its entry gets the metadata that belong to what was read."""
    descriptor = native.open_file(file.directory, file.entry.name)
    try:
        before = os.fstat(descriptor)
        for _ in range(2):
            data = _read_all(descriptor, before.st_size)
            after = os.fstat(descriptor)
            if native.same_state(before, after, len(data)):
                break
            before = after
        else:
            file.unstable = True
        fill_entry(file.entry, after, descriptor, len(data))
        return data
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, size: int) -> bytes:
    data = os.pread(descriptor, size + 1, 0)
    if len(data) == size:
        return data
    parts = [data]
    at = len(data)
    while data and at < 2 * SMALL:
        data = os.pread(descriptor, SMALL, at)
        parts.append(data)
        at += len(data)
    return b"".join(parts)


def fill_entry(entry: Entry, status: os.stat_result, descriptor: int, size: int) -> None:
    """Set an entry's metadata from an open file, keeping its name, and its size as read."""
    _fill(entry, native.inode_of(None, status), size)
    scan.put_extras(entry, scan.xattrs(descriptor), scan.flags(descriptor))


class Segment(msgspec.Struct):
    """A run of a large file's data to be cut into chunks.

    Attributes:
        file: the open file.
        offset: first byte.
        length: bytes to read.
        block: grid of fixed blocks, or 0 to cut by content.
        bases: by offset, the chunk that was there in the snapshot compared with.
        paged: the ids of its blocks are made of the hashes of their pages.
        parts: result, packed ``PART`` rows.
        read: bytes that were there; fewer than ``length`` when the file shrank.
    """

    file: int
    offset: int
    length: int
    block: int
    owner: object
    bases: Mapping[int, bytes] = {}
    paged: bool = False
    parts: bytes = b""
    read: int = 0
    error: BaseException | None = None
    fault: OSError | None = None

    def run(self, worker: Worker) -> None:
        """Read, cut, hash and store the segment."""
        try:
            if self.block:
                self._run_fixed(worker)
            else:
                self._run_defined(worker)
        except OSError as failed:
            self.fault = failed
        worker.bytes_read += self.read

    def _run_fixed(self, worker: Worker) -> None:
        rows = []
        end = self.offset + self.length
        at = self.offset
        while at < end:
            got = fill_buffer(self.file, worker.view, 0, min(_READ, end - at), at)
            if got == 0:
                break
            lengths = []
            left = got
            while left:
                # The first block after an unaligned start is short: the grid is the file's.
                step = min(self.block - (at + got - left) % self.block, left)
                lengths.append(step)
                left -= step
            rows.append(worker.store_blocks(worker.view[:got], lengths, at, self.bases, self.paged))
            at += got
        self.read = at - self.offset
        self.parts = b"".join(rows)

    def _run_defined(self, worker: Worker) -> None:
        rows = []
        held = 0
        end = self.offset + self.length
        at = self.offset
        final = False
        while not final:
            room = min(len(worker.view) - held, end - at)
            got = fill_buffer(self.file, worker.view, held, room, at)
            at += got
            held += got
            final = got < room or at == end
            lengths = worker.chunker.cuts(worker.view[:held], final)
            used = sum(lengths)
            rows.append(worker.store(worker.view[:used], lengths))
            worker.view[: held - used] = worker.view[used:held]
            held -= used
        self.read = at - self.offset
        self.parts = b"".join(rows)


def fill_buffer(descriptor: int, view: memoryview, held: int, room: int, offset: int) -> int:
    """Read up to ``room`` bytes to ``view[held:]``; fewer only at the end of the file."""
    got = 0
    while got < room:
        step = os.preadv(descriptor, [view[held + got : held + room]], offset + got)
        if step == 0:
            break
        got += step
    return got


class Task(Protocol):
    """What a worker does alone."""

    error: BaseException | None

    def run(self, worker: Worker) -> None:
        """Do it."""
        ...


class _Span:
    """New blocks that lie together, gathered to be stored as one span."""

    def __init__(self, lane: Lane, paged: bool) -> None:
        self._lane = lane
        self._paged = paged
        self._ids: list[bytes] = []
        self._lengths: list[int] = []
        self._data = memoryview(b"")
        self._start = self._end = 0

    def add(self, chunk: bytes, block: memoryview, data: memoryview, at: int) -> None:
        """Add a block that is ``data[at:]``."""
        if at != self._end:
            self.close()
        if not self._ids:
            self._start = at
        self._data = data
        self._ids.append(chunk)
        self._lengths.append(len(block))
        self._end = at + len(block)

    def close(self) -> None:
        """Store what was gathered."""
        if self._ids:
            data = self._data[self._start : self._end]
            self._lane.add_span(self._ids, self._lengths, data, self._paged)
            self._ids, self._lengths = [], []


class Worker:
    """One thread of a backup."""

    def __init__(
        self,
        ingest: Ingest,
        crypt: Crypt,
        chunker: Chunker,
        tasks: queue.SimpleQueue[Task | None],
        done: queue.SimpleQueue[Task],
        maps: PageMaps | None,
        lost: Set[bytes],
    ) -> None:
        self.maps = maps
        # Patches may refer to pages of a chunk that is lost: it is stored again as it was, whole.
        self.lost = lost
        self.ingest = ingest
        self.crypt = crypt
        self.chunker = chunker
        self.lane: Lane = ingest.lane()
        self.bytes_read = 0
        self.pace: Callable[[int], None] = lambda count: None
        self._tasks = tasks
        self._done = done
        self._thread = threading.Thread(target=self._loop, name="archive", daemon=True)
        self._thread.start()

    @cached_property
    def view(self) -> memoryview:
        """What large files are read into."""
        return memory.buffer(max(_BUFFER, 2 * MAX_SIZE))

    def store(self, data: memoryview, lengths: list[int]) -> bytes:
        """Store consecutive chunks of ``data``; returns their ``PART`` rows."""
        ids = self.crypt.chunk_ids(pieces(data, lengths))
        wanted = self.ingest.claim_many(b"".join(ids), ids)
        if all(wanted):
            self.lane.add_span(ids, lengths, data)
        else:
            at = 0
            for chunk, length, new in zip(ids, lengths, wanted, strict=True):
                if new:
                    self.lane.add(chunk, bytes(data[at : at + length]))
                at += length
        return b"".join(map(PART.pack, ids, lengths))

    def store_blocks(
        self,
        data: memoryview,
        lengths: list[int],
        offset: int,
        bases: Mapping[int, bytes],
        paged: bool,
    ) -> bytes:
        """:meth:`store` for blocks of the grid, as patches where little of one is new.

        Args:
            data: the blocks.
            lengths: of each.
            offset: of the first in its file.
            bases: by offset, the chunk that was there before.
            paged: their ids are made of the hashes of their pages.
        """
        maps = self.maps
        if maps is None and not paged:
            return self.store(data, lengths)
        ids, hashes = self._blocks(data, lengths, paged)
        wanted = self.ingest.claim_many(b"".join(ids), ids)
        known = self._known_bases(lengths, wanted, offset, bases, paged)
        span = _Span(self.lane, paged)
        at = 0
        for number, (chunk, length, new) in enumerate(zip(ids, lengths, wanted, strict=True)):
            block = data[at : at + length]
            if new and maps is not None and length % PAGE == 0:
                pages = hashes[number] if paged else maps.hashes(block)
                found = self._delta(chunk, block, pages, known.get(offset + at))
                if found is not None:
                    span.close()
                    self.add_delta(chunk, found, paged)
                else:
                    span.add(chunk, block, data, at)
                    maps.note_plain(chunk, pages)
            elif new:
                span.add(chunk, block, data, at)
            at += length
        span.close()
        return b"".join(map(PART.pack, ids, lengths))

    def _known_bases(
        self,
        lengths: list[int],
        wanted: list[bool],
        offset: int,
        bases: Mapping[int, bytes],
        paged: bool,
    ) -> dict[int, PageMap]:
        """What was there, by offset, of those blocks that are new and whole pages long."""
        starts = itertools.accumulate(lengths[:-1], initial=offset)
        chunks = {
            at: (base, length // PAGE)
            for at, length, new in zip(starts, lengths, wanted, strict=True)
            if new and length % PAGE == 0 and (base := bases.get(at)) is not None
        }
        maps = self.known_maps(list(chunks.values()), paged)
        return {at: maps[base] for at, (base, _) in chunks.items() if base in maps}

    def _blocks(
        self, data: memoryview, lengths: list[int], paged: bool
    ) -> tuple[list[bytes], list[bytes]]:
        """Ids of blocks and, of paged ones, the hashes of their pages."""
        crypt = self.crypt
        if not paged:
            return crypt.chunk_ids(pieces(data, lengths)), []
        starts = list(itertools.accumulate(lengths, initial=0))
        if any(start % PAGE for start in starts[:-1]):
            hashes = [crypt.page_hashes(block) for block in pieces(data, lengths)]
        else:
            joined = crypt.page_hashes(data)
            hashes = [
                joined[a // PAGE * ID_SIZE : -(-b // PAGE) * ID_SIZE]
                for a, b in itertools.pairwise(starts)
            ]
        return [crypt.paged_id(one) for one in hashes], hashes

    def _delta(
        self, chunk: bytes, block: memoryview, hashes: bytes, base: PageMap | None
    ) -> Delta | None:
        if base is None or chunk in self.lost:
            return None
        changed = changed_pages(hashes, base, self.ingest.holds_plain)
        if changed is None:
            return None
        new = b"".join([block[page * PAGE : (page + 1) * PAGE] for page in changed])
        return delta(hashes, base, changed, self.crypt.chunk_id(new), new)

    def add_delta(self, chunk: bytes, found: Delta, paged: bool) -> None:
        """Store a block as a patch, and the chunk of its new pages."""
        if found.new and self.ingest.claim(found.holder):
            self.lane.add(found.holder, found.new)
        self.lane.add(chunk, found.payload, found.needs, paged)
        if self.maps is not None:
            self.maps.note(chunk, found.pages)

    def known_maps(self, blocks: Sequence[tuple[bytes, int]], paged: bool) -> dict[bytes, PageMap]:
        """The maps of blocks stored before that this host has, by chunk.

        Args:
            blocks: their chunks and numbers of pages.
            paged: the chunks' ids are made of the hashes of their pages.
        """
        if self.maps is None or not blocks:
            return {}
        found = self.maps.find_all(blocks)
        if not paged:
            return found
        return {
            chunk: known
            for chunk, known in found.items()
            if self.crypt.paged_id(known.hashes) == chunk
        }

    def _loop(self) -> None:
        while (task := self._tasks.get()) is not None:
            before = self.bytes_read
            try:
                task.run(self)
                self.pace(self.bytes_read - before)
            except BaseException as failed:  # noqa: BLE001 - handed to the thread that waits
                task.error = failed
            self._done.put(task)

    def join(self) -> None:
        """Wait for the thread, which must have been sent None."""
        self._thread.join()


class Workers:
    """The worker threads and the count of what is under way."""

    def __init__(
        self,
        ingest: Ingest,
        crypt: Crypt,
        threads: int,
        finished: Callable[[Task], None],
        maps: PageMaps | None,
        lost: Set[bytes],
    ) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Task] = queue.SimpleQueue()
        chunker = Chunker(crypt.chunk_id_key)
        self._workers = [
            Worker(ingest, crypt, chunker, self._tasks, self._done, maps, lost)
            for _ in range(threads)
        ]
        self._finished = finished
        self.outstanding = 0

    @property
    def bytes_read(self) -> int:
        """Bytes read from the source so far."""
        return sum(worker.bytes_read for worker in self._workers)

    def paced(self, pace: Callable[[int], None]) -> None:
        """Call ``pace`` with the bytes of every task; it waits as long as they ask for."""
        for worker in self._workers:
            worker.pace = pace

    def submit(self, task: Task) -> None:
        """Queue a task."""
        self.outstanding += 1
        self._tasks.put(task)

    def collect(self, limit: int) -> None:
        """Take back finished tasks until at most ``limit`` are outstanding.

        Raises:
            BaseException: whatever a task failed with.
        """
        while self.outstanding > limit or (self.outstanding and not self._done.empty()):
            task = self._done.get()
            self.outstanding -= 1
            if task.error is not None:
                raise task.error
            self._finished(task)

    def stop(self) -> None:
        """End the threads after what they are at."""
        for _ in self._workers:
            self._tasks.put(None)
        for worker in self._workers:
            worker.join()

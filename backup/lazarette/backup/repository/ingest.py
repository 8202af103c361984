"""Adding chunks: worker threads that share nothing but the set of ids taken.

Order of writes, which makes a crash at any instant harmless:

1. packs; nothing refers to them yet;
2. index objects that list them, now and then during the run and once at its end, so that a
   killed run leaves at most a few packs the next one does not find;
3. the snapshot, by the caller, after :meth:`Ingest.finish` returned.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import msgspec

from lazarette.backup.repository.format import Crypt, pack_name
from lazarette.backup.repository.guard import UNGUARDED, Guard, LeaseLost
from lazarette.backup.repository.index import Index
from lazarette.backup.repository.packmemory import PackMemories, PackMemory
from lazarette.backup.repository.packs import DATA, TREE, PackBuilder, PackRecord
from lazarette.backup.repository.treecache import TreeCache
from lazarette.backup.stores.contract import BlobStore, Buffer
from lazarette.storage.clock import Clock
from lazarette.storage.errors import LazaretteError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

PACK_SIZE = 16 << 20
TREE_PACK_SIZE = 4 << 20
TREE_BLOCK_SIZE = 128 << 10
SPAN = 1 << 20
"""Plain bytes of a block of a large file."""
INDEX_EVERY = 8
"""Packs after which an index object is written during a run."""


class IngestStats(msgspec.Struct):
    """What a run added.

    Attributes:
        chunks_new: chunks that were not there.
        bytes_new: their bytes (of patches: what is stored of them).
        bytes_sent: bytes of the packs and index objects written.
        packs: packs written.
    """

    chunks_new: int = 0
    bytes_new: int = 0
    bytes_sent: int = 0
    packs: int = 0


class Lane:
    """One worker's way in: a pack of its own; used by one thread at a time."""

    def __init__(self, ingest: Ingest, kind: int) -> None:
        self._ingest = ingest
        self._kind = kind
        self._builder: PackBuilder | None = None
        self._limit = TREE_PACK_SIZE if kind == TREE else PACK_SIZE
        self.chunks_new = 0
        self.bytes_new = 0

    def add(
        self, chunk: bytes, data: Buffer, needs: tuple[bytes, ...] = (), paged: bool = False
    ) -> None:
        """Store a chunk whose id :meth:`Ingest.claim` gave to this caller.

        ``data`` is kept until its block is closed and must not change until then.
        """
        builder = self._builder
        if builder is None:
            builder = self._builder = self._ingest.new_builder(self._kind)
        builder.add(chunk, data, needs, paged)
        self.chunks_new += 1
        self.bytes_new += len(data)
        if builder.size >= self._limit:
            self._send()

    def add_span(
        self,
        ids: Sequence[bytes],
        lengths: Sequence[int],
        data: memoryview,
        paged: bool = False,
    ) -> None:
        """Store chunks that lie one after another in ``data``, which may be used again at once.

        Spans of half a block and more become blocks of their own without being copied.
        """
        first = at = start = 0
        for number, length in enumerate(lengths, 1):
            at += length
            if at - start < SPAN and number < len(lengths):
                continue
            if at - start < SPAN // 2:
                position = start
                for chunk, size in zip(ids[first:number], lengths[first:number], strict=True):
                    self.add(chunk, bytes(data[position : position + size]), paged=paged)
                    position += size
            else:
                self._add_block(ids[first:number], lengths[first:number], data[start:at], paged)
            first, start = number, at

    def _add_block(
        self, ids: Sequence[bytes], lengths: Sequence[int], data: memoryview, paged: bool
    ) -> None:
        builder = self._builder
        if builder is None:
            builder = self._builder = self._ingest.new_builder(self._kind)
        builder.close_block()
        builder.add_block(ids, lengths, data, paged)
        self.chunks_new += len(ids)
        self.bytes_new += len(data)
        if builder.size >= self._limit:
            self._send()

    def finish(self) -> None:
        """Send what is there."""
        if self._builder is not None and not self._builder.empty:
            self._send()

    def _send(self) -> None:
        builder, self._builder = self._builder, None
        if builder is not None:
            data, record = builder.finish()
            self._ingest.send(data, record, builder.memory)


class Listing(Protocol):
    """Writes index objects."""

    def write_index(self, records: Sequence[PackRecord]) -> tuple[list[str], int]:
        """List packs; returns the names of the objects and their size."""
        ...

    def withdraw_index(self, names: Sequence[str]) -> None:
        """Delete index objects whose packs are all listed elsewhere."""
        ...


class Ingest:
    """Everything one run adds to a repository.

    Args:
        store: where to.
        crypt: of the repository.
        index: grows by what is written.
        clock: for the records' times.
        trees: local copies of packs of directories.
        listing: writes index objects.
        uploads: packs being sent at once.
        also: another index that grows too.
        guard: the lease all this happens under.
    """

    def __init__(
        self,
        store: BlobStore,
        crypt: Crypt,
        index: Index,
        clock: Clock,
        trees: TreeCache,
        listing: Listing,
        uploads: int = 2,
        also: Index | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._store = store
        self._guard = guard or UNGUARDED
        self._crypt = crypt
        self.index = index
        self._also = also if also is not index else None
        self._clock = clock
        self._trees = trees
        self._listing = listing
        self._claimed: dict[bytes, object] = {}
        self._lanes: list[Lane] = []
        self._lock = threading.Lock()
        self._records: list[PackRecord] = []
        self._unlisted = 0
        self._interim: list[str] = []
        self._slots = threading.BoundedSemaphore(uploads)
        self._uploads = uploads
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._bytes_sent = 0
        self._memories = PackMemories(PACK_SIZE + 2 * SPAN)
        self.used_packs: set[bytes] = set()

    def lane(self, kind: int = DATA) -> Lane:
        """A way in for one more thread."""
        lane = Lane(self, kind)
        with self._lock:
            self._lanes.append(lane)
        return lane

    def claim(self, chunk: bytes) -> bool:
        """Whether the caller is to store a chunk: nobody has it and nobody else is at it."""
        if chunk in self._claimed or chunk in self.index:
            return False
        token = object()
        return self._claimed.setdefault(chunk, token) is token

    def claim_many(self, ids: bytes, chunks: Sequence[bytes]) -> list[bool]:
        """:meth:`claim` for several chunks at once; ``ids`` are the same joined."""
        known = self.index.known(ids)
        claimed = self._claimed
        wanted = []
        for chunk, there in zip(chunks, known, strict=True):
            if there or chunk in claimed:
                wanted.append(False)
            else:
                token = object()
                wanted.append(claimed.setdefault(chunk, token) is token)
        return wanted

    def has(self, chunk: bytes) -> bool:
        """Whether a chunk is stored or about to be."""
        return chunk in self._claimed or chunk in self.index

    def holds_plain(self, chunk: bytes) -> bool:
        """Whether a chunk is stored whole: only then patches may name pages of it.

        Another host may store the same chunk as another patch at the same time; which pages
        such a patch holds is not known, while a whole chunk has the same pages everywhere.
        """
        location = self.index.find(chunk)
        return location is not None and not location.patch

    def new_builder(self, kind: int) -> PackBuilder:
        """An empty pack."""
        size = TREE_BLOCK_SIZE if kind == TREE else 1 << 20
        memory = self._memories.take()
        return PackBuilder(self._crypt, kind, self._clock.now_ns(), size, memory=memory)

    def send(self, data: Buffer, record: PackRecord, memory: PackMemory) -> None:
        """Write a pack in the background; blocks while too many are on their way.

        Args:
            data: the pack.
            record: about it.
            memory: what ``data`` lies in; used again when the pack is written.

        Raises:
            LazaretteError: an earlier pack could not be written.
        """
        self._slots.acquire()
        try:
            self._raise_failed()
            future = self._sender().submit(self._put, data, record, memory)
        except BaseException:
            self._slots.release()
            raise
        with self._lock:
            self._pending = [one for one in self._pending if not one.done() or one.exception()]
            self._pending.append(future)

    def _sender(self) -> ThreadPoolExecutor:
        """The threads that send: a run that finds nothing new starts none."""
        from concurrent.futures import ThreadPoolExecutor

        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._uploads, thread_name_prefix="upload")
            return self._pool

    def _raise_failed(self) -> None:
        with self._lock:
            pending = list(self._pending)
        for future in pending:
            if future.done():
                future.result()

    def _put(self, data: Buffer, record: PackRecord, memory: PackMemory) -> None:
        try:
            self._guard.check()
            self._store.put(pack_name(record.pack), data)
            if record.kind == TREE:
                self._trees.add(record.pack, data)
            self.index.add([record])
            if self._also is not None:
                self._also.add([record])
            for chunk, _ in record.chunk_rows():
                self._claimed.pop(chunk, None)
            with self._lock:
                self._records.append(record)
                self._unlisted += 1
                self._bytes_sent += len(data)
                due = self._records[-self._unlisted :] if self._unlisted >= INDEX_EVERY else []
                if due:
                    self._unlisted = 0
            if due:
                names, size = self._list(due)
                with self._lock:
                    self._interim += names
                    self._bytes_sent += size
        finally:
            self._memories.give_back(memory)
            self._slots.release()

    def finish(self) -> IngestStats:
        """Send what the lanes hold, and list every pack in the index.

        Raises:
            LazaretteError: something could not be written; nothing may refer to this run.
        """
        for lane in self._lanes:
            lane.finish()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self._raise_failed()
        if self._records:
            _, size = self._list(self._records)
            self._bytes_sent += size
            self._listing.withdraw_index(self._interim)
        return IngestStats(
            sum(lane.chunks_new for lane in self._lanes),
            sum(lane.bytes_new for lane in self._lanes),
            self._bytes_sent,
            len(self._records),
        )

    def _list(self, records: Sequence[PackRecord]) -> tuple[list[str], int]:
        """Write index objects, but only under a good lease (rule P7 of the prune protocol)."""
        self._guard.check()
        names, size = self._listing.write_index(records)
        try:
            self._guard.check()
        except LeaseLost:
            self._listing.withdraw_index(names)
            raise
        return names, size

    def abort(self) -> None:
        """Stop; what is written already is found and used by the next run, if that works."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._unlisted:
            with suppress(LazaretteError):
                self._list(self._records[-self._unlisted :])

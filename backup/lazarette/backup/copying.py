"""Copying snapshots from one repository to another, which has keys of its own.

Chunks are read, checked, named anew under the other repository's key, and stored unless they
are there; the cuts stay as they are.  A snapshot that was copied before is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from lazarette.backup.repository import marks
from lazarette.backup.repository.entries import (
    HOLE,
    LIST,
    PART,
    Entry,
    Kind,
    decode_page,
    encode_page,
)
from lazarette.backup.repository.format import ID_SIZE
from lazarette.backup.repository.guard import Guard
from lazarette.backup.repository.guard import Kind as LeaseKind
from lazarette.backup.repository.ingest import Ingest, Lane
from lazarette.backup.repository.packs import TREE
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord, new_snapshot_id
from lazarette.storage.errors import Cancelled

ORIGIN_TAG = "lazarette.copied-from"


@dataclass
class CopyReport:
    """What a copy did.

    Attributes:
        copied: new snapshots.
        passed_over: ids of those that were there already.
        bytes_sent: bytes written to the other repository.
    """

    copied: list[SnapshotRecord]
    passed_over: list[str]
    bytes_sent: int = 0


def run(
    source: Repository,
    target: Repository,
    chosen: Iterable[SnapshotRecord],
    cancelled: Callable[[], bool] = lambda: False,
) -> CopyReport:
    """Copy snapshots.

    Args:
        source: where from.
        target: where to.
        chosen: which.
        cancelled: asked for every directory.

    Raises:
        RepositoryDamaged: something of a snapshot is lost; it is not copied.
        Cancelled: as asked.
    """
    report = CopyReport([], [])
    there = {record.tags.get(ORIGIN_TAG) for record in target.snapshots()}
    with (
        source.guard.hold(LeaseKind.READ, "copy"),
        target.guard.hold(LeaseKind.ADD, "copy") as guard,
    ):
        source.refresh()
        for record in chosen:
            if record.id in there:
                report.passed_over.append(record.id)
                continue
            report.copied.append(_Copy(source, target, guard, cancelled).run(record, report))
    return report


class _Copy:
    def __init__(
        self,
        source: Repository,
        target: Repository,
        guard: Guard,
        cancelled: Callable[[], bool],
    ) -> None:
        self._source = source
        self._target = target
        self._guard = guard
        self._cancelled = cancelled
        condemned = marks.packs(target.store, target.crypt)
        self._ingest: Ingest = target.ingest(condemned, guard=guard)
        self._data: Lane = self._ingest.lane()
        self._trees: Lane = self._ingest.lane(TREE)
        self._known: dict[bytes, bytes] = {}

    def run(self, record: SnapshotRecord, report: CopyReport) -> SnapshotRecord:
        """Copy one snapshot."""
        try:
            root = msgspec.structs.replace(record.root)
            root.content = self._directory(root.content)
            stats = self._ingest.finish()
        except BaseException:
            self._ingest.abort()
            raise
        report.bytes_sent += stats.bytes_sent
        copy = msgspec.structs.replace(
            record,
            id=new_snapshot_id(),
            root=root,
            parent=None,
            tags={**record.tags, ORIGIN_TAG: record.id},
        )
        self._guard.confirm()
        self._target.commit(copy)
        return copy

    def _directory(self, pages: bytes) -> bytes:
        return b"".join(
            self._page(pages[at : at + ID_SIZE]) for at in range(0, len(pages), ID_SIZE)
        )

    def _page(self, page: bytes) -> bytes:
        known = self._known.get(page)
        if known is not None:
            return known
        if self._cancelled():
            raise Cancelled("copy was cancelled")
        entries = decode_page(self._source.reader.get(page), page.hex())
        for entry in entries:
            self._entry(entry)
        return self._store(page, encode_page(entries), self._trees)

    def _entry(self, entry: Entry) -> None:
        if entry.kind == Kind.DIRECTORY:
            entry.content = self._directory(entry.content)
        elif entry.kind == Kind.FILE:
            entry.content = self._content(entry.content, entry.depth)
            if entry.extra is not None and not self._target.paged:
                entry.extra.paged = False

    def _content(self, content: bytes, depth: int) -> bytes:
        if depth == 0:
            return b"".join(
                PART.pack(self._chunk(chunk), length) for chunk, length in PART.iter_unpack(content)
            )
        rows = []
        for page, length in LIST.iter_unpack(content):
            known = self._known.get(page)
            if known is None:
                below = self._content(bytes(self._source.reader.get(page)), depth - 1)
                known = self._store(page, below, self._trees)
            rows.append(LIST.pack(known, length))
        return b"".join(rows)

    def _chunk(self, chunk: bytes) -> bytes:
        if chunk == HOLE:
            return HOLE
        known = self._known.get(chunk)
        if known is not None:
            return known
        reader = self._source.reader
        paged = self._target.paged and reader.locate(chunk).paged
        return self._store(chunk, bytes(reader.get(chunk)), self._data, paged)

    def _store(self, origin: bytes, data: bytes, lane: Lane, paged: bool = False) -> bytes:
        chunk = self._target.crypt.id_of(data, paged)
        if self._ingest.claim(chunk):
            lane.add(chunk, data, paged=paged)
        self._known[origin] = chunk
        return chunk

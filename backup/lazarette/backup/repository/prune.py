"""Freeing space: what no snapshot refers to any more is deleted, safely beside backups.

Vocabulary
    *live*: referred to by a snapshot, or needed by a patch that is.
    *to condemn* a pack: to take it out of the index and announce that it will be deleted.
    *mark*: a sealed object ``condemned/<id>`` that announces it, with the packs' records.
    *to sweep* a mark: to delete its packs, except those that turned out to be needed.

Protocol (checked over thousands of schedules by ``tests/unit/backup/test_prune_model.py``)
    P1.  A backup takes its lease, then reads the marks, then the index.  Chunks that are only
         in condemned packs count as absent for it: it stores them again.
    P2.  A prune holds the exclusive lease.  It writes new packs and index objects, then the
         mark, then lists the leases (``waits_for``), then takes old index objects away.
    P3.  A mark is swept when none of the leases in ``waits_for`` is alive.  A backup that could
         have read the index without the mark is one of them, and so is a restore of a snapshot
         forgotten meanwhile (unless that snapshot is itself so young that it relied on a
         condemned pack; such a restore, of something deleted under it, may find chunks gone).
    P4.  The sweep lists the snapshots after P3 and goes through those that the mark does not
         name; condemned packs that hold what they refer to are listed in the index again.
    P5.  A pack that some index object lists is never deleted.
    P6.  A backup whose lease ran out before its snapshot was written deletes the snapshot again
         unless everything it relied on is still there.
    P7.  An index object is written only while the lease is good: otherwise the packs it lists
         may have been swept as orphans meanwhile.  A run that was suspended between looking at
         its lease and writing looks again afterwards and takes the object back.

A crash between any two steps leaves garbage at worst, which the next prune finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from lazarette.backup.repository import indexes, marks, snapshots
from lazarette.backup.repository.chunks import ChunkReader
from lazarette.backup.repository.format import (
    CONDEMNED,
    ID_SIZE,
    PACKS,
    RepositoryDamaged,
    id_of,
    new_id,
    pack_name,
)
from lazarette.backup.repository.guard import Guard, Kind, LeaseLost
from lazarette.backup.repository.index import Index
from lazarette.backup.repository.marks import Mark
from lazarette.backup.repository.packs import (
    FOOT,
    PAGED_BIT,
    PATCH_BIT,
    PackBuilder,
    PackRecord,
    read_foot,
    read_list,
)
from lazarette.backup.repository.references import References
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.stores.contract import BlobNotFound
from lazarette.storage.errors import Cancelled, DamagedData, SnapshotNotFound

_MERGE_BELOW = 50_000
"""Index objects with fewer chunks than this are merged, bytes aside."""


@dataclass(frozen=True)
class PruneOptions:
    """How to prune.

    Attributes:
        dry_run: plan only.
        max_unused: share of dead bytes a pack may hold before it is rewritten.
        max_repack: most bytes rewritten in one go; the rest waits for the next.
    """

    dry_run: bool = False
    max_unused: float = 0.2
    max_repack: int = 1 << 34


@dataclass
class PruneReport:
    """What a prune did, or would do.

    Attributes:
        packs_kept: wholly or mostly live.
        packs_dropped: wholly dead.
        packs_rewritten: partly dead, live chunks copied.
        packs_orphaned: in no index; left by killed runs.
        bytes_freed: stored bytes of condemned packs less those written anew.
        packs_deleted: packs deleted by this call, earlier marks' among them.
        packs_rescued: condemned packs found to be needed after all.
        packs_waiting: condemned packs that running backups or restores may still use.
    """

    packs_kept: int = 0
    packs_dropped: int = 0
    packs_rewritten: int = 0
    packs_orphaned: int = 0
    bytes_freed: int = 0
    packs_deleted: int = 0
    packs_rescued: int = 0
    packs_waiting: int = 0


@dataclass
class _Plan:
    condemned: set[bytes] = field(default_factory=set)
    rewrite: list[bytes] = field(default_factory=list)
    orphans: dict[bytes, int] = field(default_factory=dict)
    live: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    considered: list[str] = field(default_factory=list)


def run(
    repo: Repository,
    options: PruneOptions | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> PruneReport:
    """Free what no snapshot refers to.

    Args:
        repo: the repository; its index is read anew.
        options: how.
        cancelled: asked for every directory and pack.

    Raises:
        RepositoryDamaged: a snapshot cannot be gone through; nothing is deleted then.
        InUse: another prune is at it.
        Cancelled: as asked; nothing is lost.
    """
    options = options or PruneOptions()
    with repo.guard.hold(Kind.MAINTAIN, "prune") as guard:
        report = PruneReport()
        if not options.dry_run:
            _sweep_all(repo, guard, report)
        work = _Prune(repo, guard, options, report, cancelled)
        plan = work.plan()
        if not options.dry_run:
            work.apply(plan)
            _sweep_all(repo, guard, report)
        return report


class _Prune:
    def __init__(
        self,
        repo: Repository,
        guard: Guard,
        options: PruneOptions,
        report: PruneReport,
        cancelled: Callable[[], bool],
    ) -> None:
        self._repo = repo
        self._guard = guard
        self._options = options
        self._report = report
        self._cancelled = cancelled
        self._index = Index()
        self._objects: dict[str, list[PackRecord]] = {}
        self._reader = ChunkReader(repo.store, repo.crypt, self._index, trees=repo.trees)

    def plan(self) -> _Plan:
        """Find out what is live and what to do about the rest."""
        plan = _Plan()
        # Packs first: one that is uploaded later is in no list and in no plan.
        sizes = {id_of(info.name): info.size for info in self._repo.store.list(PACKS)}
        marked = {
            record.pack
            for mark in marks.load(self._repo.store, self._repo.crypt).values()
            for record in mark.records
        }
        for name in indexes.names(self._repo.store):
            records = indexes.read(self._repo.store, self._repo.crypt, name, None) or []
            self._objects[name] = records
            self._index.add(records)
        self._index.consolidate()
        plan.live = np.zeros(len(self._index.row_lengths()), bool)
        walk = References(self._reader)
        for snapshot in snapshots.ids(self._repo.store):
            try:
                record = snapshots.load(self._repo.store, self._repo.crypt, snapshot)
            except SnapshotNotFound:
                continue
            plan.considered.append(snapshot)
            self._mark_live(walk, record, plan.live)
        self._classify(plan)
        for pack, size in sizes.items():
            if not self._index.has_pack(pack) and pack not in marked:
                plan.orphans[pack] = size
        self._report.packs_orphaned = len(plan.orphans)
        self._report.bytes_freed += sum(plan.orphans.values())
        return plan

    def _mark_live(self, walk: References, record: SnapshotRecord, live: np.ndarray) -> None:
        for _, ids in walk.of(record.root):
            if self._cancelled():
                raise Cancelled("prune was cancelled")
            _mark(self._index, ids, live)

    def _classify(self, plan: _Plan) -> None:
        costs = self._index.row_costs()
        packs = self._index.row_packs()
        heads = self._index.packs()
        alive = np.bincount(packs[plan.live], costs[plan.live], len(heads))
        total = np.bincount(packs, costs, len(heads))
        partly: list[tuple[float, int]] = []
        for number, head in enumerate(heads):
            share = 1 - alive[number] / max(total[number], 1)
            if alive[number] == 0:
                plan.condemned.add(head.pack)
                self._report.packs_dropped += 1
                self._report.bytes_freed += head.size
            elif share > self._options.max_unused:
                partly.append((share, number))
            else:
                self._report.packs_kept += 1
        budget = self._options.max_repack
        for share, number in sorted(partly, reverse=True):
            if alive[number] > budget:
                self._report.packs_kept += 1
                continue
            budget -= int(alive[number])
            plan.rewrite.append(heads[number].pack)
            self._report.packs_rewritten += 1
            self._report.bytes_freed += int(heads[number].size * share)

    def apply(self, plan: _Plan) -> None:
        """Write anew what is to be kept of rewritten packs, then condemn."""
        records = {record.pack: record for found in self._objects.values() for record in found}
        written = self._rewrite(plan, records)
        condemned = plan.condemned | set(plan.rewrite)
        stale = [
            name
            for name, found in self._objects.items()
            if any(record.pack in condemned for record in found)
        ]
        small = [
            name
            for name, found in self._objects.items()
            if sum(len(record.chunks) for record in found) < _MERGE_BELOW and name not in stale
        ]
        if len(small) > 4 or stale:
            stale += small
        keep = {
            record.pack: record
            for name in stale
            for record in self._objects[name]
            if record.pack not in condemned
        }
        self._guard.confirm()
        listed, _ = indexes.write(self._repo.store, self._repo.crypt, [*keep.values(), *written])
        try:
            self._guard.check()
        except LeaseLost:
            for name in listed:
                self._repo.store.delete(name)
            raise
        gone = [records[pack] for pack in condemned]
        gone += [_orphan_record(self._repo, pack, size) for pack, size in plan.orphans.items()]
        if gone:
            _condemn(self._repo, self._guard, gone, plan.considered)
        self._guard.check()
        for name in stale:
            self._repo.store.delete(name)
        self._repo.forget_index(set(stale))

    def _rewrite(self, plan: _Plan, records: dict[bytes, PackRecord]) -> list[PackRecord]:
        written: list[PackRecord] = []
        builders: dict[int, PackBuilder] = {}
        numbers = {head.pack: number for number, head in enumerate(self._index.packs())}
        packs = self._index.row_packs()
        for pack in plan.rewrite:
            if self._cancelled():
                raise Cancelled("prune was cancelled")
            live = np.flatnonzero(plan.live & (packs == numbers[pack]))
            record = records[pack]
            ids = self._index.row_ids(live)
            keep = {ids[at : at + ID_SIZE] for at in range(0, len(ids), ID_SIZE)}
            for chunk, payload, needs, paged in self._payloads(record, keep):
                builder = builders.get(record.kind)
                if builder is None:
                    builder = builders[record.kind] = PackBuilder(
                        self._repo.crypt, record.kind, self._repo.clock.now_ns()
                    )
                builder.add(chunk, payload, needs, paged)
                if builder.size >= 16 << 20:
                    written.append(self._send(builders.pop(record.kind)))
        written += [self._send(builder) for builder in builders.values()]
        return written

    def _payloads(
        self, record: PackRecord, keep: set[bytes]
    ) -> list[tuple[bytes, bytes, tuple[bytes, ...], bool]]:
        found = []
        for chunk, length in record.chunk_rows():
            if chunk in keep:
                keep.discard(chunk)
                location = self._reader.locate(chunk)
                block = self._reader.block(location)
                payload = block[location.start : location.start + location.length]
                patch = length & PATCH_BIT
                paged = bool(length & PAGED_BIT)
                if not patch and self._repo.crypt.id_of(payload, paged) != chunk:
                    raise RepositoryDamaged(
                        f"chunk {chunk.hex()} of pack {record.pack.hex()} is damaged",
                        hint="run laz repo repair",
                    )
                found.append((chunk, payload, self._index.needs(chunk) if patch else (), paged))
        return found

    def _send(self, builder: PackBuilder) -> PackRecord:
        data, record = builder.finish()
        self._guard.check()
        self._repo.store.put(pack_name(record.pack), data)
        return record


def _mark(index: Index, ids: bytes, live: np.ndarray) -> None:
    if not ids:
        return
    rows = index.rows(ids)
    if (rows < 0).any():
        raise RepositoryDamaged(
            "a snapshot refers to chunks that are in no pack; nothing is deleted",
            hint="run laz repo check, then repair",
        )
    live[rows] = True
    needs = b"".join(
        need for at in range(0, len(ids), ID_SIZE) for need in index.needs(ids[at : at + ID_SIZE])
    )
    _mark(index, needs, live)


def _orphan_record(repo: Repository, pack: bytes, size: int) -> PackRecord:
    """Record of a pack that no index lists, from the pack itself if it can be read."""
    name = pack_name(pack)
    try:
        foot = read_foot(name, repo.store.get(name, max(size - FOOT.size, 0)), size)
        listing = repo.store.get(name, foot.list_at, foot.list_length)
        return read_list(repo.crypt, pack, listing, size)
    except (BlobNotFound, DamagedData):
        return PackRecord(pack, 0, b"\0\0", size, b"", b"", b"", 0)


def _condemn(
    repo: Repository, guard: Guard, records: list[PackRecord], considered: list[str]
) -> None:
    name = CONDEMNED + new_id().hex()
    mark = Mark(records, considered, None, repo.clock.now_ns())
    guard.check()
    marks.save(repo.store, repo.crypt, name, mark)
    _note_leases(repo, guard, name, mark)


def _note_leases(repo: Repository, guard: Guard, name: str, mark: Mark) -> Mark:
    mark = msgspec.structs.replace(mark, waits_for=sorted(guard.others()))
    marks.save(repo.store, repo.crypt, name, mark)
    return mark


def _sweep_all(repo: Repository, guard: Guard, report: PruneReport) -> None:
    report.packs_waiting = 0
    for name, mark in marks.load(repo.store, repo.crypt).items():
        if mark.waits_for is None:
            mark = _note_leases(repo, guard, name, mark)
        if set(mark.waits_for or ()) & guard.others():
            report.packs_waiting += len(mark.records)
            continue
        _sweep(repo, guard, name, mark, report)


def _sweep(repo: Repository, guard: Guard, name: str, mark: Mark, report: PruneReport) -> None:
    needed = _needed(repo, mark)
    if needed:
        indexes.write(repo.store, repo.crypt, needed)
        report.packs_rescued += len(needed)
    kept = {
        record.pack
        for listed in indexes.names(repo.store)
        for record in indexes.read(repo.store, repo.crypt, listed, None) or ()
    }
    for record in mark.records:
        if record.pack not in kept:
            guard.check()
            repo.store.delete(pack_name(record.pack))
            report.packs_deleted += 1
    repo.store.delete(name)


def _needed(repo: Repository, mark: Mark) -> Sequence[PackRecord]:
    """Condemned packs that hold what a snapshot written since refers to."""
    considered = set(mark.considered)
    fresh = [one for one in snapshots.ids(repo.store) if one not in considered]
    if not fresh:
        return []
    listed = Index()
    for name in indexes.names(repo.store):
        listed.add(indexes.read(repo.store, repo.crypt, name, None) or ())
    condemned = Index()
    records = [record for record in mark.records if record.blocks]
    condemned.add(records)
    whole = Index()
    for name in indexes.names(repo.store):
        whole.add(indexes.read(repo.store, repo.crypt, name, None) or ())
    whole.add(records)
    reader = ChunkReader(repo.store, repo.crypt, whole, trees=repo.trees)
    walk = References(reader)
    needed: set[bytes] = set()
    for snapshot in fresh:
        try:
            record = snapshots.load(repo.store, repo.crypt, snapshot)
        except SnapshotNotFound:
            continue
        for _, ids in walk.of(record.root):
            _need(ids, listed, condemned, needed)
    return [record for record in records if record.pack in needed]


def _need(ids: bytes, listed: Index, condemned: Index, needed: set[bytes]) -> None:
    for at in range(0, len(ids), ID_SIZE):
        chunk = ids[at : at + ID_SIZE]
        if chunk not in listed:
            pack = condemned.pack_of(chunk)
            if pack is not None:
                needed.add(pack)
        needs = listed.needs(chunk) or condemned.needs(chunk)
        if needs:
            _need(b"".join(needs), listed, condemned, needed)

"""Making the best of damage.

Index objects that do not open are made again from the packs' own lists.  Of a damaged pack
the chunks that are whole are written anew; the others are noted as lost.  The next backup
reads files that hold lost chunks again, whatever their times say, and stores what is still
the same on the live volume: older snapshots become whole by that too.  Nothing that might
still be of use is deleted; damaged packs go when prune finds them in no index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazarette.backup.repository import check, indexes, lost
from lazarette.backup.repository.chunks import ChunkReader
from lazarette.backup.repository.format import INDEXES, PACKS, SNAPSHOTS, pack_name
from lazarette.backup.repository.guard import Kind
from lazarette.backup.repository.packs import (
    FOOT,
    PAGED_BIT,
    PATCH_BIT,
    PackBuilder,
    PackRecord,
    read_foot,
    read_list,
)
from lazarette.backup.repository.repository import Repository
from lazarette.backup.stores.contract import BlobNotFound
from lazarette.storage.errors import DamagedData


@dataclass
class RepairReport:
    """What a repair did.

    Attributes:
        found: the check it began with.
        indexes_rebuilt: index objects that did not open and were made again.
        packs_adopted: packs listed again from their own lists.
        packs_rewritten: damaged packs whose whole chunks were saved.
        chunks_saved: how many.
        chunks_lost: noted, to be stored again by the next backup.
        snapshots_dropped: snapshot objects that do not open and were deleted, if asked for.
    """

    found: check.CheckReport
    indexes_rebuilt: int = 0
    packs_adopted: int = 0
    packs_rewritten: int = 0
    chunks_saved: int = 0
    chunks_lost: int = 0
    snapshots_dropped: int = 0


def run(
    repo: Repository,
    drop_snapshots: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
) -> RepairReport:
    """Check everything, then repair what can be.

    Args:
        repo: the repository.
        drop_snapshots: delete snapshot objects that do not open.
        cancelled: asked as in a check.

    Raises:
        InUse: another maintenance is at work.
        Cancelled: as asked, before anything was changed.
    """
    with repo.guard.hold(Kind.MAINTAIN, "repair") as guard:
        report = RepairReport(check.run(repo.store, repo.crypt, 1.0, cancelled=cancelled))
        guard.confirm()
        _indexes(repo, report)
        _packs(repo, report)
        for problem in report.found.problems:
            if drop_snapshots and problem.object.startswith(SNAPSHOTS) and not problem.chunks:
                repo.store.delete(problem.object)
                report.snapshots_dropped += 1
        repo.refresh()
        return report


def _indexes(repo: Repository, report: RepairReport) -> None:
    bad = [one.object for one in report.found.problems if one.object.startswith(INDEXES)]
    if not bad:
        return
    adopted = []
    for pack in report.found.unused_packs:
        name = pack_name(pack)
        try:
            size = repo.store.stat(name).size
            foot = read_foot(name, repo.store.get(name, max(size - FOOT.size, 0)), size)
            listing = repo.store.get(name, foot.list_at, foot.list_length)
            adopted.append(read_list(repo.crypt, pack, listing, size))
        except (BlobNotFound, DamagedData):
            continue
    indexes.write(repo.store, repo.crypt, adopted)
    for name in bad:
        repo.store.delete(name)
    report.indexes_rebuilt = len(bad)
    report.packs_adopted = len(adopted)


def _packs(repo: Repository, report: RepairReport) -> None:
    index = repo.listed()
    records = _records(repo)
    reader = ChunkReader(repo.store, repo.crypt, index)
    damaged: dict[bytes, set[bytes]] = {}
    gone: set[bytes] = set()
    for problem in report.found.problems:
        gone |= problem.chunks
        if problem.object.startswith(PACKS):
            damaged[bytes.fromhex(problem.object.rpartition("/")[2])] = set(problem.chunks)
    written: list[PackRecord] = []
    for pack, bad in damaged.items():
        if pack in records:
            written += _salvage(repo, reader, records[pack], bad, report)
            report.packs_rewritten += 1
    if damaged:
        _relist(repo, set(damaged), written)
    if gone:
        lost.note(repo.store, repo.crypt, gone)
    report.chunks_lost = len(gone)


def _records(repo: Repository) -> dict[bytes, PackRecord]:
    found = {}
    for name in indexes.names(repo.store):
        for record in indexes.read(repo.store, repo.crypt, name, None) or ():
            found[record.pack] = record
    return found


def _salvage(
    repo: Repository,
    reader: ChunkReader,
    record: PackRecord,
    bad: set[bytes],
    report: RepairReport,
) -> list[PackRecord]:
    builder = PackBuilder(repo.crypt, record.kind, repo.clock.now_ns())
    for chunk, length in record.chunk_rows():
        if chunk in bad or reader.locate(chunk).pack != record.pack:
            continue
        try:
            payload, needs = reader.payload(chunk)
        except DamagedData:
            continue
        assert bool(needs) == bool(length & PATCH_BIT)
        builder.add(chunk, bytes(payload), needs, bool(length & PAGED_BIT))
        report.chunks_saved += 1
    if builder.empty:
        return []
    data, written = builder.finish()
    repo.store.put(pack_name(written.pack), data)
    return [written]


def _relist(repo: Repository, without: set[bytes], written: list[PackRecord]) -> None:
    """Write index objects anew that list damaged packs, without those."""
    stale = {}
    for name in indexes.names(repo.store):
        records = indexes.read(repo.store, repo.crypt, name, None) or []
        if any(record.pack in without for record in records):
            stale[name] = [record for record in records if record.pack not in without]
    kept = [record for records in stale.values() for record in records]
    indexes.write(repo.store, repo.crypt, [*kept, *written])
    for name in stale:
        repo.store.delete(name)
    repo.forget_index(set(stale))

"""What a repository holds, and what each snapshot and volume costs in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lazarette.backup.repository.format import PACKS
from lazarette.backup.repository.references import References
from lazarette.backup.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class SnapshotSize:
    """Sizes of one snapshot.

    Attributes:
        snapshot: its id.
        volume: of what.
        raw: bytes of content (apparent sizes).
        referenced: stored bytes of all it refers to.
        exclusive: stored bytes only it refers to: what forgetting it would free.
    """

    snapshot: str
    volume: str
    raw: int
    referenced: int
    exclusive: int


@dataclass(frozen=True)
class RepositoryStats:
    """Sizes of a repository.

    Attributes:
        stored: bytes of all packs.
        used: stored bytes of what some snapshot refers to.
        chunks: chunks known.
        plain: bytes of the chunks in use before compression.
        packs: packs the index names.
        raw: bytes of content over all snapshots.
        snapshots: sizes of each.
        volumes: stored bytes each volume refers to.
    """

    stored: int
    used: int
    chunks: int
    plain: int
    packs: int
    raw: int
    snapshots: tuple[SnapshotSize, ...]
    volumes: dict[str, int]


def run(repo: Repository) -> RepositoryStats:
    """Go through every snapshot and add up.

    Memory: two numbers a chunk, and one bit a chunk while a snapshot is gone through.

    Raises:
        RepositoryDamaged: a page is missing or damaged.
    """
    repo.refresh()
    index = repo.index
    index.consolidate()
    costs = index.row_costs()
    users = np.zeros(len(costs), np.uint32)
    last = np.full(len(costs), -1, np.int32)
    records = repo.snapshots()
    volumes: dict[str, np.ndarray] = {}
    referenced = []
    for number, record in enumerate(records):
        used = np.zeros(len(costs), bool)
        for _, ids in References(repo.reader).of(record.root):
            mark(repo, ids, used)
        users[used] += 1
        last[used] = number
        referenced.append(int(costs[used].sum()))
        volumes[record.volume] = volumes.get(record.volume, np.zeros(len(costs), bool)) | used
    exclusive = [int(costs[(users == 1) & (last == n)].sum()) for n in range(len(records))]
    return RepositoryStats(
        sum(info.size for info in repo.store.list(PACKS)),
        int(costs[users > 0].sum()),
        len(index),
        int(index.row_lengths()[users > 0].sum(dtype=np.int64)),
        len(index.packs()),
        sum(record.stats.bytes_total for record in records),
        tuple(
            SnapshotSize(record.id, record.volume, record.stats.bytes_total, whole, alone)
            for record, whole, alone in zip(records, referenced, exclusive, strict=True)
        ),
        {volume: int(costs[used].sum()) for volume, used in sorted(volumes.items())},
    )


def mark(repo: Repository, ids: bytes, used: np.ndarray) -> None:
    """Set the rows of chunks, and of those that patches among them need."""
    if not ids:
        return
    rows = repo.index.rows(ids)
    used[rows[rows >= 0]] = True
    needs = b"".join(
        need for at in range(0, len(ids), 16) for need in repo.index.needs(ids[at : at + 16])
    )
    if needs:
        mark(repo, needs, used)

"""Object lock: what snapshots still need is kept undeletable, and goes on being so.

New objects are locked for the bucket's default time when they are written.  An old pack that
a new snapshot still refers to would outlive its lock; :func:`extend` renews the locks of all
that the snapshots given need, in one pass over the index, and is meant to be run after each
backup or once a day.  Deleting a locked object only hides it: prune needs to know nothing of
locks, and a repository opened on ``store.as_of(time)`` is as it was then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lazarette.backup.repository import indexes, snapshots
from lazarette.backup.repository.format import CONFIG, pack_name
from lazarette.backup.repository.guard import Kind
from lazarette.backup.repository.references import References
from lazarette.backup.repository.repository import Repository
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.repository.statistics import mark
from lazarette.backup.stores.contract import LockingStore
from lazarette.storage.errors import Cancelled

_KEYS = "keys/"
_AT_ONCE = 8


@dataclass
class LockReport:
    """What was locked.

    Attributes:
        locked: objects whose lock was set or renewed.
        kept: objects locked long enough already.
    """

    locked: int = 0
    kept: int = 0


def extend(
    repo: Repository,
    store: LockingStore,
    until_ns: int,
    records: Iterable[SnapshotRecord] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> LockReport:
    """Lock everything that snapshots need until a time.

    Args:
        repo: the repository.
        store: the same store as something that locks.
        until_ns: wall clock.
        records: which snapshots; None for all.
        cancelled: asked for every object.

    Raises:
        RepositoryDamaged: a snapshot cannot be gone through.
        Cancelled: as asked; what is locked stays locked.
    """
    report = LockReport()
    with repo.guard.hold(Kind.READ, "object locks"):
        repo.refresh()
        chosen = list(repo.snapshots() if records is None else records)

        def one(name: str) -> bool:
            """Whether the object's lock was too short."""
            if cancelled():
                raise Cancelled("extending locks was cancelled")
            if store.locked_until(name) >= until_ns:
                return False
            store.lock(name, until_ns)
            return True

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="lock") as pool:
            for locked in pool.map(one, _needed(repo, chosen)):
                report.locked += locked
                report.kept += not locked
    return report


def _needed(repo: Repository, records: list[SnapshotRecord]) -> list[str]:
    """Names of all objects the snapshots cannot do without."""
    index = repo.index
    index.consolidate()
    used = np.zeros(len(index.row_lengths()), bool)
    walk = References(repo.reader)
    for record in records:
        for _, ids in walk.of(record.root):
            mark(repo, ids, used)
    heads = index.packs()
    packs = [pack_name(heads[number].pack) for number in np.unique(index.row_packs()[used])]
    keys = [info.name for info in repo.store.list(_KEYS)]
    return [
        CONFIG,
        *keys,
        *indexes.names(repo.store),
        *(snapshots.name_of(record.id) for record in records),
        *packs,
    ]

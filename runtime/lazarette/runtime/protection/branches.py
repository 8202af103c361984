"""Branches: writable volumes that begin as a point of another one's past, or its present.

Where the point is at hand, as the volume itself or a snapshot of it on this host, a branch is
the driver's clone.  Else it shows the repository's snapshot at once and fetches only what is
read; what it does not change it shares, by a cache on disk, with every other branch.  Told to
become whole (``laz volume fill --start``) it ends as an ordinary volume.

An *ephemeral* branch is removed with the last container that uses it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.runtime.events import Event, EventBus
from lazarette.runtime.protection.fills import FillService
from lazarette.runtime.protection.repositories import RepositoryBook, RepositoryUnknown
from lazarette.runtime.protection.restores import LATEST, RestoreService, choose_point
from lazarette.runtime.protection.runs import RunBook
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import (
    InvalidArgument,
    LazaretteError,
    NameTaken,
    SnapshotNotFound,
    VolumeNotFound,
)
from lazarette.storage.state import State
from lazarette.storage.volumes.contract import SnapshotInfo
from lazarette.storage.volumes.manager import Volume, VolumeManager
from lazarette.storage.volumes.names import check_name
from lazarette.storage.volumes.store import WrongDriver

log = logging.getLogger(__name__)

LABEL = "lazarette.branch"
_OWN_LABELS = "lazarette."
FROM = "from"
_OPTIONS = ("ephemeral", "fill", FROM, "repository")
_TRUE = ("1", "true", "yes", "on", "")
_MIGRATIONS = (
    """
    CREATE TABLE branches (
        volume TEXT PRIMARY KEY,
        source TEXT NOT NULL,
        ephemeral INTEGER NOT NULL,
        used INTEGER NOT NULL DEFAULT 0
    ) STRICT
    """,
)


@dataclass(frozen=True)
class Wanted:
    """A branch to make.

    Attributes:
        source: ``VOLUME`` for its present state, or ``VOLUME@POINT``; a point is a snapshot
            here, or what :func:`choose_point` takes.
        name: of the branch.
        repository: where points are looked for; the only or default one when empty.
        ephemeral: it goes with the last container that uses it.
        fill: everything is brought here in the background.
    """

    source: str
    name: str
    repository: str = ""
    ephemeral: bool = False
    fill: bool = False

    @classmethod
    def of_options(cls, name: str, options: Mapping[str, str]) -> Wanted:
        """Of the options of ``docker volume create``.

        Raises:
            InvalidArgument: there are others than a branch has.
        """
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise InvalidArgument(
                f"create {name}: a branch has no option {', '.join(unknown)}",
                hint=f"valid options beside {FROM}: ephemeral, fill, repository",
            )

        def flag(key: str) -> bool:
            return key in options and options[key].lower() in _TRUE

        repository = options.get("repository", "")
        return cls(options[FROM], name, repository, flag("ephemeral"), flag("fill"))


@dataclass(frozen=True)
class _Local:
    """The point is on this host: a snapshot, or the present state when empty."""

    snapshot: str


@dataclass(frozen=True)
class _Remote:
    """The point is in a repository."""

    record: SnapshotRecord


class BranchService:
    """Makes branches.

    Args:
        volumes: the volumes.
        repositories: where points are.
        restores: shows those that are not here.
        fills: removes those that are not ordinary.
        runs: which snapshots here are restore points too.
        referrers: ids of the containers, stopped ones too, that name a volume.
        events: told of new branches; tells of containers that go.
        state: the daemon's database.
    """

    def __init__(
        self,
        volumes: VolumeManager,
        repositories: RepositoryBook,
        restores: RestoreService,
        fills: FillService,
        runs: RunBook,
        referrers: Callable[[str], Sequence[str]],
        events: EventBus,
        state: State,
    ) -> None:
        self._volumes = volumes
        self._repositories = repositories
        self._restores = restores
        self._fills = fills
        self._runs = runs
        self._referrers = referrers
        self._events = events
        self._state = state
        self._removing: set[asyncio.Task[None]] = set()
        state.migrate("branches", _MIGRATIONS)
        volumes.origin = self.create

    async def start(self) -> None:
        """Remove ephemeral branches whose containers went meanwhile; look after the others."""
        self._events.on_event(self._seen)
        await asyncio.to_thread(self._sweep)

    async def stop(self) -> None:
        """Wait for removals under way."""
        await asyncio.gather(*self._removing, return_exceptions=True)

    def create(self, name: str, options: Mapping[str, str], labels: Mapping[str, str]) -> Volume:
        """Make a volume by ``from=``, or return the one there is when that is its source.

        Raises:
            WrongDriver: the name is taken by another volume.
        """
        wanted = Wanted.of_options(name, options)
        try:
            existing = self._volumes.get(name)
        except VolumeNotFound:
            return self.branch(wanted, labels)
        row = self._state.row("SELECT source FROM branches WHERE volume = ?", (name,))
        if row is None or str(row["source"]) != wanted.source:
            raise WrongDriver(f"create {name}: a volume of that name exists with other options")
        return existing

    def branch(self, wanted: Wanted, labels: Mapping[str, str] | None = None) -> Volume:
        """Make a branch; blocks for less than a second where the point is at hand.

        Raises:
            NameTaken: there is a volume of that name.
            VolumeNotFound: there is no volume to branch from, here or in the repository.
            SnapshotNotFound: it has no such point.
        """
        check_name(wanted.name)
        if wanted.name in {volume.name for volume in self._volumes.list()}:
            raise NameTaken(f"branch {wanted.source}: a volume {wanted.name} exists already")
        source, _, point = wanted.source.partition("@")
        found = self._point(source, point, "@" in wanted.source, wanted.repository)
        own = dict(labels or {})
        with self._state.write() as db:
            db.execute(
                "INSERT OR REPLACE INTO branches (volume, source, ephemeral) VALUES (?, ?, ?)",
                (wanted.name, wanted.source, int(wanted.ephemeral)),
            )
        try:
            if isinstance(found, _Local):
                kept = _kept(self._volumes.get(source).labels)
                own = kept | {LABEL: f"{source}@{found.snapshot or 'present'}"} | own
                self._volumes.clone(source, found.snapshot or None, wanted.name, own)
            else:
                own = {LABEL: f"{source}@{found.record.id}"} | own
                self._restores.show(
                    wanted.name, found.record, wanted.repository, lazy=not wanted.fill, labels=own
                )
        except LazaretteError:
            self._forget(wanted.name)
            raise
        return self._volumes.get(wanted.name)

    # ---- which point

    def _point(self, source: str, point: str, pointed: bool, repository: str) -> _Local | _Remote:
        here = self._snapshots(source)
        if not pointed:
            if here is None:
                raise VolumeNotFound(
                    f"branch {source}: no such volume here",
                    hint=f"name a point of its backups: {source}@{LATEST}",
                )
            self._fills.require_ordinary(source)
            return _Local("")
        ordinary = here is not None and self._fills.of(source) is None
        local = {one.id: one for one in here or ()} if ordinary else {}
        if point in local and not repository:
            return _Local(point)
        try:
            opened = self._repositories.open(repository)
        except RepositoryUnknown:
            if repository or not local:
                raise
            return _Local(_newest(local, point, source))
        records = opened.snapshots(source)
        if not records and local:
            return _Local(_newest(local, point, source))
        record = choose_point(records, point)
        known = self._repositories.get(repository).name
        for run in self._runs.bases(source, known):
            if run.snapshot == record.id and run.local in local:
                return _Local(run.local)
        return _Remote(record)

    def _snapshots(self, volume: str) -> Sequence[SnapshotInfo] | None:
        try:
            return self._volumes.snapshots(volume)
        except VolumeNotFound:
            return None

    # ---- ephemeral ones

    def _seen(self, event: Event) -> None:
        if event.type == "container" and event.action in ("create", "destroy"):
            task = asyncio.create_task(asyncio.to_thread(self._sweep))
            self._removing.add(task)
            task.add_done_callback(self._removing.discard)

    def _sweep(self) -> None:
        """Note which ephemeral branches are used, remove those that are no longer."""
        for row in self._state.rows("SELECT * FROM branches WHERE ephemeral = 1"):
            volume = str(row["volume"])
            if self._referrers(volume):
                if not row["used"]:
                    with self._state.write() as db:
                        db.execute("UPDATE branches SET used = 1 WHERE volume = ?", (volume,))
            elif row["used"]:
                self._remove(volume)

    def _remove(self, volume: str) -> None:
        try:
            self._fills.remove(volume, force=True)
        except LazaretteError as busy:
            log.warning("the ephemeral branch %s stays: %s", volume, busy)
            return
        self._forget(volume)
        self._events.publish("volume", "destroy", volume, {"driver": "local"})

    def _forget(self, volume: str) -> None:
        with self._state.write() as db:
            db.execute("DELETE FROM branches WHERE volume = ?", (volume,))


def _kept(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels a branch takes over: not those that would have it backed up as its source."""
    return {key: value for key, value in labels.items() if not key.startswith(_OWN_LABELS)}


def _newest(local: Mapping[str, SnapshotInfo], point: str, source: str) -> str:
    """The newest snapshot here, or the newest at or before a time.

    Raises:
        SnapshotNotFound: there is none.
    """
    ordered = sorted(local.values(), key=lambda one: one.created_ns)
    if point not in ("", LATEST):
        try:
            moment = datetime.fromisoformat(point)
        except ValueError as bad:
            raise SnapshotNotFound(
                f"no snapshot {point} of volume {source}", hint=f"laz volume snapshots {source}"
            ) from bad
        zoned = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        limit = int(zoned.timestamp() * NANOSECONDS)
        ordered = [one for one in ordered if one.created_ns <= limit]
    if not ordered:
        raise SnapshotNotFound(f"volume {source} has no such snapshot", hint="laz backup ls")
    return ordered[-1].id

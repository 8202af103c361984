"""A repository: opened, its snapshots listed, things added and read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from lazarette.backup.repository import check, indexes, marks, snapshots
from lazarette.backup.repository.blockcache import BlockCache
from lazarette.backup.repository.check import CheckReport
from lazarette.backup.repository.chunks import ChunkReader
from lazarette.backup.repository.format import (
    CONFIG,
    INDEXES,
    OLDEST_VERSION,
    PACKS,
    PAGED_VERSION,
    VERSION,
    Crypt,
    WrongRepository,
    id_of,
    seal,
    unseal,
)
from lazarette.backup.repository.guard import Guard, Guards, Kind, LeaseGuards
from lazarette.backup.repository.index import Index
from lazarette.backup.repository.ingest import Ingest
from lazarette.backup.repository.keys import MasterKeys, Secret, unlock
from lazarette.backup.repository.leases import Leases
from lazarette.backup.repository.malformed import MALFORMED
from lazarette.backup.repository.packs import PackRecord
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.backup.repository.treecache import ObjectCache, TreeCache
from lazarette.backup.stores.ahead import ahead
from lazarette.backup.stores.contract import AlreadyThere, BlobNotFound, BlobStore
from lazarette.storage.clock import Clock
from lazarette.storage.errors import InvalidArgument, NameTaken, SnapshotNotFound


class Config(msgspec.Struct, frozen=True):
    """What a repository is, fixed when it is made.

    Attributes:
        id: 32 hexadecimal digits, of this repository only.
        created_ns: wall clock.
        version: of the format.
    """

    id: str
    created_ns: int
    version: int = VERSION


_RECORDS_AT_ONCE = 10_000
_OBJECTS_AT_ONCE = 8
_LOOK_AGAIN_NS = 20_000_000_000

_encode = msgspec.msgpack.Encoder().encode
_decode_config = msgspec.msgpack.Decoder(Config).decode


class Repository:
    """Use :meth:`create` or :meth:`open`.

    Attributes:
        store: where it is.
        keys: its secrets.
        crypt: the same, ready for use.
        clock: time.
        config: what it is.
        index: the chunks known here; filled by the first :meth:`refresh`.
        reader: chunks by id.
    """

    def __init__(
        self,
        store: BlobStore,
        keys: MasterKeys,
        clock: Clock,
        config: Config,
        cache_dir: Path | None,
        guards: Guards | None = None,
    ) -> None:
        self.store = store
        self.guard: Guards = guards or LeaseGuards(Leases(store, clock))
        self.keys = keys
        self.crypt = crypt = Crypt(keys)
        self.clock = clock
        self.config = config
        self.cache_dir = None if cache_dir is None else cache_dir / config.id
        self._objects = None if self.cache_dir is None else ObjectCache(self.cache_dir / "objects")
        self.trees = TreeCache(store, self._objects)
        self.index = Index()
        self.reader = ChunkReader(
            store, crypt, self.index, trees=self.trees, refresh=self._look_again
        )
        self._seen: set[str] = set()
        self._marks: set[str] = set()
        self._looked_ns = -_LOOK_AGAIN_NS
        self._lock = threading.RLock()

    @staticmethod
    def create(
        store: BlobStore,
        keys: MasterKeys,
        clock: Clock,
        cache_dir: Path | None = None,
        version: int = VERSION,
    ) -> Repository:
        """Make a repository in an empty store.

        Args:
            store: where.
            keys: from :func:`lazarette.backup.repository.keys.create`.
            clock: time.
            cache_dir: as in :meth:`open`.
            version: of the format; an older one for hosts with an older program.

        Raises:
            NameTaken: there is one already.
        """
        config = Config(keys.repository_id.hex(), clock.now_ns(), version)
        try:
            store.put(
                CONFIG, seal(Crypt(keys), CONFIG, _encode(config), index=True), if_absent=True
            )
        except AlreadyThere:
            raise NameTaken(f"there is a repository at {store.url} already") from None
        Leases.create(store)
        return Repository(store, keys, clock, config, cache_dir)

    @staticmethod
    def open(
        store: BlobStore, keys: MasterKeys, clock: Clock, cache_dir: Path | None = None
    ) -> Repository:
        """Open a repository.

        Args:
            store: where it is.
            keys: from :func:`lazarette.backup.repository.keys.unlock`.
            clock: time.
            cache_dir: a local folder for copies of index and directories; None for none.

        Raises:
            WrongRepository: there is none, or a newer program made it.
            RepositoryDamaged: its config is not what was written.
        """
        return Repository._opened(store, keys, clock, cache_dir, lambda: store.get(CONFIG))

    @staticmethod
    def unlock(
        store: BlobStore, secret: Secret, clock: Clock, cache_dir: Path | None = None
    ) -> Repository:
        """Open a repository with one of its secrets.

        Raises:
            NoKeys, WrongKey, DamagedKey: see :func:`lazarette.backup.repository.keys.unlock`.
            WrongRepository, RepositoryDamaged: see :meth:`open`.
        """
        config = ahead(store, lambda: store.get(CONFIG))
        return Repository._opened(store, unlock(store, secret), clock, cache_dir, config)

    @staticmethod
    def _opened(
        store: BlobStore,
        keys: MasterKeys,
        clock: Clock,
        cache_dir: Path | None,
        read: Callable[[], bytes],
    ) -> Repository:
        try:
            stored = read()
        except BlobNotFound:
            raise WrongRepository(
                f"there is no repository at {store.url}", hint="make one with laz repo init"
            ) from None
        try:
            config = _decode_config(unseal(Crypt(keys), CONFIG, stored))
        except MALFORMED as bad:
            raise WrongRepository(f"the config at {store.url} is malformed: {bad}") from bad
        if not OLDEST_VERSION <= config.version <= VERSION:
            raise WrongRepository(
                f"the repository at {store.url} has version {config.version}, this program"
                f" reads {OLDEST_VERSION} to {VERSION}",
                hint="upgrade lazarette",
            )
        return Repository(store, keys, clock, config, cache_dir)

    @property
    def paged(self) -> bool:
        """Whether it may hold chunks named by the hashes of their pages."""
        return self.config.version >= PAGED_VERSION

    def migrate(self) -> bool:
        """Bring the format up to this program's version; False when it is already.

        What is stored stays as it is and readable; programs that know only the older version
        refuse the repository from then on.

        Raises:
            InUse: maintenance is at work.
        """
        if self.config.version == VERSION:
            return False
        with self.guard.hold(Kind.MAINTAIN, "migrate") as guard:
            config = msgspec.structs.replace(self.config, version=VERSION)
            sealed = seal(self.crypt, CONFIG, _encode(config), index=True)
            guard.confirm()
            self.store.put(CONFIG, sealed)
            self.config = config
        return True

    def keep_blocks(self, limit: int) -> None:
        """Keep copies of the data read from now on in the local cache, at most so many bytes."""
        if self.cache_dir is not None:
            self.reader.kept = BlockCache(self.cache_dir / "blocks", limit, self.clock)

    def refresh(self) -> None:
        """Bring the index up to date with the store.

        What is written since is added; when something was taken away (a prune was there), the
        index is built anew.

        Raises:
            RepositoryDamaged: an index object is not what was written.
        """
        with self._lock:
            names = indexes.names(self.store)
            if self._seen - set(names):
                self.index.clear()
                self._seen.clear()
            listed = set(self._read_into(self.index, self._seen, None, names))
            # Marks after the index: a pack leaves the index only once its mark is written.
            # A condemned pack may still hold what a very young snapshot refers to.
            condemned = marks.load(self.store, self.crypt)
            if self._marks - condemned.keys():
                self.index.clear()
                self._seen.clear()
                listed = set(self._read_into(self.index, self._seen, None))
            for mark in condemned.values():
                self.index.add(record for record in mark.records if record.blocks)
            self._marks = set(condemned)
            if self._objects is not None:
                for stale in self._objects.names() - listed:
                    gone = stale.startswith(PACKS) and not self.index.has_pack(id_of(stale))
                    if gone or stale.startswith(INDEXES):
                        self._objects.drop(stale)

    def _read_into(
        self,
        index: Index,
        seen: set[str],
        without: set[bytes] | None,
        listed: list[str] | None = None,
    ) -> list[str]:
        while True:
            listed = indexes.names(self.store) if listed is None else listed
            merged = False
            gathered: list[PackRecord] = []
            for name, records in self._read_indexes([one for one in listed if one not in seen]):
                if records is None:
                    merged = True
                    continue
                gathered += [one for one in records if not without or one.pack not in without]
                seen.add(name)
                if len(gathered) > _RECORDS_AT_ONCE:
                    index.add(gathered)
                    gathered = []
            index.add(gathered)
            if not merged:
                return listed
            listed = None

    def _read_indexes(self, names: list[str]) -> Iterator[tuple[str, list[PackRecord] | None]]:
        """Index objects, a few at once; None for one that was merged into another meanwhile."""
        for at in range(0, len(names), _OBJECTS_AT_ONCE):
            some = names[at : at + _OBJECTS_AT_ONCE]
            reads = [
                ahead(self.store, partial(indexes.read, self.store, self.crypt, one, self._objects))
                for one in some
            ]
            for name, read in zip(some, reads, strict=True):
                yield name, read()

    def _look_again(self) -> None:
        """Refresh for a chunk that is not in the index, but not for each of many such."""
        with self._lock:
            now = self.clock.monotonic_ns()
            if now - self._looked_ns > _LOOK_AGAIN_NS:
                self._looked_ns = now
                self.refresh()

    def listed(self, without: set[bytes] | None = None) -> Index:
        """An index read anew: what index objects list now, less some packs."""
        index = Index()
        self._read_into(index, set(), without)
        return index

    def ready(self) -> None:
        """Load the index unless that was done."""
        with self._lock:
            if not self._seen:
                self.refresh()

    def forget_index(self, names: set[str]) -> None:
        """Start over with the index: packs listed in some of its objects are gone."""
        with self._lock:
            if names & self._seen:
                self.index.clear()
                self._seen.clear()

    def ingest(
        self,
        condemned: set[bytes] | None = None,
        uploads: int = 2,
        guard: Guard | None = None,
    ) -> Ingest:
        """A way to add chunks; see :class:`Ingest`.

        Args:
            condemned: packs about to be deleted: what only they hold is stored again.
            uploads: packs sent at once.
            guard: the lease it happens under.
        """
        self.refresh()
        known = self.index
        if condemned:
            known = self.listed(condemned)
        return Ingest(
            self.store,
            self.crypt,
            known,
            self.clock,
            self.trees,
            self,
            uploads,
            self.index,
            guard,
        )

    def write_index(self, records: Sequence[PackRecord]) -> tuple[list[str], int]:
        """List packs that were written; returns the names of the objects and their size."""
        names, size = indexes.write(self.store, self.crypt, records, self._objects)
        with self._lock:
            self._seen.update(names)
        return names, size

    def withdraw_index(self, names: Sequence[str]) -> None:
        """Delete index objects whose packs are all listed elsewhere."""
        for name in names:
            self.store.delete(name)
            if self._objects is not None:
                self._objects.drop(name)
        with self._lock:
            self._seen.difference_update(names)

    def snapshots(self, volume: str | None = None) -> list[SnapshotRecord]:
        """All snapshots, oldest first; those of one volume if it is named.

        Raises:
            RepositoryDamaged: one is not what was written.
        """
        found = []
        names = snapshots.ids(self.store)
        for at in range(0, len(names), _OBJECTS_AT_ONCE):
            some = names[at : at + _OBJECTS_AT_ONCE]
            for read in [ahead(self.store, partial(self._load_snapshot, one)) for one in some]:
                try:
                    record = read()
                except SnapshotNotFound:
                    continue
                if volume is None or record.volume == volume:
                    found.append(record)
        return sorted(found, key=lambda record: (record.time_ns, record.id))

    def snapshot(
        self, name: str, volume: str | None = None, *, fresh: bool = False
    ) -> SnapshotRecord:
        """One snapshot by its id, an unambiguous beginning of it, or ``"latest"``.

        Args:
            name: what to look for.
            volume: of which ``"latest"`` is meant; None for all.
            fresh: ask the store even if there is a local copy.

        Raises:
            SnapshotNotFound: there is none.
            InvalidArgument: several begin so.
        """
        if name == "latest":
            every = self.snapshots(volume)
            if not every:
                raise SnapshotNotFound(f"the repository at {self.store.url} has no snapshot")
            return every[-1]
        if fresh and len(name) == 32:
            return snapshots.load(self.store, self.crypt, name)
        if len(name) == 32:
            return self._load_snapshot(name)
        matching = [one for one in snapshots.ids(self.store) if name and one.startswith(name)]
        if not matching:
            raise SnapshotNotFound(
                f"no snapshot begins with {name!r}", hint="list them with laz snapshots"
            )
        if len(matching) > 1:
            raise InvalidArgument(f"{len(matching)} snapshots begin with {name!r}")
        return self._load_snapshot(matching[0])

    def _load_snapshot(self, snapshot: str) -> SnapshotRecord:
        name = snapshots.name_of(snapshot)
        stored = None if self._objects is None else self._objects.read(name)
        if stored is not None:
            return snapshots.parse(self.crypt, name, stored)
        try:
            stored = self.store.get(name)
        except BlobNotFound:
            raise SnapshotNotFound(
                f"snapshot {snapshot} is not in the repository",
                hint="list them with laz snapshots",
            ) from None
        record = snapshots.parse(self.crypt, name, stored)
        if self._objects is not None:
            self._objects.write(name, stored)
        return record

    def commit(self, record: SnapshotRecord) -> int:
        """Write a snapshot, the last step of a backup; returns its stored size."""
        stored = snapshots.save(self.store, self.crypt, record)
        if self._objects is not None:
            self._objects.write(snapshots.name_of(record.id), stored)
        return len(stored)

    def forget(self, ids: Sequence[str]) -> None:
        """Delete snapshots; their data stay until the next prune."""
        for snapshot in ids:
            self.store.delete(snapshots.name_of(snapshot))
            if self._objects is not None:
                self._objects.drop(snapshots.name_of(snapshot))

    def check(self, read_data: float = 0.0) -> CheckReport:
        """See :func:`lazarette.backup.repository.check.run`."""
        with self.guard.hold(Kind.READ, "check"):
            return check.run(self.store, self.crypt, read_data)

    def close(self) -> None:
        """Let go of the store."""
        self.store.close()

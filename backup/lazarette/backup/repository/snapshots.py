"""Snapshots as they are stored: one sealed object each, written last of all."""

from __future__ import annotations

import msgspec

from lazarette.backup.repository.entries import Entry, Kind
from lazarette.backup.repository.format import (
    SNAPSHOTS,
    Crypt,
    RepositoryDamaged,
    id_of,
    new_id,
    seal,
    unseal,
)
from lazarette.backup.repository.malformed import MALFORMED
from lazarette.backup.stores.contract import BlobNotFound, BlobStore
from lazarette.storage.errors import SnapshotNotFound


class SnapshotStats(msgspec.Struct, omit_defaults=True, frozen=True):
    """Sizes noted when the snapshot was made.

    Attributes:
        files: regular files.
        entries: names of every kind.
        bytes_total: bytes of content (apparent sizes).
        bytes_read: bytes read from the source.
        bytes_new: bytes of chunks that were new.
        bytes_sent: bytes written to the store.
        warnings: files not wholly saved.
        duration_ns: of the run.
    """

    files: int = 0
    entries: int = 0
    bytes_total: int = 0
    bytes_read: int = 0
    bytes_new: int = 0
    bytes_sent: int = 0
    warnings: int = 0
    duration_ns: int = 0


class SnapshotRecord(msgspec.Struct, frozen=True):
    """One state of a volume, complete in itself.

    Attributes:
        id: 32 hexadecimal digits.
        time_ns: the instant it shows, wall clock.
        started_ns: when reading began; a file changed later than a moment before
            ``min(time_ns, started_ns)`` is not trusted to be as recorded.
        host: where it was made.
        volume: of what.
        root: the volume's root directory, with its own metadata.
        tags: labels by name.
        consistency: how it was held still, e.g. ``"atomic"``; ``"not consistent"`` for a plain
            copy of a tree in use.
        stats: sizes.
        meta: definitions of containers and volumes kept with the data, JSON.
        parent: id of the snapshot it was compared with.
        program: what made it.
        delete_after_ns: not to be forgotten before; 0 when unlimited.
    """

    id: str
    time_ns: int
    started_ns: int
    host: str
    volume: str
    root: Entry
    tags: dict[str, str] = {}
    consistency: str = ""
    stats: SnapshotStats = SnapshotStats()
    meta: bytes = b""
    parent: str | None = None
    program: str = ""
    delete_after_ns: int = 0


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(SnapshotRecord).decode


def new_snapshot_id() -> str:
    """A random id."""
    return new_id().hex()


def name_of(snapshot: str) -> str:
    """Store name of a snapshot."""
    return SNAPSHOTS + snapshot


def save(store: BlobStore, crypt: Crypt, record: SnapshotRecord) -> bytes:
    """Write a snapshot; everything it refers to must be there. Returns what was stored."""
    name = name_of(record.id)
    data = seal(crypt, name, _encode(record))
    store.put(name, data)
    return data


def load(store: BlobStore, crypt: Crypt, snapshot: str) -> SnapshotRecord:
    """Read a snapshot by its whole id.

    Raises:
        SnapshotNotFound: it is not there.
        RepositoryDamaged: it is not what was written.
    """
    name = name_of(snapshot)
    try:
        stored = store.get(name)
    except BlobNotFound:
        raise SnapshotNotFound(
            f"snapshot {snapshot} is not in the repository", hint="list them with laz snapshots"
        ) from None
    return parse(crypt, name, stored)


def parse(crypt: Crypt, name: str, stored: bytes) -> SnapshotRecord:
    """Open a stored snapshot.

    Raises:
        RepositoryDamaged: it is not what was written.
    """
    try:
        record = _decode(unseal(crypt, name, stored))
    except MALFORMED as bad:
        raise RepositoryDamaged(f"object {name} is malformed: {bad}") from bad
    if name_of(record.id) != name or record.root.kind != Kind.DIRECTORY:
        raise RepositoryDamaged(f"object {name} holds something else")
    return record


def ids(store: BlobStore) -> list[str]:
    """Ids of all snapshots, unread."""
    return [id_of(info.name).hex() for info in store.list(SNAPSHOTS)]

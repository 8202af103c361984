"""Marks: announcements that packs will be deleted; the protocol is in :mod:`prune`."""

from __future__ import annotations

import msgspec

from lazarette.backup.repository.format import (
    CONDEMNED,
    Crypt,
    RepositoryDamaged,
    seal,
    unseal,
)
from lazarette.backup.repository.malformed import MALFORMED
from lazarette.backup.repository.packs import PackRecord
from lazarette.backup.stores.contract import BlobNotFound, BlobStore


class Mark(msgspec.Struct, frozen=True):
    """An announcement that packs will be deleted.

    Attributes:
        records: the packs; those that no index ever listed have empty arrays.
        considered: ids of the snapshots that were gone through.
        waits_for: names of leases alive after the mark was written; None when that is not
            known yet.
        time_ns: wall clock.
    """

    records: list[PackRecord]
    considered: list[str]
    waits_for: list[str] | None
    time_ns: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Mark).decode


def save(store: BlobStore, crypt: Crypt, name: str, mark: Mark) -> None:
    """Write a mark."""
    store.put(name, seal(crypt, name, _encode(mark), index=True))


def load(store: BlobStore, crypt: Crypt) -> dict[str, Mark]:
    """All marks by name.

    Raises:
        RepositoryDamaged: one is not what was written.
    """
    found = {}
    for info in list(store.list(CONDEMNED)):
        try:
            stored = store.get(info.name)
        except BlobNotFound:
            continue
        try:
            found[info.name] = _decode(unseal(crypt, info.name, stored))
        except MALFORMED as bad:
            raise RepositoryDamaged(f"object {info.name} is malformed: {bad}") from bad
    return found


def packs(store: BlobStore, crypt: Crypt) -> set[bytes]:
    """Packs that are condemned and not deleted yet."""
    return {record.pack for mark in load(store, crypt).values() for record in mark.records}

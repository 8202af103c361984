"""Index objects in the store: written, listed, read through the local cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from lazarette.backup.repository.format import (
    INDEXES,
    Crypt,
    RepositoryDamaged,
    new_id,
    seal,
    unseal,
)
from lazarette.backup.repository.malformed import MALFORMED
from lazarette.backup.repository.packs import PackRecord
from lazarette.backup.repository.treecache import ObjectCache
from lazarette.backup.stores.contract import BlobNotFound, BlobStore

CHUNKS_AN_OBJECT = 400_000
"""Chunks listed in one index object, about: bounds what a reader holds at once."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[PackRecord]).decode


def write(
    store: BlobStore,
    crypt: Crypt,
    records: Iterable[PackRecord],
    cache: ObjectCache | None = None,
) -> tuple[list[str], int]:
    """List packs in as many index objects as needed.

    Returns:
        Their names and total stored size.
    """
    names = []
    size = 0
    for group in _groups(records):
        name = INDEXES + new_id().hex()
        data = seal(crypt, name, _encode(group), index=True)
        store.put(name, data)
        if cache is not None:
            cache.write(name, data)
        names.append(name)
        size += len(data)
    return names, size


def _groups(records: Iterable[PackRecord]) -> Iterable[Sequence[PackRecord]]:
    group: list[PackRecord] = []
    chunks = 0
    for record in records:
        group.append(record)
        chunks += record.chunk_count
        if chunks >= CHUNKS_AN_OBJECT:
            yield group
            group, chunks = [], 0
    if group:
        yield group


def parse(crypt: Crypt, name: str, stored: bytes) -> list[PackRecord]:
    """Open an index object.

    Raises:
        RepositoryDamaged: it is not what was written.
    """
    try:
        records = _decode(unseal(crypt, name, stored))
    except MALFORMED as bad:
        raise RepositoryDamaged(f"object {name} is malformed: {bad}") from bad
    for record in records:
        record.validate()
    return records


def read(
    store: BlobStore, crypt: Crypt, name: str, cache: ObjectCache | None
) -> list[PackRecord] | None:
    """Read an index object, or None when it was merged into another meanwhile.

    Raises:
        RepositoryDamaged: it is not what was written.
    """
    stored = None if cache is None else cache.read(name)
    if stored is not None:
        try:
            return parse(crypt, name, stored)
        except RepositoryDamaged:
            stored = None
    try:
        stored = store.get(name)
    except BlobNotFound:
        return None
    records = parse(crypt, name, stored)
    if cache is not None:
        cache.write(name, stored)
    return records


def names(store: BlobStore) -> list[str]:
    """Names of all index objects."""
    return [info.name for info in store.list(INDEXES)]

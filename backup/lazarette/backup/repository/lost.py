"""Chunks known to be damaged, so that the next backup stores them again from live data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from lazarette.backup.repository.format import (
    ID_SIZE,
    LOST,
    Crypt,
    RepositoryDamaged,
    new_id,
    seal,
    unseal,
)
from lazarette.backup.repository.index import Index
from lazarette.backup.repository.malformed import MALFORMED
from lazarette.backup.stores.contract import BlobNotFound, BlobStore

_decode = msgspec.msgpack.Decoder(bytes).decode
_encode = msgspec.msgpack.Encoder().encode


def note(store: BlobStore, crypt: Crypt, chunks: Iterable[bytes]) -> None:
    """Write down that chunks are lost."""
    name = LOST + new_id().hex()
    store.put(name, seal(crypt, name, _encode(b"".join(sorted(chunks))), index=True))


def load(store: BlobStore, crypt: Crypt) -> dict[str, set[bytes]]:
    """What was written down, by object."""
    found = {}
    for info in list(store.list(LOST)):
        try:
            ids = _decode(unseal(crypt, info.name, store.get(info.name)))
        except BlobNotFound:
            continue
        except MALFORMED as bad:
            raise RepositoryDamaged(f"object {info.name} is malformed: {bad}") from bad
        found[info.name] = {ids[at : at + ID_SIZE] for at in range(0, len(ids), ID_SIZE)}
    return found


def still(store: BlobStore, noted: Mapping[str, set[bytes]], index: Index) -> set[bytes]:
    """Of what :func:`load` found, chunks that are lost still.

    Objects all of whose chunks are back are deleted.
    """
    left: set[bytes] = set()
    for name, ids in noted.items():
        missing = {chunk for chunk in ids if chunk not in index}
        if not missing:
            store.delete(name)
        left |= missing
    return left

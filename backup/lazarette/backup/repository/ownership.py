"""Who owns a volume's history: one small object a volume, changed by conditional writes.

A history without an owner may be continued by anybody.  Whoever takes it over writes its
name into the object with the next *epoch*; from then on every other host is fenced: it asks
before a backup and again after it, and takes back what it wrote meanwhile.  Of several that
take over at once exactly one is the last, and each of them learns whether it was that one.
"""

from __future__ import annotations

import msgspec

from lazarette.backup.repository.format import OWNERS, Crypt, RepositoryDamaged, seal, unseal
from lazarette.backup.repository.malformed import MALFORMED
from lazarette.backup.repository.repository import Repository
from lazarette.backup.stores.contract import AlreadyThere, BlobNotFound, BlobStore, TagMismatch
from lazarette.storage.errors import Conflict

_TRIES = 8
_encode = msgspec.msgpack.Encoder().encode


class Owner(msgspec.Struct, frozen=True):
    """Who may continue a volume's history.

    Attributes:
        volume: whose history.
        owner: id of the engine.
        host: its name, for people.
        epoch: counts the take-overs, from 1.
        time_ns: when it took over, wall clock.
    """

    volume: str
    owner: str
    host: str
    epoch: int
    time_ns: int


_decode = msgspec.msgpack.Decoder(Owner).decode


class Fenced(Conflict):
    """Another host took the volume's history over."""

    number = 230
    exit_code = 56


class TakenMeanwhile(Conflict):
    """Another host takes the history over at the same moment."""

    number = 231


def name_of(crypt: Crypt, volume: str) -> str:
    """Name of the object: tells nothing of the volume's name without the keys."""
    return OWNERS + crypt.chunk_id(b"owner\0" + volume.encode()).hex()


def read(store: BlobStore, crypt: Crypt, volume: str) -> Owner | None:
    """Who owns a history; None when nobody does.

    Raises:
        RepositoryDamaged: the object is not what was written.
        StoreUnavailable: the store does not answer.
    """
    name = name_of(crypt, volume)
    try:
        stored = store.get(name)
    except BlobNotFound:
        return None
    try:
        return _decode(unseal(crypt, name, stored))
    except MALFORMED as bad:
        raise RepositoryDamaged(f"owner of {volume}: object {name} is malformed: {bad}") from bad


def claim(repository: Repository, volume: str, owner: str, host: str) -> Owner:
    """Take a history over; nothing changes when it is one's own already.

    Args:
        repository: where it is.
        volume: whose history.
        owner: id of the engine that takes it over.
        host: its name.

    Raises:
        TakenMeanwhile: others keep taking it over at the same moment.
        StoreUnavailable: the store does not answer; nobody was fenced.
    """
    store, crypt = repository.store, repository.crypt
    name = name_of(crypt, volume)
    for _ in range(_TRIES):
        # The tag is older than the content or of it: a change in between fails the write.
        try:
            tag = store.stat(name).tag
        except BlobNotFound:
            tag = ""
        held = read(store, crypt, volume)
        if held is not None and held.owner == owner:
            return held
        epoch = 1 if held is None else held.epoch + 1
        mine = Owner(volume, owner, host, epoch, repository.clock.now_ns())
        sealed = seal(crypt, name, _encode(mine), index=True)
        try:
            if tag:
                store.replace(name, sealed, tag)
            else:
                store.put(name, sealed, if_absent=True)
        except (AlreadyThere, TagMismatch):
            continue
        return mine
    raise TakenMeanwhile(
        f"taking {volume} over: other hosts do the same", hint="leave it to one of them"
    )


def require(repository: Repository, volume: str, owner: str) -> None:
    """Make sure that an engine may continue a history.

    Raises:
        Fenced: another host owns it.
        StoreUnavailable: the store does not answer.
    """
    held = read(repository.store, repository.crypt, volume)
    if held is not None and held.owner != owner:
        raise Fenced(
            f"volume {volume} was taken over by host {held.host} (epoch {held.epoch})",
            hint=f"laz standby follow {volume} --over makes this host its standby",
        )

"""The contract of object stores.

Vocabulary
    *store*: a flat set of named, immutable-by-habit byte strings, local or remote.
    *name*: ``/``-separated, ``[a-z0-9._-]`` between, no part empty, ``.`` or ``..``, at most
    200 characters.  Beside ``a/b`` there is never ``a`` (no folder can hold both) and never
    ``a-x`` or ``a.x`` (servers differ on their order).
    *tag*: an opaque string that changes whenever an object's bytes change.

Semantics
    S1.  ``put`` makes the whole object visible at once or not at all; when it returns the
         object is durable.  A reader never sees half an object.
    S2.  ``put(if_absent=True)`` fails with ``AlreadyThere`` when the name exists; of several
         callers at once exactly one succeeds, when ``conditional`` is in the capabilities.
    S3.  ``replace`` writes only while the tag is still the given one, else ``TagMismatch``.
         A missing object has no tag: ``TagMismatch`` too.
    S4.  A conditional write whose reply was lost is settled by reading back: the caller's own
         bytes there mean success.  So callers make these bytes their own, by a random token.
         If another's ``replace`` came after the lost one, ``TagMismatch`` is all that is known.
    S5.  ``get`` of a range returns exactly those bytes, or raises; a short or damaged body is
         never returned.  An object that ends before the range does gives ``ShortBlob``,
         a wrong checksum of the store's own ``DamagedBlob``.
    S6.  ``list`` is complete, in ascending order of names, and sees every finished ``put``;
         an object deleted meanwhile may or may not be listed.
    S7.  ``delete`` of a missing object succeeds.
    S8.  Errors: ``BlobNotFound``; ``StoreUnavailable`` (worth another try later);
         ``Unauthenticated``/``Forbidden``; ``NoSpace``; ``WrongStore`` (no such bucket or
         folder); ``StoreRefused`` (an answer that another try will not change);
         ``InvalidArgument`` (not a name).  Nothing of the store's client library gets through.
    S9.  Safe to use from several threads at once.

Retry, limits, cache, read-only and fault injection are decorators: stores that wrap a
store and follow this same contract.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

import msgspec

from lazarette.storage.errors import (
    Conflict,
    DamagedData,
    Forbidden,
    InvalidArgument,
    LazaretteError,
    NotFound,
    Unavailable,
)

Buffer = bytes | bytearray | memoryview


class StoreCapabilities(msgspec.Struct, frozen=True):
    """What a store can do; probed, not assumed.

    Attributes:
        conditional: conditional writes are exact under a race.
        object_lock: objects can be made undeletable until a date.
        versions: deleted or replaced objects can still be read.
        distant: an answer takes long beside the work it needs, so that several requests at
            once are faster than one after another.
    """

    conditional: bool
    object_lock: bool = False
    versions: bool = False
    distant: bool = False


class BlobInfo(msgspec.Struct, frozen=True):
    """An object's name, size in bytes, tag, and time of its last write (wall clock)."""

    name: str
    size: int
    tag: str
    modified_ns: int


class BlobNotFound(NotFound):
    """No object of that name."""

    number = 201


class AlreadyThere(Conflict):
    """``if_absent`` was asked for and the name exists."""

    number = 202


class TagMismatch(Conflict):
    """The object changed since its tag was read."""

    number = 203


class StoreUnavailable(Unavailable):
    """The store did not answer as it should; a later try may succeed."""

    number = 204
    exit_code = 30


class WrongStore(NotFound):
    """The bucket or folder does not exist."""

    number = 205
    exit_code = 31


class SlowDown(StoreUnavailable):
    """The store asks for fewer requests.

    Args:
        retry_after: seconds the store wants us to wait, 0 when it did not say.
    """

    number = 206

    def __init__(self, message: str, *, hint: str = "", retry_after: float = 0.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class ShortBlob(DamagedData):
    """The object ends before the range asked for: it was cut, or the index lies."""

    number = 207


class DamagedBlob(DamagedData):
    """The store's own checksum of an object does not match its bytes."""

    number = 210


class ReadOnlyStore(Forbidden):
    """The store was opened for reading only."""

    number = 208


class StoreRefused(LazaretteError):
    """The store answered with an error that another try will not change."""

    number = 209
    exit_code = 32
    http_status = 502


NAME_LIMIT = 200
_NAME = re.compile(r"[a-z0-9._-]+(?:/[a-z0-9._-]+)*")


def is_name(name: str) -> bool:
    """Whether ``name`` can name an object (see the vocabulary)."""
    return (
        len(name) <= NAME_LIMIT
        and _NAME.fullmatch(name) is not None
        and not {".", ".."} & set(name.split("/"))
    )


def check_name(name: str) -> str:
    """``name`` itself.

    Raises:
        InvalidArgument: it cannot name an object.
    """
    if not is_name(name):
        raise InvalidArgument(f"not an object name: {name!r}")
    return name


class BlobStore(Protocol):
    """A store of named byte strings; numbered semantics in the module's text."""

    @property
    def url(self) -> str:
        """Where it is, without any secret."""
        ...

    @property
    def capabilities(self) -> StoreCapabilities:
        """What it can do."""
        ...

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        """Write an object and return its tag (S1, S2)."""
        ...

    def replace(self, name: str, data: Buffer, tag: str) -> str:
        """Write over an object that still has ``tag``; return the new tag (S3)."""
        ...

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Read an object, or ``length`` bytes of it from ``offset`` (S5)."""
        ...

    def stat(self, name: str) -> BlobInfo:
        """Describe an object."""
        ...

    def list(self, prefix: str = "") -> Iterator[BlobInfo]:
        """All objects whose name begins with ``prefix`` (S6)."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object (S7)."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class LockingStore(BlobStore, Protocol):
    """An optional ability: objects that nobody can delete or change until a date.

    L1.  A lock is only ever extended; asking for less changes nothing.
    L2.  ``delete`` and ``put`` of a locked object succeed and hide it; what it was stays
         readable through :class:`VersionedStore`.
    """

    def lock(self, name: str, until_ns: int) -> None:
        """Lock an object until then (wall clock), rounded up to a second."""
        ...

    def locked_until(self, name: str) -> int:
        """When its lock ends; 0 when there is none."""
        ...


class VersionedStore(BlobStore, Protocol):
    """An optional ability: what was deleted or replaced can still be read."""

    def as_of(self, time_ns: int) -> BlobStore:
        """The store as it was at that moment by its own clock; for reading only."""
        ...

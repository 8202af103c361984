"""A store that fails as told: for tests of everything that stands on stores.

A :class:`Fault` fires at chosen calls.  :meth:`FaultStore.check_fired` fails a test whose
fault never fired, which would otherwise prove nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from lazarette.backup.stores.contract import (
    BlobInfo,
    BlobStore,
    Buffer,
    SlowDown,
    StoreUnavailable,
)
from lazarette.backup.stores.wrapper import StoreWrapper
from lazarette.storage.errors import NoSpace, Unauthenticated


class FaultKind(Enum):
    """What happens instead of the call, or to it."""

    UNAVAILABLE = "unavailable"
    """Nothing is done; the call fails."""
    SLOW_DOWN = "slow down"
    """Nothing is done; the store asks for fewer requests."""
    NO_SPACE = "no space"
    """Nothing is done; the store is full."""
    EXPIRED = "expired"
    """Nothing is done; the credentials are refused."""
    LOST_REPLY = "lost reply"
    """The call is done, its answer lost."""
    HALF_STORED = "half stored"
    """A put leaves half of the object and fails, as no good store does."""
    TRUNCATED = "truncated"
    """A get returns half of the bytes without an error, as no good store does."""
    FLIPPED = "flipped"
    """A get returns one wrong bit."""
    STALE_LIST = "stale list"
    """A list leaves out the newest object, as no good store does."""
    CRASH = "crash"
    """The calling process dies before the call."""
    CRASH_AFTER = "crash after"
    """The calling process dies after the call."""


class Crashed(BaseException):
    """Stands for the death of the process; nothing but a test catches it."""


class NeverFired(AssertionError):
    """A fault was planned and its moment never came."""


@dataclass(slots=True)
class Fault:
    """One planned fault.

    Attributes:
        kind: what happens.
        operations: at which calls: ``put``, ``replace``, ``get``, ``stat``, ``list``,
            ``delete``.
        match: only for names that contain this.
        skip: let so many matching calls pass first.
        times: how often it fires.
        fired: how often it did.
    """

    kind: FaultKind
    operations: tuple[str, ...]
    match: str = ""
    skip: int = 0
    times: int = 1
    fired: int = 0


@dataclass(slots=True)
class Call:
    """A call the store saw."""

    operation: str
    name: str
    size: int = field(default=0)


class FaultStore(StoreWrapper):
    """Does what ``inner`` does, except where a fault is due.

    Attributes:
        calls: every call, in order.
    """

    def __init__(self, inner: BlobStore, faults: Sequence[Fault] = ()) -> None:
        super().__init__(inner)
        self._faults = list(faults)
        self._lock = threading.Lock()
        self.calls: list[Call] = []

    def plan(self, fault: Fault) -> None:
        """Add a fault."""
        with self._lock:
            self._faults.append(fault)

    def check_fired(self) -> None:
        """Fail unless every planned fault fired.

        Raises:
            NeverFired: one did not.
        """
        for fault in self._faults:
            if fault.fired == 0:
                raise NeverFired(f"{fault.kind.value} at {fault.operations} never fired")

    def put(self, name: str, data: Buffer, *, if_absent: bool = False) -> str:
        """See :meth:`BlobStore.put`."""
        kind = self._due("put", name, len(data))
        if kind is FaultKind.HALF_STORED:
            self.inner.put(name, bytes(data)[: len(data) // 2])
            raise StoreUnavailable(f"{name} was stored by half")
        tag = self.inner.put(name, data, if_absent=if_absent)
        self._after(kind, name)
        return tag

    def replace(self, name: str, data: Buffer, tag: str) -> str:
        """See :meth:`BlobStore.replace`."""
        kind = self._due("replace", name, len(data))
        new_tag = self.inner.replace(name, data, tag)
        self._after(kind, name)
        return new_tag

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`BlobStore.get`."""
        kind = self._due("get", name, length or 0)
        data = self.inner.get(name, offset, length)
        self._after(kind, name)
        if kind is FaultKind.TRUNCATED:
            return data[: len(data) // 2]
        if kind is FaultKind.FLIPPED and data:
            middle = len(data) // 2
            return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        return data

    def stat(self, name: str) -> BlobInfo:
        """See :meth:`BlobStore.stat`."""
        kind = self._due("stat", name)
        info = self.inner.stat(name)
        self._after(kind, name)
        return info

    def list(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See :meth:`BlobStore.list`."""
        kind = self._due("list", prefix)
        self._after(kind, prefix)
        if kind is not FaultKind.STALE_LIST:
            yield from self.inner.list(prefix)
            return
        found = list(self.inner.list(prefix))
        newest = max(found, key=lambda info: info.modified_ns, default=None)
        yield from (info for info in found if info is not newest)

    def delete(self, name: str) -> None:
        """See :meth:`BlobStore.delete`."""
        kind = self._due("delete", name)
        self.inner.delete(name)
        self._after(kind, name)

    def _due(self, operation: str, name: str, size: int = 0) -> FaultKind | None:
        """The fault of this call; raises it when nothing is to be done."""
        with self._lock:
            self.calls.append(Call(operation, name, size))
            kind = self._next(operation, name)
        match kind:
            case FaultKind.UNAVAILABLE:
                raise StoreUnavailable(f"cannot {operation} {name}: injected")
            case FaultKind.SLOW_DOWN:
                raise SlowDown(f"cannot {operation} {name}: injected")
            case FaultKind.NO_SPACE:
                raise NoSpace(f"cannot {operation} {name}: injected")
            case FaultKind.EXPIRED:
                raise Unauthenticated(f"cannot {operation} {name}: injected")
            case FaultKind.CRASH:
                raise Crashed(f"before {operation} {name}")
        return kind

    def _next(self, operation: str, name: str) -> FaultKind | None:
        for fault in self._faults:
            if operation not in fault.operations or fault.match not in name:
                continue
            if fault.skip > 0:
                fault.skip -= 1
            elif fault.fired < fault.times:
                fault.fired += 1
                return fault.kind
        return None

    def _after(self, kind: FaultKind | None, name: str) -> None:
        if kind is FaultKind.LOST_REPLY:
            raise StoreUnavailable(f"the answer about {name} was lost")
        if kind is FaultKind.CRASH_AFTER:
            raise Crashed(f"after {name}")

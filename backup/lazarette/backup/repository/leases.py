"""Leases: who is at work on a repository, without anyone to ask and without common clocks.

Vocabulary
    *holder*: one run of one program, with an entry in the repository.
    *shared* leases (backup, restore, check) go together; an *exclusive* one (prune's
    deletions) goes with no other.
    *term*: how long an entry counts after its last renewal, by the store's clock.

How it works
    L1.  A holder writes its entry first and looks at the others' afterwards.  The store
         shows every finished write, so of two that conflict at least one sees the other.
         (In a table the write is the look: it succeeds only on the table it was made from.)
    L2.  A shared holder that sees an exclusive entry, granted or waiting, takes its own
         back.  An exclusive holder that sees shared ones keeps its entry, so that no new
         ones begin, and waits for them to end.  Of two exclusive ones the entry with the
         higher token is taken back.
    L3.  Every entry is renewed thrice a term.  One not renewed for a term is dead, and
         whoever sees it removes it; no human is needed.  An entry of a process of this
         very host that no longer exists is dead at once.
    L4.  Ages are differences of times of one clock, the store's.  What it shows now is
         known within bounds from an object just written (:class:`StoreTime`); the lower
         bound judges others, the upper bound stamps oneself.
    L5.  A holder counts its own term on its own steady clock, from before its last renewal
         was sent, and stops ``margin`` early.  A renewal that returns later than that
         counts as failed.  So a holder knows that it has lost before anyone may remove it.
    L6.  ``confirm`` renews at once: call it before anything that must not happen without
         the lease, and do that within ``remaining_ns``.

Assumed: steady clocks of holders and the store's clock run at the same rate, and the
clocks of a store's servers agree, both within ``margin`` a term.

Where entries live is decided once, when the repository is made (``leases/protocol``):
in one table changed by conditional writes where those were seen to be exact, and as one
object a holder elsewhere, where the second look comes after a pause, for stores whose
lists lag behind.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cached_property
from types import TracebackType
from typing import Protocol

import msgspec

from lazarette.backup.repository._leaseplaces import (
    EntryGone,
    Holder,
    ListedEntries,
    Mode,
    StoreTime,
    TableEntries,
)
from lazarette.backup.repository.malformed import MALFORMED
from lazarette.backup.stores.ahead import ahead
from lazarette.backup.stores.contract import BlobNotFound, BlobStore, StoreUnavailable
from lazarette.fuse import jsontext
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import Conflict, Forbidden, LazaretteError

__all__ = [
    "Holder",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "LeaseTerms",
    "Leases",
    "Mode",
    "PlaceOfEntries",
]

_PROTOCOL = "leases/protocol"


class LeaseHeld(Conflict):
    """Others' leases stand against this one."""

    number = 217
    exit_code = 44


class LeaseLost(Conflict):
    """The lease could not be renewed in time; what it protected must stop."""

    number = 218
    exit_code = 45


class PlaceOfEntries(Enum):
    """Where entries live."""

    TABLE = "table"
    LISTED = "listed"


class LeaseTerms(msgspec.Struct, frozen=True):
    """Times, in seconds; the same for all users of a repository.

    Attributes:
        term: an entry counts that long after its last renewal.
        margin: a holder stops that much before its term ends.
        settle: pause before the second look, where entries are listed.
        pause: longest pause between looks of one who waits.
    """

    term: float = 60.0
    margin: float = 10.0
    settle: float = 1.0
    pause: float = 5.0

    @property
    def term_ns(self) -> int:
        """``term`` in nanoseconds."""
        return round(self.term * NANOSECONDS)


class _Entries(Protocol):
    """The entries of all holders, wherever they live."""

    def join(self, holder: Holder) -> None: ...

    def others(self, holder: Holder | None) -> list[Holder]: ...

    def renew(self, holder: Holder) -> None: ...

    def leave(self, holder: Holder) -> None: ...


class _Protocol(msgspec.Struct, frozen=True):
    """The object ``leases/protocol``."""

    version: int
    place: PlaceOfEntries


class Leases:
    """The leases of one repository, as seen by one program.

    Args:
        store: the repository's.
        clock: for the holder's own term and for pauses.
        place: where entries live; None asks the repository.
        terms: times.
        randomness: for tokens, and for pauses that keep waiting programs out of step.
    """

    def __init__(
        self,
        store: BlobStore,
        clock: Clock,
        *,
        place: PlaceOfEntries | None = None,
        terms: LeaseTerms | None = None,
        randomness: random.Random | None = None,
    ) -> None:
        self._clock = clock
        self.terms = terms or LeaseTerms()
        self._randomness = randomness or random.SystemRandom()
        self._store = store
        self._asked: Callable[[], PlaceOfEntries] | None = None
        if place is None:
            self._asked = ahead(store, lambda: _read_place(store))
        else:
            self.place = place

    @cached_property
    def place(self) -> PlaceOfEntries:
        """Where entries live."""
        asked, self._asked = self._asked, None
        return _read_place(self._store) if asked is None else asked()

    @cached_property
    def _entries(self) -> _Entries:
        time = StoreTime(self._store, self._clock, self.terms.term_ns)
        if self.place is PlaceOfEntries.TABLE:
            return TableEntries(self._store, time)
        return ListedEntries(self._store, time)

    @staticmethod
    def create(store: BlobStore) -> PlaceOfEntries:
        """Decide, for a new repository, where entries live: call it once, at its creation."""
        # On use: only the maker of a repository needs the suite that stores are verified by.
        from lazarette.backup.stores.verify import probe_conditional

        exact = store.capabilities.conditional and probe_conditional(store)
        place = PlaceOfEntries.TABLE if exact else PlaceOfEntries.LISTED
        store.put(_PROTOCOL, msgspec.json.encode(_Protocol(1, place)))
        return place

    def holders(self) -> list[Holder]:
        """All that are alive."""
        return self._entries.others(None)

    def acquire(
        self,
        mode: Mode,
        purpose: str,
        *,
        wait: float = 0.0,
        on_wait: Callable[[list[Holder]], None] | None = None,
    ) -> Lease:
        """Get a lease.

        Args:
            mode: shared or exclusive.
            purpose: a word or two for others to read, e.g. ``"backup of db"``.
            wait: give up after so many seconds.
            on_wait: told, at each look, for whom this waits; may raise to give up.

        Raises:
            LeaseHeld: others hold leases against it.
            StoreUnavailable: the store did not answer.
        """
        end = self._clock.monotonic_ns() + round(wait * NANOSECONDS)
        while True:
            lease = Lease(self._entries, self._clock, self.terms, self._myself(mode, purpose))
            try:
                against = self._stand(lease, end, on_wait)
            except LeaseLost:  # this program stood still for a term: once more
                lease.release()
                continue
            except BaseException:
                lease.release()
                raise
            if not against:
                return lease
            lease.release()
            if self._clock.monotonic_ns() >= end:
                raise LeaseHeld(
                    f"cannot begin {purpose}: {_describe(against)}",
                    hint="wait until it ends; a dead one is removed by itself"
                    f" after {self.terms.term:g} s",
                )
            self._rest(end)

    def _stand(
        self, lease: Lease, end: int, on_wait: Callable[[list[Holder]], None] | None
    ) -> list[Holder]:
        """Join and look until nobody stands against it (L1, L2); returns who made it retreat."""
        lease.begin()
        looks = 0
        while True:
            against = _conflicts(lease.holder, self._entries.others(lease.holder))
            if not against:
                looks += 1
                if looks == 2 or self.place is PlaceOfEntries.TABLE:
                    lease.check()
                    return []
                self._clock.sleep(self.terms.settle)
                continue
            looks = 0
            if _must_retreat(lease.holder, against) or self._clock.monotonic_ns() >= end:
                if on_wait is not None:
                    on_wait(against)
                return against
            if on_wait is not None:
                on_wait(against)
            self._rest(end)
            lease.renew_if_due()

    def _myself(self, mode: Mode, purpose: str) -> Holder:
        pid = os.getpid()
        return Holder(
            token=f"{self._randomness.getrandbits(96):024x}",
            mode=mode,
            purpose=purpose,
            host=os.uname().nodename,
            pid=pid,
            place=Holder.place_of_this_process(),
            started=Holder.start_of(pid) or "",
        )

    def _rest(self, end: int) -> None:
        left = max((end - self._clock.monotonic_ns()) / NANOSECONDS, 0.0)
        self._clock.sleep(
            min(self.terms.pause * (0.2 + 0.8 * self._randomness.random()), left) + 0.001
        )


class Lease:
    """One lease; a context manager that releases it.

    ``check`` is cheap and asks nobody; ``confirm`` asks the store.  Long work is done
    inside :meth:`kept`, which renews in the background.
    """

    def __init__(self, entries: _Entries, clock: Clock, terms: LeaseTerms, holder: Holder) -> None:
        self._entries = entries
        self._clock = clock
        self._terms = terms
        self.holder = holder
        self._deadline = 0
        self._lost = ""
        self._lock = threading.Lock()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    @property
    def remaining_ns(self) -> int:
        """How long the lease is certainly good without another renewal; 0 when it is lost."""
        if self._lost:
            return 0
        return max(self._deadline - self._clock.monotonic_ns(), 0)

    def begin(self) -> None:
        """Write the entry (L1).

        Raises:
            LeaseLost: that took so long that others removed it.
        """
        sent = self._clock.monotonic_ns()
        try:
            self._entries.join(self.holder)
        except EntryGone as gone:
            raise self._gone() from gone
        self._deadline = self._good_until(sent)

    def check(self) -> None:
        """Raise when the lease is lost, or could be.

        Raises:
            LeaseLost: it is.
        """
        if self.remaining_ns == 0:
            raise LeaseLost(
                f"the lease for {self.holder.purpose} is lost: "
                + (self._lost or "it was not renewed in time"),
                hint="run it again: it resumes",
            )

    def confirm(self) -> None:
        """Renew now; afterwards the lease is good for a whole term (L5, L6).

        Raises:
            LeaseLost: the entry was removed, or the store answered too late.
            StoreUnavailable: the store did not answer, and the lease is not lost yet.
        """
        with self._lock:
            self.check()
            sent = self._clock.monotonic_ns()
            try:
                self._entries.renew(self.holder)
            except EntryGone as gone:
                raise self._gone() from gone
            if self._clock.monotonic_ns() >= self._deadline:
                self._lost = "its renewal came too late"
            self.check()
            self._deadline = self._good_until(sent)

    def renew_if_due(self) -> None:
        """Renew when a third of the term has passed; see :meth:`confirm`."""
        if self.remaining_ns < self._terms.term_ns * 2 // 3:
            self.confirm()

    def release(self) -> None:
        """Remove the entry; if the store is away it dies by itself.  May be called again."""
        with self._lock:
            self._lost = self._lost or "it was released"
            try:
                self._entries.leave(self.holder)
            except (StoreUnavailable, Forbidden):
                pass

    @contextmanager
    def kept(self) -> Iterator[Lease]:
        """Renew in the background while the block runs, and release afterwards.

        A failed renewal is tried again until the term is over; then :meth:`check` raises.
        """
        stop = threading.Event()
        pause = self._terms.term / 12

        def keep() -> None:
            while not stop.wait(pause):
                try:
                    self.renew_if_due()
                except LeaseLost:
                    return
                except LazaretteError:
                    continue

        keeper = threading.Thread(target=keep, name="lease", daemon=True)
        keeper.start()
        try:
            yield self
        finally:
            stop.set()
            keeper.join()
            self.release()

    def _gone(self) -> LeaseLost:
        self._lost = "another program removed it"
        return LeaseLost(
            f"the lease for {self.holder.purpose} is lost: {self._lost}",
            hint="run it again: it resumes",
        )

    def _good_until(self, sent: int) -> int:
        return sent + self._terms.term_ns - round(self._terms.margin * NANOSECONDS)


def _read_place(store: BlobStore) -> PlaceOfEntries:
    try:
        said = jsontext.decode(store.get(_PROTOCOL), type=_Protocol)
    except BlobNotFound:
        return PlaceOfEntries.LISTED
    except MALFORMED:
        return PlaceOfEntries.LISTED
    return said.place


def _conflicts(me: Holder, others: list[Holder]) -> list[Holder]:
    if me.mode is Mode.EXCLUSIVE:
        return others
    return [other for other in others if other.mode is Mode.EXCLUSIVE]


def _must_retreat(me: Holder, against: list[Holder]) -> bool:
    """Whether to take the entry back rather than wait with it (L2)."""
    if me.mode is Mode.SHARED:
        return True
    return any(other.mode is Mode.EXCLUSIVE and other.token < me.token for other in against)


def _describe(holders: list[Holder]) -> str:
    first = holders[0]
    more = f" and {len(holders) - 1} more" if len(holders) > 1 else ""
    return f"{first.purpose} on {first.host} (process {first.pid}) is at work{more}"

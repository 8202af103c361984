"""Where the entries of leases live, and what time it is in the store."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum

import msgspec

from lazarette.backup.repository.malformed import MALFORMED
from lazarette.backup.stores.ahead import ahead
from lazarette.backup.stores.contract import (
    AlreadyThere,
    BlobInfo,
    BlobNotFound,
    BlobStore,
    TagMismatch,
)
from lazarette.fuse import jsontext
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import LazaretteError

_TABLE = "leases/table"
_ENTRY = "leases/entry-"
_CLOCK = "leases/clock-"


class EntryGone(Exception):
    """The holder's entry is no longer there."""


class Mode(Enum):
    """What a lease allows beside it."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"


class Holder(msgspec.Struct, frozen=True):
    """Who holds a lease, and where its process can be found.

    Attributes:
        token: random, unique.
        mode: shared or exclusive.
        purpose: for people.
        host: its name, for people.
        pid: the process.
        place: boot and process namespace the pid belongs to; empty when unknown.
        started: the process's start time in that boot, against pids used again.
    """

    token: str
    mode: Mode
    purpose: str
    host: str
    pid: int
    place: str = ""
    started: str = ""

    @staticmethod
    def place_of_this_process() -> str:
        """Names this boot of this host and this process namespace."""
        try:
            with open("/proc/sys/kernel/random/boot_id") as file:
                return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
        except OSError:
            return ""

    @staticmethod
    def start_of(pid: int) -> str | None:
        """A process's start time (field 22 of proc_pid_stat(5)); None when it is no more."""
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return fields[19].decode()

    def is_dead_here(self) -> bool:
        """Whether it was a process of this very namespace that is no more."""
        if not self.place or self.place != self.place_of_this_process():
            return False
        return self.start_of(self.pid) != self.started


class StoreTime:
    """The store's clock, known within bounds from the last object written.

    The stamp of an object lies between the moments its writing was begun and was seen to
    be done, and may be cut to whole seconds.  So, with ``m`` the steady clock now::

        stamp + (m - seen)  <=  store's time  <=  stamp + 1 s + (m - begun)

    If the store's clock was set back, an entry may seem to come from the future.  So an
    entry is dead, too, that this program has itself seen unchanged for a term.
    """

    def __init__(self, store: BlobStore, clock: Clock, term_ns: int) -> None:
        self._store = store
        self._clock = clock
        self._term_ns = term_ns
        self._known: dict[str, tuple[int, int]] = {}
        self._stamp = 0
        self._begun = 0
        self._seen = 0
        self._asking: Callable[[], None] | None = None
        self._cleaned: Callable[[], None] | None = None

    def now(self) -> int:
        """A moment that counts as begun, for :meth:`learn`."""
        return self._clock.monotonic_ns()

    def learn(self, stamp: int, begun: int) -> None:
        """Take over the stamp of an object whose writing began at ``begun``."""
        self._stamp, self._begun, self._seen = stamp, begun, self._clock.monotonic_ns()

    def ask_ahead(self) -> None:
        """Find out what :meth:`bounds` needs while other requests are under way."""
        if self._asking is None and self._stale:
            self._asking = ahead(self._store, self._probe)

    def settle(self) -> None:
        """Wait for requests nobody has waited for."""
        cleaned, self._cleaned = self._cleaned, None
        if cleaned is not None:
            cleaned()

    @property
    def _stale(self) -> bool:
        return self._stamp == 0 or self._clock.monotonic_ns() - self._seen > self._term_ns

    def bounds(self) -> tuple[int, int]:
        """Earliest and latest the store's clock may show, nanoseconds since the epoch."""
        asking, self._asking = self._asking, None
        if asking is not None:
            asking()
        if self._stale:
            self._probe()
        now = self._clock.monotonic_ns()
        earliest = self._stamp + now - self._seen
        return earliest, self._stamp + NANOSECONDS + now - self._begun

    def is_dead(self, holder: Holder, renewed_ns: int) -> bool:
        """Whether a holder's entry, renewed last at that time of the store, no longer counts."""
        now = self._clock.monotonic_ns()
        stamp, since = self._known.get(holder.token, (0, 0))
        if stamp != renewed_ns:
            self._known[holder.token] = (renewed_ns, now)
        elif now - since > self._term_ns:
            return True
        return self.bounds()[0] - renewed_ns > self._term_ns or holder.is_dead_here()

    def _probe(self) -> None:
        name = _CLOCK + os.urandom(8).hex()
        begun = self._clock.monotonic_ns()
        self._store.put(name, b"")
        try:
            self.learn(self._store.stat(name).modified_ns, begun)
        finally:
            self._cleaned = ahead(self._store, lambda: self._store.delete(name))
            if not self._store.capabilities.distant:
                self.settle()


class _Entry(msgspec.Struct, frozen=True):
    """A row of the table: the holder, and the store's time of its last renewal (at most)."""

    holder: Holder
    renewed_ns: int


class _Table(msgspec.Struct, frozen=True):
    """The object ``leases/table``; ``writer`` makes every version's bytes unique (S4)."""

    version: int
    writer: str
    entries: tuple[_Entry, ...]


class TableEntries:
    """All entries in one object, changed by conditional writes.

    A write succeeds only on the table it was made from.  So whoever has joined has looked, too:
    nobody else was in the table at that instant but those it was made with.  And the table last
    written needs not be read again before the next write: if it has changed, that fails.
    """

    def __init__(self, store: BlobStore, time: StoreTime) -> None:
        self._store = store
        self._time = time
        self._written: tuple[str, _Table] | None = None
        self._joined: dict[str, _Table] = {}

    def join(self, holder: Holder) -> None:
        """Add an entry."""
        self._time.ask_ahead()
        while not self._change(holder, must_be_there=False, stays=True):
            pass

    def renew(self, holder: Holder) -> None:
        """Stamp an entry anew; raises EntryGone."""
        while not self._change(holder, must_be_there=True, stays=True):
            pass

    def leave(self, holder: Holder) -> None:
        """Take an entry out, if it is there."""
        self._joined.pop(holder.token, None)
        while not self._change(holder, must_be_there=False, stays=False):
            pass
        self._time.settle()

    def others(self, holder: Holder | None) -> list[Holder]:
        """The living others; the dead are left for the next who writes."""
        token = holder.token if holder else ""
        table = self._joined.pop(token, None) or self._read()[1]
        return [entry.holder for entry in self._alive(table) if entry.holder.token != token]

    def _change(self, holder: Holder, *, must_be_there: bool, stays: bool) -> bool:
        """One try at writing the table without its dead; False when another was faster."""
        written, self._written = self._written, None
        tag, table = written or self._read()
        there = any(entry.holder.token == holder.token for entry in table.entries)
        if not there and written is not None and (must_be_there or not stays):
            return False  # as remembered: what counts is what is there
        if must_be_there and not there:
            raise EntryGone
        if not stays and not there:
            return True
        kept = [entry for entry in self._alive(table) if entry.holder.token != holder.token]
        if stays:
            kept.append(_Entry(holder, self._time.bounds()[1]))
        changed = _Table(1, os.urandom(8).hex(), tuple(kept))
        data = msgspec.json.encode(changed)
        try:
            if tag:
                tag = self._store.replace(_TABLE, data, tag)
            else:
                tag = self._store.put(_TABLE, data, if_absent=True)
        except (TagMismatch, AlreadyThere):
            return False
        self._written = tag, changed
        if stays and not there:
            self._joined[holder.token] = changed
        return True

    def _read(self) -> tuple[str, _Table]:
        """The table, and a tag at most as new: a write by it fails if the table is newer."""
        try:
            tag = self._store.stat(_TABLE).tag
            data = self._store.get(_TABLE)
        except BlobNotFound:
            return "", _Table(1, "", ())
        try:
            return tag, jsontext.decode(data, type=_Table)
        except MALFORMED:
            # a table nobody can read holds nobody: those in it notice at their renewal
            return tag, _Table(1, "", ())

    def _alive(self, table: _Table) -> list[_Entry]:
        return [
            entry
            for entry in table.entries
            if not self._time.is_dead(entry.holder, entry.renewed_ns)
        ]


class ListedEntries:
    """An object for each entry; its modification time is its last renewal."""

    def __init__(self, store: BlobStore, time: StoreTime) -> None:
        self._store = store
        self._time = time

    def join(self, holder: Holder) -> None:
        """Write the holder's object; raises EntryGone when it is removed meanwhile."""
        begun = self._time.now()
        try:
            self._store.put(self._name(holder), msgspec.json.encode(holder))
            stamp = self._store.stat(self._name(holder)).modified_ns
        except BlobNotFound as gone:
            raise EntryGone from gone
        self._time.learn(stamp, begun)

    def renew(self, holder: Holder) -> None:
        """Write it again; raises EntryGone."""
        try:
            self._store.stat(self._name(holder))
        except BlobNotFound as gone:
            raise EntryGone from gone
        self.join(holder)

    def leave(self, holder: Holder) -> None:
        """Remove it."""
        self._store.delete(self._name(holder))

    def others(self, holder: Holder | None) -> list[Holder]:
        """The living others; the dead are removed."""
        mine = self._name(holder) if holder else ""
        found = []
        for info in self._store.list(_ENTRY):
            if info.name == mine:
                continue
            other = self._load(info)
            if other is None:
                continue
            if self._time.is_dead(other, info.modified_ns):
                self._store.delete(info.name)
            else:
                found.append(other)
        return found

    def _name(self, holder: Holder) -> str:
        return _ENTRY + holder.token

    def _load(self, info: BlobInfo) -> Holder | None:
        try:
            return jsontext.decode(self._store.get(info.name), type=Holder)
        except BlobNotFound:
            return None
        except (msgspec.MsgspecError, LazaretteError) as unreadable:
            if isinstance(unreadable, LazaretteError) and unreadable.exit_code == 30:
                raise
            # somebody is there; who, nobody can say
            token = info.name[len(_ENTRY) :]
            return Holder(token, Mode.EXCLUSIVE, "an unreadable entry", "unknown", 0)

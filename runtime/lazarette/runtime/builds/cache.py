"""The build cache: what a step gave, by a key of everything it depends on.

A key is the digest of the key before it and of the step: its text with variables
substituted, the build arguments a RUN sees, and for COPY and ADD the digest of what is
copied.  Times and the network are no part of it.  The key of a stage begins with its
base image's id.  A record keeps the layer the step made and the time that stands in the
image, so that an unchanged build gives the same image, id included.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lazarette.storage.clock import Clock
from lazarette.storage.state import State

MIGRATIONS = (
    """
    CREATE TABLE build_cache (
        key TEXT PRIMARY KEY, parent TEXT NOT NULL, kind TEXT NOT NULL,
        description TEXT NOT NULL, chain TEXT NOT NULL, diff_id TEXT NOT NULL,
        size INTEGER NOT NULL, created_ns INTEGER NOT NULL, used_ns INTEGER NOT NULL,
        uses INTEGER NOT NULL, alias TEXT NOT NULL) STRICT;
    CREATE INDEX build_cache_parent ON build_cache (parent)
    """,
)


def step_key(before: str, *parts: str) -> str:
    """The key of a step after the one with key ``before``."""
    made = hashlib.sha256(before.encode())
    for part in parts:
        encoded = part.encode("utf-8", "surrogateescape")
        made.update(b"\0%d\0" % len(encoded))
        made.update(encoded)
    return made.hexdigest()


@dataclass(frozen=True, slots=True)
class Record:
    """What one step gave.

    Attributes:
        key: of the step.
        parent: key of the step before it.
        kind: ``layer`` or ``metadata``.
        description: history text, for people.
        chain: chain id of the topmost layer after the step; empty if there is none.
        diff_id: the layer the step made; empty if it made none.
        size: bytes of that layer.
        created_ns: when the step ran first, nanoseconds since the epoch.
        used_ns: when it was last used.
        uses: how often it was found.
        alias: key of the record that holds the content; empty if this one does.
    """

    key: str
    parent: str
    kind: str
    description: str
    chain: str
    diff_id: str
    size: int
    created_ns: int
    used_ns: int = 0
    uses: int = 0
    alias: str = ""

    @property
    def short_id(self) -> str:
        """What people see of the key."""
        return self.key[:25]


class BuildCache:
    """Records in the daemon's database.

    Args:
        state: the database.
        clock: dates uses.
        has_layer: whether a layer of a chain id is still there.
    """

    def __init__(self, state: State, clock: Clock, has_layer: Callable[[str], bool]) -> None:
        self._state = state
        self._clock = clock
        self._has_layer = has_layer
        self._lock = threading.Lock()
        self._fresh: list[Record] = []
        self._used: dict[str, int] = {}
        state.migrate("build_cache", MIGRATIONS)

    def find(self, key: str) -> Record | None:
        """The record of a step, if its layer still exists."""
        with self._lock:
            record = next((r for r in self._fresh if r.key == key), None)
        if record is None:
            row = self._state.row("SELECT * FROM build_cache WHERE key = ?", (key,))
            record = None if row is None else _record(row)
        if record is None or (record.chain and not self._has_layer(record.chain)):
            return None
        with self._lock:
            self._used[record.key] = self._clock.now_ns()
        return record

    def add(self, record: Record) -> None:
        """Keep a record; on the disk at the next :meth:`flush` (a layer's at once)."""
        with self._lock:
            self._fresh = [r for r in self._fresh if r.key != record.key] + [record]
        if record.diff_id:
            self.flush()

    def flush(self, *, uses: bool = False) -> None:
        """Write what was added.

        Args:
            uses: write when records were used too, even if none was added; a kill may lose
                that, and waiting for the disk would be most of an unchanged build.
        """
        with self._lock:
            fresh, self._fresh = self._fresh, []
            if not fresh and not (uses and self._used):
                return
            used, self._used = self._used, {}
        now = self._clock.now_ns()
        with self._state.write() as db:
            db.executemany(
                "INSERT OR REPLACE INTO build_cache VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?)",
                [_row(record, now) for record in fresh],
            )
            db.executemany(
                "UPDATE build_cache SET used_ns = ?, uses = uses + 1 WHERE key = ?",
                [(when, key) for key, when in used.items()],
            )

    def records(self) -> list[Record]:
        """Every record, the last used first."""
        self.flush(uses=True)
        rows = self._state.rows("SELECT * FROM build_cache ORDER BY used_ns DESC, key")
        return [_record(row) for row in rows]

    def chains(self) -> set[str]:
        """Chain ids of the layers that records hold."""
        with self._lock:
            fresh = {record.chain for record in self._fresh}
        rows = self._state.rows("SELECT DISTINCT chain FROM build_cache WHERE chain <> ''")
        return (fresh - {""}) | {row["chain"] for row in rows}

    def remove(self, keys: Iterable[str]) -> None:
        """Forget records, and every record made on them."""
        with self._state.write() as db:
            for key in keys:
                db.execute("DELETE FROM build_cache WHERE key = ? OR alias = ?", (key, key))


def _row(record: Record, now_ns: int) -> tuple[str | int, ...]:
    return (
        record.key,
        record.parent,
        record.kind,
        record.description,
        record.chain,
        record.diff_id,
        record.size,
        record.created_ns,
        now_ns,
        record.alias,
    )


def _record(row: sqlite3.Row) -> Record:
    return Record(**{name: row[name] for name in row.keys()})  # noqa: SIM118 - Row iterates values

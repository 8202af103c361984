"""The daemon's database: SQLite in WAL mode, opened by one process, migrated in steps.

Each part that keeps state owns its tables and lists its migrations under its own name;
a migration, once released, is never edited.  Writers go through :meth:`State.write`, a
transaction that is on the disk when the block ends (``synchronous=FULL``), so that a
write-ahead record may be relied on before the step it announces.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lazarette.storage.errors import InternalError, NoSpace


class State:
    """One database file.

    Args:
        path: the file; made if absent.  ``":memory:"`` for tests.
    """

    def __init__(self, path: Path | str) -> None:
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(str(path), check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
        except sqlite3.DatabaseError as bad:
            raise InternalError(
                f"state database {path} cannot be opened: {bad}",
                hint="move it away and start again, then laz recover",
            ) from bad
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA foreign_keys=ON")
        self._db.execute("PRAGMA busy_timeout=10000")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS migrations"
            " (part TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT"
        )

    def migrate(self, part: str, steps: Sequence[str]) -> None:
        """Bring a part's tables up to date.

        Args:
            part: the owner of the tables, e.g. ``"volumes"``.
            steps: SQL scripts, oldest first; only those not yet run are run, each in its
                own transaction together with the record that it ran.

        Raises:
            InternalError: the file was written by a newer version.
        """
        with self._lock:
            row = self._db.execute(
                "SELECT version FROM migrations WHERE part = ?", (part,)
            ).fetchone()
            done = 0 if row is None else int(row["version"])
            if done > len(steps):
                raise InternalError(
                    f"state of {part} has version {done}, this program knows {len(steps)}",
                    hint="upgrade lazarette",
                )
            for version, script in enumerate(steps[done:], done + 1):
                with self.write() as db:
                    for statement in filter(str.strip, script.split(";")):
                        db.execute(statement)
                    db.execute(
                        "INSERT INTO migrations VALUES (?, ?)"
                        " ON CONFLICT (part) DO UPDATE SET version = excluded.version",
                        (part, version),
                    )

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: committed and synced at the end, rolled back on an error.

        Raises:
            NoSpace: the disk is full.
        """
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as failed:
                if self._db.in_transaction:  # SQLite ends some by itself
                    self._db.execute("ROLLBACK")
                if isinstance(failed, sqlite3.Error) and _is_full(failed):
                    raise NoSpace("the state database cannot grow: the disk is full") from failed
                raise

    def rows(self, sql: str, values: Sequence[object] = ()) -> list[sqlite3.Row]:
        """All rows of a query."""
        with self._lock:
            return self._db.execute(sql, tuple(values)).fetchall()

    def row(self, sql: str, values: Sequence[object] = ()) -> sqlite3.Row | None:
        """The first row of a query, or None."""
        found = self.rows(sql, values)
        return found[0] if found else None

    def close(self) -> None:
        """Close the file; the object is of no further use."""
        with self._lock:
            self._db.close()


def _is_full(failed: sqlite3.Error) -> bool:
    """Whether a write failed for want of room."""
    return getattr(failed, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL

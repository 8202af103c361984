"""A small database of what blocks are made of, by chunk; see :mod:`lazarette.backup.pagemaps`."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_LARGEST = 2 << 30
"""Size of the database, bytes, beyond which it is made anew."""


class PageMapFile:
    """Packed maps in a file; safe in several threads.

    Args:
        file: made anew if it is damaged.
    """

    def __init__(self, file: Path) -> None:
        self._lock = threading.Lock()
        if file.exists() and file.stat().st_size > _LARGEST:
            file.unlink()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._db = self._open(file)
        except sqlite3.DatabaseError:
            file.unlink(missing_ok=True)
            self._db = self._open(file)

    @staticmethod
    def _open(file: Path) -> sqlite3.Connection:
        db = sqlite3.connect(file, check_same_thread=False, isolation_level=None, timeout=1.0)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=OFF")
            db.execute(
                "CREATE TABLE IF NOT EXISTS maps (chunk BLOB PRIMARY KEY, map BLOB) WITHOUT ROWID"
            )
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db

    def find_all(self, chunks: Sequence[bytes]) -> dict[bytes, bytes]:
        """The maps of blocks, those that are there; of none when the file cannot be read.

        Args:
            chunks: of the blocks; at most some thousands.
        """
        marks = ",".join("?" * len(chunks))
        with self._lock:
            try:
                rows = self._db.execute(
                    f"SELECT chunk, map FROM maps WHERE chunk IN ({marks})", chunks
                ).fetchall()
            except sqlite3.DatabaseError:
                return {}
        return dict(rows)

    def write(self, fresh: Mapping[bytes, bytes], replaced: Sequence[bytes]) -> None:
        """Put maps in and take others out, if the file can be written."""
        rows = sorted(fresh.items())  # in the order of the table, which is several times faster
        with self._lock:
            try:
                self._db.execute("BEGIN")
                self._db.executemany("DELETE FROM maps WHERE chunk = ?", [(c,) for c in replaced])
                self._db.executemany("INSERT OR REPLACE INTO maps VALUES (?, ?)", rows)
                self._db.execute("COMMIT")
            except sqlite3.DatabaseError:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

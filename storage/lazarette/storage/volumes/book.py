"""The records of volumes in the state database: names, users, and what is under way.

Written ahead: an operation first puts a row into ``volume_operations``, then lets the
driver act, then changes the records and drops the row.  A row that is still there at the
next start is an operation that was killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from lazarette.storage import steps
from lazarette.storage.errors import VolumeNotFound
from lazarette.storage.state import State

_MIGRATIONS = (
    """
    CREATE TABLE volumes (
        name TEXT PRIMARY KEY,
        driver TEXT NOT NULL,
        options TEXT NOT NULL,
        labels TEXT NOT NULL,
        created_ns INTEGER NOT NULL,
        anonymous INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE volume_users (
        volume TEXT NOT NULL REFERENCES volumes(name) ON DELETE CASCADE ON UPDATE CASCADE,
        user TEXT NOT NULL,
        PRIMARY KEY (volume, user)
    ) STRICT;
    CREATE TABLE volume_operations (
        id INTEGER PRIMARY KEY,
        verb TEXT NOT NULL,
        driver TEXT NOT NULL,
        volume TEXT NOT NULL,
        detail TEXT NOT NULL
    ) STRICT
    """,
    "ALTER TABLE volumes ADD COLUMN undecided INTEGER NOT NULL DEFAULT 0",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is recorded of a volume.

    Attributes:
        name: its name.
        driver: name of its driver.
        options: as given at its creation.
        labels: of the user.
        created_ns: wall clock.
        anonymous: it was given no name.
        undecided: nobody asked for its driver, and nobody has mounted it yet.
    """

    name: str
    driver: str
    options: Mapping[str, str]
    labels: Mapping[str, str]
    created_ns: int
    anonymous: bool
    undecided: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation that was announced and not settled.

    Attributes:
        id: of its row.
        verb: what was to be done.
        driver: by which driver.
        volume: to which volume.
        detail: further arguments.
    """

    id: int
    verb: str
    driver: str
    volume: str
    detail: Mapping[str, str]


class VolumeBook:
    """Records of volumes.

    Args:
        state: the daemon's database.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        state.migrate("volumes", _MIGRATIONS)

    # ---- volumes

    def get(self, name: str) -> Entry:
        """A volume's record.

        Raises:
            VolumeNotFound: there is none.
        """
        row = self._state.row("SELECT * FROM volumes WHERE name = ?", (name,))
        if row is None:
            raise VolumeNotFound(f"get {name}: no such volume")
        return Entry(
            name=str(row["name"]),
            driver=str(row["driver"]),
            options=_strings(str(row["options"])),
            labels=_strings(str(row["labels"])),
            created_ns=int(row["created_ns"]),
            anonymous=bool(row["anonymous"]),
            undecided=bool(row["undecided"]),
        )

    def has(self, name: str) -> bool:
        """Whether a volume is recorded."""
        return self._state.row("SELECT 1 FROM volumes WHERE name = ?", (name,)) is not None

    def names(self) -> list[str]:
        """All volumes, sorted."""
        return [str(r["name"]) for r in self._state.rows("SELECT name FROM volumes ORDER BY name")]

    def add(self, entry: Entry) -> None:
        """Record a volume."""
        with self._state.write() as db:
            db.execute(
                "INSERT INTO volumes VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    entry.name,
                    entry.driver,
                    _text(entry.options),
                    _text(entry.labels),
                    entry.created_ns,
                    entry.anonymous,
                    entry.undecided,
                ),
            )

    def forget(self, name: str) -> None:
        """Drop a volume's record; nothing happens if there is none."""
        with self._state.write() as db:
            db.execute("DELETE FROM volumes WHERE name = ?", (name,))

    def rename(self, name: str, new: str) -> None:
        """Record another name; a volume that is given one is no longer anonymous."""
        with self._state.write() as db:
            db.execute("UPDATE volumes SET name = ?, anonymous = 0 WHERE name = ?", (new, name))

    def set_labels(self, name: str, labels: Mapping[str, str]) -> None:
        """Replace the labels of a volume."""
        with self._state.write() as db:
            db.execute("UPDATE volumes SET labels = ? WHERE name = ?", (_text(labels), name))

    def set_driver(self, name: str, driver: str) -> None:
        """Record that a volume has another driver now, which is to stay."""
        with self._state.write() as db:
            db.execute(
                "UPDATE volumes SET driver = ?, undecided = 0 WHERE name = ?", (driver, name)
            )

    # ---- users

    def users(self, name: str) -> tuple[str, ...]:
        """Ids of those who have a volume mounted, sorted."""
        rows = self._state.rows(
            "SELECT user FROM volume_users WHERE volume = ? ORDER BY user", (name,)
        )
        return tuple(str(row["user"]) for row in rows)

    def add_user(self, name: str, user: str) -> None:
        """Record a user; the same one counts once."""
        with self._state.write() as db:
            db.execute("UPDATE volumes SET undecided = 0 WHERE name = ?", (name,))
            db.execute("INSERT OR IGNORE INTO volume_users VALUES (?, ?)", (name, user))

    def drop_user(self, name: str, user: str) -> None:
        """Forget a user."""
        with self._state.write() as db:
            db.execute("DELETE FROM volume_users WHERE volume = ? AND user = ?", (name, user))

    def used(self) -> list[str]:
        """Volumes that somebody has mounted."""
        rows = self._state.rows("SELECT DISTINCT volume FROM volume_users ORDER BY volume")
        return [str(row["volume"]) for row in rows]

    def drivers(self) -> list[str]:
        """Drivers that any volume or unfinished operation is of."""
        rows = self._state.rows(
            "SELECT driver FROM volumes UNION SELECT driver FROM volume_operations"
        )
        return sorted(str(row["driver"]) for row in rows)

    # ---- write-ahead

    @contextmanager
    def operation(self, verb: str, driver: str, volume: str, **detail: str) -> Iterator[None]:
        """Announce, run the block, settle; a block that raises must leave nothing half done."""
        with self._state.write() as db:
            cursor = db.execute(
                "INSERT INTO volume_operations (verb, driver, volume, detail) VALUES (?, ?, ?, ?)",
                (verb, driver, volume, _text(detail)),
            )
            number = int(cursor.lastrowid or 0)
        steps.reached(f"volume.{verb}.announced")
        try:
            yield
        finally:
            self.settle(number)
        steps.reached(f"volume.{verb}.settled")

    def settle(self, operation: int) -> None:
        """Note that an operation is done or undone."""
        with self._state.write() as db:
            db.execute("DELETE FROM volume_operations WHERE id = ?", (operation,))

    def unfinished(self) -> list[Operation]:
        """Operations that were killed, oldest first."""
        rows = self._state.rows("SELECT * FROM volume_operations ORDER BY id")
        return [
            Operation(
                int(row["id"]),
                str(row["verb"]),
                str(row["driver"]),
                str(row["volume"]),
                _strings(str(row["detail"])),
            )
            for row in rows
        ]


def _text(values: Mapping[str, str]) -> str:
    return json.dumps(dict(values), sort_keys=True)


def _strings(text: str) -> dict[str, str]:
    return {str(key): str(value) for key, value in json.loads(text).items()}

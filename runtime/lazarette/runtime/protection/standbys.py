"""Which volumes of this host follow another host's backups, and how far each is."""

from __future__ import annotations

import msgspec

from lazarette.storage.errors import Conflict, NotFound
from lazarette.storage.state import State

_MIGRATIONS = (
    """
    CREATE TABLE standbys (
        volume TEXT PRIMARY KEY,
        repository TEXT NOT NULL,
        every_ns INTEGER NOT NULL,
        applied TEXT NOT NULL DEFAULT '',
        applied_time_ns INTEGER NOT NULL DEFAULT 0,
        local TEXT NOT NULL DEFAULT '',
        applying TEXT NOT NULL DEFAULT '',
        job TEXT NOT NULL DEFAULT '',
        fresh INTEGER NOT NULL DEFAULT 0,
        promoted INTEGER NOT NULL DEFAULT 0,
        checked_ns INTEGER NOT NULL DEFAULT 0,
        bytes_written INTEGER NOT NULL DEFAULT 0,
        error TEXT NOT NULL DEFAULT ''
    ) STRICT
    """,
)


class NotFollowing(NotFound):
    """The volume follows nothing here."""

    number = 330


class FollowsAlready(Conflict):
    """The volume is a standby already."""

    number = 331


class Standby(msgspec.Struct, frozen=True):
    """A volume that follows a history.

    Attributes:
        volume: its name here and in the repository.
        repository: name of the repository.
        every_ns: how often the repository is looked at.
        applied: id of the snapshot the volume equals; empty before the first.
        applied_time_ns: the instant that one shows.
        local: the volume snapshot that keeps this state.
        applying: id of the snapshot being applied; empty when none is.
        job: name of the job that does it.
        fresh: the volume was made for this.
        promoted: it was taken over and follows no more; its containers are being started.
        checked_ns: when the repository was last looked at with success.
        bytes_written: by the last difference.
        error: why the last look failed; empty when it did not.
    """

    volume: str
    repository: str
    every_ns: int
    applied: str = ""
    applied_time_ns: int = 0
    local: str = ""
    applying: str = ""
    job: str = ""
    fresh: bool = False
    promoted: bool = False
    checked_ns: int = 0
    bytes_written: int = 0
    error: str = ""


class StandbyBook:
    """Standbys in the daemon's database."""

    def __init__(self, state: State) -> None:
        self._state = state
        state.migrate("standbys", _MIGRATIONS)

    def all(self) -> list[Standby]:
        """All of them, by name."""
        rows = self._state.rows("SELECT * FROM standbys ORDER BY volume")
        flags = ("fresh", "promoted")
        return [Standby(**dict(row) | {name: bool(row[name]) for name in flags}) for row in rows]

    def find(self, volume: str) -> Standby | None:
        """One of them."""
        return next((one for one in self.all() if one.volume == volume), None)

    def add(self, one: Standby) -> None:
        """Write a new one down."""
        with self._state.write() as db:
            db.execute(
                "INSERT INTO standbys (volume, repository, every_ns, local, fresh)"
                " VALUES (?, ?, ?, ?, ?)",
                (one.volume, one.repository, one.every_ns, one.local, int(one.fresh)),
            )

    def change(self, volume: str, **values: str | int) -> None:
        """Change some fields."""
        assert set(values) <= set(Standby.__struct_fields__)
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._state.write() as db:
            db.execute(
                f"UPDATE standbys SET {columns} WHERE volume = ?", (*values.values(), volume)
            )

    def remove(self, volume: str) -> None:
        """Forget one."""
        with self._state.write() as db:
            db.execute("DELETE FROM standbys WHERE volume = ?", (volume,))

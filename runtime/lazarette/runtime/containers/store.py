"""Containers in the daemon's database: one row each, definition and state as JSON."""

from __future__ import annotations

import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime.containers.record import Definition, State
from lazarette.storage.state import State as Database

MIGRATIONS = (
    """
    CREATE TABLE containers (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        definition TEXT NOT NULL,
        state TEXT NOT NULL
    ) STRICT;
    CREATE TABLE container_gates (
        id TEXT PRIMARY KEY,
        containers TEXT NOT NULL
    ) STRICT
    """,
)


class ContainerStore:
    """The rows of all containers.

    Args:
        database: the daemon's.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        database.migrate("containers", MIGRATIONS)

    def load(self) -> list[tuple[Definition, State]]:
        """Every container, oldest first."""
        rows = self._database.rows("SELECT definition, state FROM containers")
        found = [
            (
                jsontext.decode(row["definition"], type=Definition),
                jsontext.decode(row["state"], type=State),
            )
            for row in rows
        ]
        return sorted(found, key=lambda pair: pair[0].created_ns)

    def save(self, definition: Definition, state: State) -> None:
        """Write a container, new or changed."""
        with self._database.write() as db:
            db.execute(
                "INSERT INTO containers VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "name = excluded.name, definition = excluded.definition, state = excluded.state",
                (definition.id, definition.name, _text(definition), _text(state)),
            )

    def save_state(self, container: str, state: State) -> None:
        """Write what changed in a container's life."""
        with self._database.write() as db:
            db.execute("UPDATE containers SET state = ? WHERE id = ?", (_text(state), container))

    def delete(self, container: str) -> None:
        """Forget a container."""
        with self._database.write() as db:
            db.execute("DELETE FROM containers WHERE id = ?", (container,))

    def open_gate(self, gate: str) -> None:
        """Forget that a gate is closed."""
        with self._database.write() as db:
            db.execute("DELETE FROM container_gates WHERE id = ?", (gate,))

    def close_gate(self, gate: str, containers: list[str]) -> None:
        """Record, before it happens, that a gate freezes these containers."""
        with self._database.write() as db:
            db.execute(
                "INSERT OR REPLACE INTO container_gates VALUES (?, ?)", (gate, _text(containers))
            )

    def closed_gates(self) -> dict[str, list[str]]:
        """Gates that a killed daemon left closed, with the ids of their containers."""
        rows = self._database.rows("SELECT id, containers FROM container_gates")
        return {row["id"]: jsontext.decode(row["containers"], type=list[str]) for row in rows}


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()

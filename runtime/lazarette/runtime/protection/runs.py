"""Backup runs: written ahead of what they do, so that none is lost silently."""

from __future__ import annotations

import sqlite3
from typing import Literal

import msgspec

from lazarette.backup.jobs.model import Result
from lazarette.fuse import jsontext
from lazarette.storage.clock import Clock
from lazarette.storage.state import State

Outcome = Literal["running", "ok", "warnings", "failed", "cancelled"]

_MIGRATIONS = (
    """
    CREATE TABLE backup_runs (
        id TEXT PRIMARY KEY,
        volume TEXT NOT NULL,
        repository TEXT NOT NULL,
        trigger TEXT NOT NULL,
        outcome TEXT NOT NULL,
        started_ns INTEGER NOT NULL,
        ended_ns INTEGER NOT NULL DEFAULT 0,
        local TEXT NOT NULL,
        snapshot TEXT NOT NULL DEFAULT '',
        base_held INTEGER NOT NULL DEFAULT 0,
        pause_ns INTEGER NOT NULL DEFAULT 0,
        instant_ns INTEGER NOT NULL DEFAULT 0,
        consistency TEXT NOT NULL DEFAULT 'none',
        result TEXT NOT NULL DEFAULT '{}',
        journal INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE INDEX backup_runs_volume ON backup_runs (volume, started_ns)
    """,
)


class Run(msgspec.Struct):
    """One backup of one volume into one repository.

    Attributes:
        id: also the name of its job.
        volume: what was backed up.
        repository: name of the repository.
        trigger: ``manual`` or ``schedule``.
        outcome: how it ended, or ``running``.
        started_ns: wall clock.
        ended_ns: wall clock; 0 while running.
        local: id of the volume snapshot it read.
        snapshot: id of the repository snapshot it made.
        base_held: the volume snapshot is kept as the base of the next run.
        pause_ns: for how long writers were held.
        instant_ns: the moment the data show.
        consistency: ``application``, ``crash`` or ``none``.
        result: what the job reported.
        journal: its number in the journal of all runs.
    """

    id: str
    volume: str
    repository: str
    trigger: str
    outcome: Outcome
    started_ns: int
    ended_ns: int
    local: str
    snapshot: str
    base_held: bool
    pause_ns: int
    instant_ns: int
    consistency: str
    result: Result
    journal: int


class RunBook:
    """The runs of a daemon, in its database."""

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self._clock = clock
        state.migrate("backup runs", _MIGRATIONS)

    def begin(
        self, run_id: str, volume: str, repository: str, trigger: str, local: str, journal: int
    ) -> None:
        """Record a run before its snapshot is taken."""
        with self._state.write() as db:
            db.execute(
                "INSERT INTO backup_runs (id, volume, repository, trigger, outcome, started_ns,"
                " local, journal) VALUES (?, ?, ?, ?, 'running', ?, ?, ?)",
                (run_id, volume, repository, trigger, self._clock.now_ns(), local, journal),
            )

    def snapshot_taken(self, run_id: str, pause_ns: int, instant_ns: int, consistency: str) -> None:
        """Record what its snapshot shows."""
        with self._state.write() as db:
            db.execute(
                "UPDATE backup_runs SET pause_ns = ?, instant_ns = ?, consistency = ? WHERE id = ?",
                (pause_ns, instant_ns, consistency, run_id),
            )

    def end(self, run_id: str, result: Result) -> None:
        """Record how it ended; a good one's volume snapshot becomes the base of the next."""
        good = result.outcome in ("ok", "warnings")
        with self._state.write() as db:
            db.execute(
                "UPDATE backup_runs SET outcome = ?, ended_ns = ?, snapshot = ?, base_held = ?,"
                " result = ? WHERE id = ?",
                (
                    result.outcome,
                    self._clock.now_ns(),
                    result.snapshot,
                    int(good),
                    msgspec.json.encode(result).decode(),
                    run_id,
                ),
            )

    def release_base(self, run_id: str) -> None:
        """Record that a run's volume snapshot is gone."""
        with self._state.write() as db:
            db.execute("UPDATE backup_runs SET base_held = 0 WHERE id = ?", (run_id,))

    def get(self, run_id: str) -> Run | None:
        """One run."""
        row = self._state.row("SELECT * FROM backup_runs WHERE id = ?", (run_id,))
        return None if row is None else _run(row)

    def unfinished(self) -> list[Run]:
        """Runs an earlier daemon left behind."""
        return self._select("outcome = 'running' ORDER BY started_ns", ())

    def bases(self, volume: str, repository: str) -> list[Run]:
        """Runs whose volume snapshot is still held, newest first."""
        return self._select(
            "volume = ? AND repository = ? AND base_held = 1 ORDER BY instant_ns DESC",
            (volume, repository),
        )

    def of_volume(self, volume: str, limit: int = 100) -> list[Run]:
        """The runs of a volume, newest first."""
        return self._select("volume = ? ORDER BY started_ns DESC LIMIT ?", (volume, limit))

    def recent(self, limit: int = 100) -> list[Run]:
        """The newest runs of all volumes."""
        return self._select("1 = 1 ORDER BY started_ns DESC LIMIT ?", (limit,))

    def _select(self, where: str, values: tuple[object, ...]) -> list[Run]:
        return [
            _run(row)
            for row in self._state.rows(f"SELECT * FROM backup_runs WHERE {where}", values)
        ]


def _run(row: sqlite3.Row) -> Run:
    fields = dict(row)
    fields["base_held"] = bool(fields["base_held"])
    raw = fields.pop("result")
    result = Result("failed") if raw == "{}" else jsontext.decode(raw, type=Result)
    return Run(**fields, result=result)

"""The journal of runs: what was begun, how it ended, and what a volume's state is by it.

A run is written down before it does anything.  One that is found without an end at the
daemon's start, and whose process is gone, has failed (case A11): nothing is "in progress"
for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from sqlite3 import Row

import msgspec

from lazarette.backup.policy.outcome import Consistency, Kind, Outcome, Result, failed
from lazarette.fuse import jsontext
from lazarette.storage.clock import Clock
from lazarette.storage.errors import NotFound
from lazarette.storage.state import State

_STEPS = (
    """
    CREATE TABLE policy_runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        policy TEXT NOT NULL, volume TEXT NOT NULL, kind TEXT NOT NULL, reason TEXT NOT NULL,
        started_ns INTEGER NOT NULL, ended_ns INTEGER, result TEXT,
        warnings TEXT NOT NULL DEFAULT '[]', error TEXT NOT NULL DEFAULT '',
        snapshot TEXT NOT NULL DEFAULT '', suspicious INTEGER NOT NULL DEFAULT 0,
        consistency TEXT NOT NULL DEFAULT 'none', pause_ns INTEGER NOT NULL DEFAULT 0,
        bytes_read INTEGER NOT NULL DEFAULT 0, bytes_sent INTEGER NOT NULL DEFAULT 0,
        restore_ns INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE INDEX policy_runs_volume ON policy_runs (volume, kind, id);
    CREATE TABLE policy_slots (
        policy TEXT PRIMARY KEY, last_ns INTEGER NOT NULL DEFAULT 0,
        skipped INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    """,
    "ALTER TABLE policy_slots ADD COLUMN pending INTEGER NOT NULL DEFAULT 0",
    "CREATE TABLE policy_volumes (volume TEXT PRIMARY KEY, since_ns INTEGER NOT NULL) STRICT",
)
_KEPT_RUNS = 20_000


class Reason(Enum):
    """Why a run was begun."""

    SCHEDULE = "schedule"
    MISSED = "missed while the daemon was away"
    ASKED = "asked for"


@dataclass(frozen=True, slots=True)
class Run:
    """A run as the journal has it; ``ended_ns`` and ``outcome`` are None while it lasts."""

    id: int
    policy: str
    volume: str
    kind: Kind
    reason: str
    started_ns: int
    ended_ns: int | None
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Protection:
    """The state of one volume.

    Attributes:
        last: its newest run of a backup.
        last_good: the newest that counts.
        last_verified: the newest good verification of all stored data, or good drill.
        last_drill: the newest restore drill.
        rpo_ns: age of the newest good backup; None when there is none.
        rpo_target_ns: the oldest it may be.
        rto_ns: the restore time last measured; None when no drill succeeded.
        rto_target_ns: the longest it may be; 0 for no target.
        watched_ns: for how long a policy has meant it.
    """

    volume: str
    last: Run | None
    last_good: Run | None
    last_verified: Run | None
    last_drill: Run | None
    rpo_ns: int | None
    rpo_target_ns: int
    rto_ns: int | None
    rto_target_ns: int
    watched_ns: int = 0

    @property
    def waiting(self) -> bool:
        """Whether there is no good backup yet, and need not be: the policy is too new."""
        return self.rpo_ns is None and self.watched_ns <= self.rpo_target_ns

    @property
    def overdue(self) -> bool:
        """Whether the newest good backup is older than it may be, or there should be one."""
        if self.rpo_ns is None:
            return not self.waiting
        return self.rpo_ns > self.rpo_target_ns


class Journal:
    """Runs in the daemon's database."""

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self._clock = clock
        state.migrate("policy_journal", _STEPS)

    def begin(self, policy: str, volume: str, kind: Kind, reason: Reason = Reason.SCHEDULE) -> int:
        """Write a run down, durably, before it does anything; its number."""
        with self._state.write() as db:
            cursor = db.execute(
                "INSERT INTO policy_runs (policy, volume, kind, reason, started_ns)"
                " VALUES (?, ?, ?, ?, ?)",
                (policy, volume, kind.value, reason.value, self._clock.now_ns()),
            )
            number = cursor.lastrowid
            assert number is not None
            db.execute("DELETE FROM policy_runs WHERE id <= ?", (number - _KEPT_RUNS,))
            db.execute("UPDATE policy_slots SET pending = 0 WHERE policy = ?", (policy,))
        return number

    def end(self, run: int, outcome: Outcome) -> None:
        """Write down how it ended; the first end counts."""
        with self._state.write() as db:
            db.execute(
                "UPDATE policy_runs SET ended_ns = ?, result = ?, warnings = ?, error = ?,"
                " snapshot = ?, suspicious = ?, consistency = ?, pause_ns = ?, bytes_read = ?,"
                " bytes_sent = ?, restore_ns = ? WHERE id = ? AND ended_ns IS NULL",
                (
                    self._clock.now_ns(),
                    outcome.result.value,
                    msgspec.json.encode(outcome.warnings).decode(),
                    outcome.error,
                    outcome.snapshot,
                    int(outcome.suspicious),
                    outcome.consistency.value,
                    outcome.pause_ns,
                    outcome.bytes_read,
                    outcome.bytes_sent,
                    outcome.restore_ns,
                    run,
                ),
            )

    def watch(self, volumes: Collection[str]) -> None:
        """These volumes, and no others, are meant by a policy from now on or still."""
        known = {
            str(row["volume"]) for row in self._state.rows("SELECT volume FROM policy_volumes")
        }
        gone, fresh = known.difference(volumes), set(volumes) - known
        if not gone and not fresh:
            return
        now = self._clock.now_ns()
        with self._state.write() as db:
            db.executemany("DELETE FROM policy_volumes WHERE volume = ?", [(one,) for one in gone])
            db.executemany(
                "INSERT OR IGNORE INTO policy_volumes VALUES (?, ?)", [(one, now) for one in fresh]
            )

    def close_abandoned(self, is_alive: Callable[[int], bool] = lambda run: False) -> list[Run]:
        """Fail every run without an end, except those ``is_alive`` knows; at the start."""
        open_runs = self._runs("ended_ns IS NULL", ())
        gone = [run for run in open_runs if not is_alive(run.id)]
        for run in gone:
            self.end(run.id, failed("its process ended before it did"))
        return [self.run(run.id) for run in gone]

    def run(self, number: int) -> Run:
        """One run.

        Raises:
            NotFound: there is none, or it is too long ago.
        """
        found = self._runs("id = ?", (number,))
        if not found:
            raise NotFound(f"no run {number} in the journal")
        return found[0]

    def runs(self, *, volume: str = "", kind: Kind | None = None, limit: int = 100) -> list[Run]:
        """The newest first."""
        conditions, values = ["1"], list[object]()
        if volume:
            conditions.append("volume = ?")
            values.append(volume)
        if kind is not None:
            conditions.append("kind = ?")
            values.append(kind.value)
        return self._runs(" AND ".join(conditions), tuple(values), limit)

    def protection(self, volume: str, rpo_target_ns: int, rto_target_ns: int = 0) -> Protection:
        """The state of a volume at this moment."""
        good = "volume = ? AND kind = ? AND result IN ('ok', 'warnings') AND suspicious = 0"
        last_good = self._newest(good, (volume, Kind.BACKUP.value))
        proven = self._newest(good, (volume, Kind.DRILL.value))
        # from the beginning of the run: the data are at least as old as that
        age = None if last_good is None else max(self._clock.now_ns() - last_good.started_ns, 0)
        return Protection(
            volume=volume,
            last=self._newest("volume = ? AND kind = ?", (volume, Kind.BACKUP.value)),
            last_good=last_good,
            last_verified=max(
                filter(None, (self._newest(good, (volume, Kind.VERIFY.value)), proven)),
                key=lambda run: run.started_ns,
                default=None,
            ),
            last_drill=self._newest("volume = ? AND kind = ?", (volume, Kind.DRILL.value)),
            rpo_ns=age,
            rpo_target_ns=rpo_target_ns,
            rto_ns=proven.outcome.restore_ns if proven and proven.outcome else None,
            rto_target_ns=rto_target_ns,
            watched_ns=self._watched(volume),
        )

    def suspicious_snapshots(self, volume: str) -> set[str]:
        """Ids of a volume's snapshots that do not count until somebody approves."""
        rows = self._state.rows(
            "SELECT snapshot FROM policy_runs WHERE volume = ? AND suspicious = 1", (volume,)
        )
        return {str(row["snapshot"]) for row in rows}

    def approve(self, volume: str) -> int:
        """A person has looked: a volume's suspicious backups count from now on; how many."""
        with self._state.write() as db:
            return db.execute(
                "UPDATE policy_runs SET suspicious = 0 WHERE volume = ? AND suspicious = 1",
                (volume,),
            ).rowcount

    def fired(self, policy: str, due_ns: int, *, pending: bool = False) -> None:
        """Remember the last due instant that was acted on.

        Args:
            policy: whose.
            due_ns: the instant.
            pending: a run is to begin: until it is in the journal, or :meth:`taken`, a daemon
                that dies has missed it.
        """
        with self._state.write() as db:
            db.execute(
                "INSERT INTO policy_slots (policy, last_ns, pending) VALUES (?, ?, ?)"
                " ON CONFLICT (policy) DO UPDATE SET last_ns = excluded.last_ns,"
                " pending = max(pending, excluded.pending)",
                (policy, due_ns, int(pending)),
            )

    def taken(self, policy: str) -> None:
        """What was due has been done, or there was nothing to do."""
        with self._state.write() as db:
            db.execute("UPDATE policy_slots SET pending = 0 WHERE policy = ?", (policy,))

    def is_pending(self, policy: str) -> bool:
        """Whether a run was due that never began."""
        row = self._state.row("SELECT pending FROM policy_slots WHERE policy = ?", (policy,))
        return row is not None and bool(row["pending"])

    def last_fired(self, policy: str) -> int | None:
        """The last due instant that was acted on."""
        row = self._state.row("SELECT last_ns FROM policy_slots WHERE policy = ?", (policy,))
        return int(row["last_ns"]) or None if row is not None else None

    def skipped(self, policy: str, count: int = 1) -> int:
        """Count runs left out because one was still going on; 0 only asks."""
        with self._state.write() as db:
            db.execute(
                "INSERT INTO policy_slots (policy, skipped) VALUES (?, ?)"
                " ON CONFLICT (policy) DO UPDATE SET skipped = skipped + excluded.skipped",
                (policy, count),
            )
        row = self._state.row("SELECT skipped FROM policy_slots WHERE policy = ?", (policy,))
        return int(row["skipped"]) if row is not None else 0

    def _watched(self, volume: str) -> int:
        row = self._state.row("SELECT since_ns FROM policy_volumes WHERE volume = ?", (volume,))
        return 0 if row is None else max(self._clock.now_ns() - int(row["since_ns"]), 0)

    def _newest(self, condition: str, values: tuple[object, ...]) -> Run | None:
        found = self._runs(f"ended_ns IS NOT NULL AND {condition}", values, 1)
        return found[0] if found else None

    def _runs(self, condition: str, values: tuple[object, ...], limit: int = -1) -> list[Run]:
        rows = self._state.rows(
            f"SELECT * FROM policy_runs WHERE {condition} ORDER BY id DESC LIMIT ?",
            (*values, limit),
        )
        return [_run(row) for row in rows]


def _run(row: Row) -> Run:
    outcome = None
    if row["ended_ns"] is not None:
        outcome = Outcome(
            result=Result(row["result"]),
            warnings=tuple(jsontext.decode(row["warnings"], type=list[str])),
            error=row["error"],
            snapshot=row["snapshot"],
            suspicious=bool(row["suspicious"]),
            consistency=Consistency(row["consistency"]),
            pause_ns=row["pause_ns"],
            bytes_read=row["bytes_read"],
            bytes_sent=row["bytes_sent"],
            restore_ns=row["restore_ns"],
        )
    return Run(
        id=row["id"],
        policy=row["policy"],
        volume=row["volume"],
        kind=Kind(row["kind"]),
        reason=row["reason"],
        started_ns=row["started_ns"],
        ended_ns=row["ended_ns"],
        outcome=outcome,
    )

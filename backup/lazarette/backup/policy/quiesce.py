"""The record of what is being held, and its release exactly once.

Whatever is to be paused, stopped, locked or hooked is first written down here with what
releases it; then it is done.  So whoever dies in between - the job, the daemon - leaves a
record that the daemon's next start, or its watch over deadlines, works off (case A11)::

        write down ──▶ held ──▶ releasing ──▶ (removed)

*Unpause*, *start* and *unlock* may be done twice without harm: found at *releasing* after
a crash, they are done again.  A *hook* is somebody's own command and runs exactly once: one
found at *releasing* may have run and is only reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from sqlite3 import Row

import msgspec

from lazarette.backup.policy.access import ContainerAccess
from lazarette.fuse import jsontext
from lazarette.storage.clock import Clock
from lazarette.storage.errors import LazaretteError
from lazarette.storage.state import State

_STEPS = (
    """
    CREATE TABLE policy_holds (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run INTEGER NOT NULL, kind TEXT NOT NULL, container TEXT NOT NULL,
        argv TEXT NOT NULL, state TEXT NOT NULL, since_ns INTEGER NOT NULL
    ) STRICT;
    """,
)
HOOK_TIMEOUT = 20.0
RELEASE_TIMEOUT = 10.0


class ReleaseKind(Enum):
    """What ends a hold."""

    UNPAUSE = "unpause"
    START = "start"
    UNLOCK = "unlock"
    """A command that may run twice."""
    HOOK = "hook"
    """A command that runs exactly once."""


@dataclass(frozen=True, slots=True)
class Release:
    """What ends a hold: of which container (empty: the host), by which command."""

    kind: ReleaseKind
    container: str = ""
    argv: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Hold:
    id: int
    run: int
    release: Release
    releasing: bool


class Quiesced:
    """The holds of all runs, in the daemon's database."""

    def __init__(self, state: State, clock: Clock) -> None:
        self._state = state
        self._clock = clock
        self._locks: dict[int, asyncio.Lock] = {}
        state.migrate("policy_holds", _STEPS)

    def write_down(self, run: int, release: Release) -> None:
        """Record durably that something is about to be held for a run."""
        with self._state.write() as db:
            db.execute(
                "INSERT INTO policy_holds (run, kind, container, argv, state, since_ns)"
                " VALUES (?, ?, ?, ?, 'held', ?)",
                (
                    run,
                    release.kind.value,
                    release.container,
                    msgspec.json.encode(release.argv).decode(),
                    self._clock.now_ns(),
                ),
            )

    def held_runs(self) -> list[int]:
        """Runs that hold something."""
        rows = self._state.rows("SELECT DISTINCT run FROM policy_holds ORDER BY run")
        return [int(row["run"]) for row in rows]

    def oldest_ns(self) -> int:
        """How long the oldest hold lasts, nanoseconds; 0 when nothing is held."""
        row = self._state.row("SELECT min(since_ns) AS since FROM policy_holds")
        if row is None or row["since"] is None:
            return 0
        return max(self._clock.now_ns() - int(row["since"]), 1)

    async def release(self, run: int, access: ContainerAccess) -> list[str]:
        """End a run's holds, the last first; what went wrong, one line each.

        Called twice, or by two at once, each hold is still ended once.  A hold that cannot
        be ended stays recorded, and is tried again by :meth:`release_all`.
        """
        lock = self._locks.setdefault(run, asyncio.Lock())
        problems: list[str] = []
        async with lock:
            for hold in self._holds(run):
                problem = await self._end(hold, access)
                if problem:
                    problems.append(problem)
        if not self._holds(run):
            self._locks.pop(run, None)
        return problems

    async def release_all(
        self, access: ContainerAccess, but: Sequence[int] = ()
    ) -> dict[int, list[str]]:
        """End the holds of every run that is not going on; at the daemon's start and later.

        Args:
            access: the containers.
            but: runs that are going on.

        Returns:
            What went wrong, by run; a run with an empty list was released well.
        """
        return {run: await self.release(run, access) for run in self.held_runs() if run not in but}

    async def _end(self, hold: _Hold, access: ContainerAccess) -> str:
        release = hold.release
        if release.kind is ReleaseKind.HOOK and hold.releasing:
            self._forget(hold)
            return f"whether the command {release.argv[0]} ran is not known: it was interrupted"
        self._mark(hold)
        try:
            async with asyncio.timeout(HOOK_TIMEOUT + RELEASE_TIMEOUT):
                problem = await _perform(release, access)
        except TimeoutError:
            problem = "it took too long"
        except LazaretteError as failed:
            problem = failed.message
        if not problem or release.kind is ReleaseKind.HOOK:
            self._forget(hold)
        where = release.container or "the host"
        return f"cannot {release.kind.value} {where}: {problem}" if problem else ""

    def _mark(self, hold: _Hold) -> None:
        with self._state.write() as db:
            db.execute("UPDATE policy_holds SET state = 'releasing' WHERE id = ?", (hold.id,))

    def _forget(self, hold: _Hold) -> None:
        with self._state.write() as db:
            db.execute("DELETE FROM policy_holds WHERE id = ?", (hold.id,))

    def _holds(self, run: int) -> list[_Hold]:
        rows = self._state.rows("SELECT * FROM policy_holds WHERE run = ? ORDER BY id DESC", (run,))
        return [_hold(row) for row in rows]


def _hold(row: Row) -> _Hold:
    argv = tuple(jsontext.decode(row["argv"], type=list[str]))
    release = Release(ReleaseKind(row["kind"]), row["container"], argv)
    return _Hold(row["id"], row["run"], release, row["state"] == "releasing")


async def _perform(release: Release, access: ContainerAccess) -> str:
    """End one hold; what went wrong, or nothing."""
    if release.kind is ReleaseKind.UNPAUSE:
        await access.unpause(release.container)
        return ""
    if release.kind is ReleaseKind.START:
        await access.start(release.container)
        return ""
    if release.container:
        ended = await access.execute(release.container, release.argv, HOOK_TIMEOUT)
    else:
        ended = await access.execute_on_host(release.argv, HOOK_TIMEOUT)
    return "" if ended.code == 0 else ended.last_words()

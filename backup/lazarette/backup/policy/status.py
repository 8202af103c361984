"""The state of protection in words: one line a volume."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lazarette.backup.policy.durations import format_duration
from lazarette.backup.policy.journal import Protection, Run
from lazarette.backup.policy.outcome import Result


class Level(Enum):
    """How bad it is; the command line shows the last two in yellow and red."""

    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class StatusLine:
    """One volume: its name, how it is, and the line without the name."""

    volume: str
    level: Level
    text: str


def status_line(state: Protection, next_run: str = "") -> StatusLine:
    """The line of a protected volume.

    Args:
        state: from the journal.
        next_run: when it is saved next, with zone and offset.
    """
    parts = [_age(state), _last(state.last), _drill(state)]
    if next_run:
        parts.append(f"next {next_run}")
    return StatusLine(state.volume, _level(state), ", ".join(filter(None, parts)))


def unprotected(volume: str) -> StatusLine:
    """The line of a volume that no policy means."""
    return StatusLine(volume, Level.WARNING, "not protected by any policy")


def _age(state: Protection) -> str:
    if state.rpo_ns is None:
        return "not saved yet" if state.waiting else "overdue: never saved"
    age = format_duration(state.rpo_ns)
    if state.overdue:
        return f"overdue: saved {age} ago, target {format_duration(state.rpo_target_ns)}"
    return f"saved {age} ago"


def _last(run: Run | None) -> str:
    if run is None or run.outcome is None:
        return ""
    outcome = run.outcome
    if outcome.result is Result.FAILED:
        return f"last run failed: {outcome.error}"
    words = outcome.consistency.value + " consistent"
    if outcome.suspicious:
        return f"{words}, suspicious: {'; '.join(outcome.warnings)}"
    if outcome.result is Result.WARNINGS:
        return f"{words}, {len(outcome.warnings)} warnings"
    return words


def _drill(state: Protection) -> str:
    if state.last_drill is None or state.last_drill.outcome is None:
        return ""
    if state.last_drill.outcome.result is Result.FAILED:
        return "last drill failed"
    return f"restores in {(state.rto_ns or 0) / 1e9:.1f}s"


def _level(state: Protection) -> Level:
    last = state.last.outcome if state.last else None
    drill = state.last_drill.outcome if state.last_drill else None
    if state.overdue or (last is not None and last.result is Result.FAILED):
        return Level.BAD
    if drill is not None and drill.result is Result.FAILED:
        return Level.BAD
    if state.waiting:
        return Level.WARNING
    slow = bool(state.rto_target_ns and state.rto_ns and state.rto_ns > state.rto_target_ns)
    if slow or (last is not None and (last.suspicious or last.result is Result.WARNINGS)):
        return Level.WARNING
    return Level.GOOD

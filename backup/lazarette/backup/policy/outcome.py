"""How a run ended, and how consistent what it made is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Result(Enum):
    """The three ways a run ends."""

    OK = "ok"
    WARNINGS = "warnings"
    """Done; some files were not wholly saved, or something about it is suspicious."""
    FAILED = "failed"


class Consistency(Enum):
    """What a backup is, stated on it and never overstated."""

    APPLICATION = "application"
    """The application was brought into a state it calls consistent."""
    CRASH = "crash"
    """All at one instant, as after a power cut."""
    NONE = "none"
    """Read while it changed."""


class Kind(Enum):
    """What a run does."""

    BACKUP = "backup"
    COPY = "copy"
    DRILL = "drill"
    VERIFY = "verify"
    PRUNE = "prune"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run leaves to say.

    Attributes:
        result: how it ended.
        warnings: one line each.
        error: why it failed.
        snapshot: id of what it made or tested.
        suspicious: made something that does not count as good (case A36).
        consistency: of what it made.
        pause_ns: how long writers were held.
        bytes_read: from the volume.
        bytes_sent: to the repository.
        restore_ns: of a drill: from its beginning to the first good answer.
    """

    result: Result
    warnings: tuple[str, ...] = ()
    error: str = ""
    snapshot: str = ""
    suspicious: bool = False
    consistency: Consistency = Consistency.NONE
    pause_ns: int = 0
    bytes_read: int = 0
    bytes_sent: int = 0
    restore_ns: int = 0

    @property
    def good(self) -> bool:
        """Whether it counts: finished and not suspicious."""
        return self.result is not Result.FAILED and not self.suspicious


def failed(error: str) -> Outcome:
    """A run that made nothing."""
    return Outcome(Result.FAILED, error=error)

"""Which snapshots are kept, each with its reason.

Rules
    R1.  Only *good* snapshots count: finished, and not suspicious.  They alone fill the
         places of a rule.
    R2.  ``last=N`` keeps the N newest; ``hourly``, ``daily``, ``weekly`` (ISO weeks),
         ``monthly`` and ``yearly`` keep the newest of each of the N newest hours, days, …
         that have one, in the policy's zone.  Because the newest of a period is kept and
         not the oldest, pruning after every backup and pruning rarely keep the same, and
         what is kept daily is promoted to weekly, monthly and yearly by itself.
    R3.  ``within=30d`` keeps all of that age; ``tag=…`` keeps all with that tag.
    R4.  The newest ``floor`` good ones are kept whatever the rules say: after a long gap
         age alone would leave one.
    R5.  If the newest snapshot of all is not good, nothing is removed.
    R6.  Bad ones are kept until ``floor`` good ones are newer: somebody may want to look.
    R7.  A snapshot from the future (a clock was wrong) is kept and does not count.
    R8.  A rule that would remove everything is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from zoneinfo import ZoneInfo

from lazarette.backup.policy.durations import format_duration, parse_duration
from lazarette.backup.policy.schedule import local
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import InvalidArgument

_FUTURE = 24 * 3600 * NANOSECONDS
_MOST = 100_000


class RemovesEverything(InvalidArgument):
    """The retention rules would remove every snapshot."""

    number = 261


class Restorable(Protocol):
    """What retention must know of a snapshot."""

    @property
    def id(self) -> str:
        """Its name."""
        ...

    @property
    def time_ns(self) -> int:
        """The instant it shows, nanoseconds since the epoch."""
        ...

    @property
    def tags(self) -> Sequence[str]:
        """Its tags."""
        ...

    @property
    def good(self) -> bool:
        """Whether it is complete and not suspicious."""
        ...


@dataclass(frozen=True, slots=True)
class Keep:
    """Retention rules; see the module's text.

    Attributes:
        last: newest ones, and so on.
        within_ns: age up to which all are kept, nanoseconds; 0 for none.
        tags: kept for their tag.
        floor: good ones kept in any case.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within_ns: int = 0
    tags: tuple[str, ...] = ()
    floor: int = 3

    def __str__(self) -> str:
        parts = [f"{name}={getattr(self, name)}" for name in _COUNTS if getattr(self, name)]
        if self.within_ns:
            parts.append(f"within={format_duration(self.within_ns)}")
        parts += [f"tag={tag}" for tag in self.tags]
        return ",".join([*parts, f"floor={self.floor}"])


_COUNTS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def parse_keep(text: str) -> Keep:
    """Read ``hourly=24,daily=7,weekly=4,monthly=12,within=30d,tag=golden,floor=3``.

    Raises:
        InvalidArgument: it cannot be understood.
        RemovesEverything: nothing would ever be kept.
    """
    counts: dict[str, int] = {}
    within = 0
    tags: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, value = (word.strip() for word in part.partition("="))
        if not sign or name in counts:
            raise InvalidArgument(f"not a retention rule: {part!r}")
        if name == "within":
            within = parse_duration(value)
        elif name == "tag":
            tags.append(value)
        elif name in (*_COUNTS, "floor"):
            if not value.isdecimal() or int(value) > _MOST:
                raise InvalidArgument(f"{name} needs a number, not {value!r}")
            counts[name] = int(value)
        else:
            raise InvalidArgument(
                f"no retention rule is called {name!r}",
                hint="there are last, hourly, daily, weekly, monthly, yearly, within, tag, floor",
            )
    keep = Keep(**counts, within_ns=within, tags=tuple(tags))
    if not any(getattr(keep, name) for name in (*_COUNTS, "floor")):
        raise RemovesEverything(
            f"retention {text!r} can remove every snapshot", hint="keep last=1 at least"
        )
    return keep


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a snapshot, and why; ``reasons`` is never empty."""

    snapshot: Restorable
    keep: bool
    reasons: tuple[str, ...]


def plan(
    snapshots: Sequence[Restorable], keep: Keep, now_ns: int, zone: ZoneInfo
) -> list[Decision]:
    """Decide about the snapshots of one volume in one repository, newest first.

    A pure function: a dry run shows exactly what a run does.

    Args:
        snapshots: all there are, in any order.
        keep: the rules.
        now_ns: this moment.
        zone: whose hours, days and weeks count.

    Raises:
        RemovesEverything: nothing would be left (R8).
    """
    ordered = sorted(snapshots, key=lambda each: (each.time_ns, each.id), reverse=True)
    present = [each for each in ordered if each.time_ns <= now_ns + _FUTURE]
    reasons: dict[str, list[str]] = {each.id: [] for each in ordered}
    good = [each for each in present if each.good]
    _keep_good(good, keep, now_ns, zone, reasons)
    _keep_others(ordered, present, good, keep, reasons)
    decisions = [
        Decision(each, bool(reasons[each.id]), tuple(reasons[each.id]) or ("no rule keeps it",))
        for each in ordered
    ]
    if ordered and not any(decision.keep for decision in decisions):
        raise RemovesEverything(
            f"retention {keep} would remove all {len(ordered)} snapshots",
            hint="keep last=1 at least",
        )
    return decisions


def _keep_good(
    good: Sequence[Restorable],
    keep: Keep,
    now_ns: int,
    zone: ZoneInfo,
    reasons: dict[str, list[str]],
) -> None:
    for each in good[: keep.floor]:
        reasons[each.id].append(f"one of the last {keep.floor} good ones")
    for name, period in _PERIODS.items():
        _keep_newest_of_each(good, getattr(keep, name), name, period, zone, reasons)
    for each in good:
        if keep.within_ns and now_ns - each.time_ns <= keep.within_ns:
            reasons[each.id].append(f"within {format_duration(keep.within_ns)}")
        for tag in keep.tags:
            if tag in each.tags:
                reasons[each.id].append(f"tag {tag}")


def _keep_newest_of_each(
    good: Sequence[Restorable],
    places: int,
    name: str,
    period: Callable[[datetime], tuple[int, ...]],
    zone: ZoneInfo,
    reasons: dict[str, list[str]],
) -> None:
    taken: set[tuple[int, ...]] = set()
    for number, each in enumerate(good):
        if len(taken) >= places:
            return
        key = period(local(each.time_ns, zone)) if name != "last" else (number,)
        if key not in taken:
            taken.add(key)
            reasons[each.id].append(f"{name} {len(taken)} of {places}")


def _keep_others(
    ordered: Sequence[Restorable],
    present: Sequence[Restorable],
    good: Sequence[Restorable],
    keep: Keep,
    reasons: dict[str, list[str]],
) -> None:
    if present and not present[0].good:
        for each in present:
            reasons[each.id].append("the newest backup is not good: nothing is removed")
    enough = good[max(keep.floor, 1) - 1].time_ns if len(good) >= max(keep.floor, 1) else None
    known = {each.id for each in present}
    for each in ordered:
        if each.id not in known:
            reasons[each.id].append("from the future: a clock was wrong")
        elif not each.good and (enough is None or each.time_ns >= enough):
            reasons[each.id].append("not good, and too few good ones since")


def _week(here: datetime) -> tuple[int, ...]:
    year, week, _ = here.isocalendar()
    return year, week


_PERIODS: dict[str, Callable[[datetime], tuple[int, ...]]] = {
    "last": lambda here: (),
    # the offset tells the two hours apart that a clock set back makes of one
    "hourly": lambda here: (
        here.year,
        here.month,
        here.day,
        here.hour,
        round((here.utcoffset() or here - here).total_seconds()),
    ),
    "daily": lambda here: (here.year, here.month, here.day),
    "weekly": _week,
    "monthly": lambda here: (here.year, here.month),
    "yearly": lambda here: (here.year,),
}

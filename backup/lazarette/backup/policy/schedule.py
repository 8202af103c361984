"""When a policy is due: pure rules over instants, without any clock of their own.

Two kinds of schedule:

*Every*: ``every 30s``, ``every 15m``.  Due at whole multiples of the period since the epoch,
so that hosts and restarts agree.  Zones do not matter.

*Cron*: five fields with ranges, steps, lists and names, ``@hourly``, ``@daily``,
``@weekly``, ``@monthly`` and ``@yearly``, each in a zone (``TZ=Europe/Berlin 30 2 * * *``).
Day of month and day of week, both restricted, are alternatives (as in cron(8)).

When a zone's clock is set forward or back, cron schedules behave as Vixie cron's do:

D1.  *Spaced* ones (the minute field begins with ``*``, or every hour is due) follow real
     time: ``*/15 * * * *`` runs every 15 real minutes through both changes.
D2.  The others mean a time of day: each due time runs exactly once.  A skipped one runs
     when the gap ends (02:30 at 03:00), a doubled one at its first occurrence.

When somebody sets the host's clock (:func:`next_due`):

S1.  Forward: what was missed is due once.
S2.  Back: a spaced or *every* schedule goes on from the new time, neither stalled nor run
     again; a time of day that has run is not run again.  A correction of more than a day
     makes what ran before it count for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from lazarette.backup.policy.durations import format_duration, parse_duration
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import InvalidArgument

_MINUTE = 60 * NANOSECONDS
_DAY = 86_400 * NANOSECONDS
_QUARTER = timedelta(minutes=15)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_YEARS_AHEAD = 12
_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_SHORTEST_NS = NANOSECONDS


def zone_of(name: str) -> ZoneInfo:
    """The zone of a name such as ``Europe/Berlin``.

    Raises:
        InvalidArgument: there is none.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as unknown:
        raise InvalidArgument(f"no time zone is called {name!r}") from unknown


def instant(moment: datetime) -> int:
    """Nanoseconds since the epoch of an aware datetime."""
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * NANOSECONDS + since.microseconds * 1000


def local(ns: int, zone: ZoneInfo) -> datetime:
    """An instant as a datetime of a zone, cut to microseconds."""
    return (_EPOCH + timedelta(microseconds=ns // 1000)).astimezone(zone)


@dataclass(frozen=True, slots=True)
class Every:
    """Due at each multiple of ``period_ns`` since the epoch."""

    period_ns: int

    @property
    def spaced(self) -> bool:
        """Follows real time (D1, S2)."""
        return True

    def next_after(self, after_ns: int) -> int:
        """The first due instant later than that."""
        return (after_ns // self.period_ns + 1) * self.period_ns

    def __str__(self) -> str:
        return f"every {format_duration(self.period_ns)}"


@dataclass(frozen=True, slots=True)
class Cron:
    """Five parsed fields in a zone; weekdays count from Sunday, 0.

    Attributes:
        text: as written, without the zone.
        spaced: follows real time (D1).
        either_day: day of month and day of week are alternatives.
    """

    text: str
    zone: ZoneInfo
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    spaced: bool
    either_day: bool

    def next_after(self, after_ns: int) -> int:
        """The first due instant later than that.

        Raises:
            InvalidArgument: there is none within twelve years (30 February).
        """
        return self._next_spaced(after_ns) if self.spaced else self._next_timed(after_ns)

    def __str__(self) -> str:
        return f"TZ={self.zone.key} {self.text}"

    def is_due_on(self, day: date) -> bool:
        """Whether the schedule has anything on that date."""
        if day.month not in self.months:
            return False
        by_date = day.day in self.days
        by_week = day.isoweekday() % 7 in self.weekdays
        return by_date or by_week if self.either_day else by_date and by_week

    def _dates(self, first: date) -> Iterator[date]:
        for ahead in range(366 * _YEARS_AHEAD):
            day = first + timedelta(days=ahead)
            if self.is_due_on(day):
                yield day
        raise InvalidArgument(f"schedule {self.text!r} is never due")

    def _next_timed(self, after_ns: int) -> int:
        # a day earlier, because a skipped time of day may be moved past midnight
        first = local(after_ns, self.zone).date() - timedelta(days=1)
        for day in self._dates(first):
            for hour in sorted(self.hours):
                for minute in sorted(self.minutes):
                    naive = datetime(day.year, day.month, day.day, hour, minute)
                    due = first_occurrence(naive, self.zone)
                    if due > after_ns:
                        return due
        raise AssertionError("dates never end without an error")

    def _next_spaced(self, after_ns: int) -> int:
        moment = _EPOCH + timedelta(minutes=after_ns // _MINUTE + 1)
        for day in self._dates(local(after_ns, self.zone).date()):
            begin = datetime(day.year, day.month, day.day, tzinfo=self.zone).astimezone(UTC)
            moment = max(moment, begin)
            while True:
                here = moment.astimezone(self.zone)
                if here.date() > day:
                    break
                if here.date() == day and here.hour in self.hours and here.minute in self.minutes:
                    return instant(moment)
                moment = self._hop(moment, here)
        raise AssertionError("dates never end without an error")

    def _hop(self, moment: datetime, here: datetime) -> datetime:
        """The next minute to look at: the quarters of hours that are not due are skipped."""
        if here.hour in self.hours:
            return moment + timedelta(minutes=1)
        return moment - (moment - _EPOCH) % _QUARTER + _QUARTER


Schedule = Every | Cron


def first_occurrence(naive: datetime, zone: ZoneInfo) -> int:
    """The instant of a local time; of a skipped one, the end of the gap (D2)."""
    first = instant(naive.replace(tzinfo=zone, fold=0))
    if local(first, zone).replace(tzinfo=None) == naive:
        return first
    early, late = first - _DAY, first
    offset = local(early, zone).utcoffset()
    while late - early > NANOSECONDS:
        middle = (early + late) // 2 // NANOSECONDS * NANOSECONDS
        if local(middle, zone).utcoffset() == offset:
            early = middle
        else:
            late = middle
    return late


def parse_schedule(text: str, zone: str = "UTC") -> Schedule:
    """Read a schedule.

    Args:
        text: as in the module's text.
        zone: of a cron schedule that names none.

    Raises:
        InvalidArgument: it cannot be understood, or is never due.
    """
    words = text.split()
    if words and words[0].lower() == "every":
        return _parse_every("".join(words[1:]), text)
    if words and words[0].upper().startswith(("TZ=", "CRON_TZ=")):
        zone = words[0].split("=", 1)[1]
        words = words[1:]
    plain = " ".join(words).lower()
    fields = _MACROS.get(plain, plain).split()
    if len(fields) != 5:
        raise InvalidArgument(
            f"not a schedule: {text!r}",
            hint="write 'every 15m', '@daily' or five cron fields such as '30 2 * * *'",
        )
    cron = _parse_cron(plain, fields, zone_of(zone))
    next(cron._dates(date(2024, 1, 1)))
    return cron


def _parse_every(period: str, text: str) -> Every:
    if period in ("minute", "hour", "day", "week"):
        period = "1" + period[0]
    period_ns = parse_duration(period)
    if period_ns < _SHORTEST_NS:
        raise InvalidArgument(f"too often: {text!r}", hint="at most once a second")
    return Every(period_ns)


def _parse_cron(text: str, fields: list[str], zone: ZoneInfo) -> Cron:
    minutes = _field(fields[0], 0, 59, ())
    hours = _field(fields[1], 0, 23, ())
    weekdays = frozenset(day % 7 for day in _field(fields[4], 0, 7, _WEEKDAYS))
    return Cron(
        text=text,
        zone=zone,
        minutes=minutes,
        hours=hours,
        days=_field(fields[2], 1, 31, ()),
        months=_field(fields[3], 1, 12, _MONTHS),
        weekdays=weekdays,
        spaced=fields[0].startswith("*") or len(hours) == 24,
        either_day=not fields[2].startswith("*") and not fields[4].startswith("*"),
    )


_ITEM = re.compile(r"(\*|\w+)(?:-(\w+))?(?:/(\d+))?")


def _field(text: str, low: int, high: int, names: tuple[str, ...]) -> frozenset[int]:
    found: set[int] = set()
    for item in text.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise InvalidArgument(f"not a cron field: {text!r}")
        begin, end, step = match.groups()
        if begin == "*":
            first, last = low, high
        else:
            first = _number(begin, low, high, names)
            last = _number(end, low, high, names) if end else (high if step else first)
        if (begin == "*" and end) or last < first or (step is not None and int(step) == 0):
            raise InvalidArgument(f"not a cron field: {text!r}")
        found.update(range(first, last + 1, int(step or 1)))
    return frozenset(found)


def _number(text: str, low: int, high: int, names: tuple[str, ...]) -> int:
    if text[:3] in names and text.isalpha():
        return names.index(text[:3]) + (1 if low == 1 else 0)
    if not text.isdecimal() or not low <= int(text) <= high:
        raise InvalidArgument(f"{text!r} is not between {low} and {high}")
    return int(text)


def next_due(schedule: Schedule, previous_ns: int | None, now_ns: int) -> int:
    """The next due instant of a schedule that ran for ``previous_ns`` (S1, S2).

    What was missed between ``previous_ns`` and now is due at once, and only once; that is
    decided by :func:`missed`.  This gives the one after now.
    """
    after = now_ns
    if previous_ns is not None and not schedule.spaced and now_ns < previous_ns <= now_ns + _DAY:
        after = previous_ns
    return schedule.next_after(after)


def missed(schedule: Schedule, previous_ns: int | None, now_ns: int) -> bool:
    """Whether something became due after ``previous_ns`` and until now (S1)."""
    return (
        previous_ns is not None
        and previous_ns < now_ns
        and (schedule.next_after(previous_ns) <= now_ns)
    )

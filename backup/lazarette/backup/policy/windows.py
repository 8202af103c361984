"""Times of day and week in which something is allowed or limited."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from lazarette.backup.policy.durations import parse_size
from lazarette.backup.policy.schedule import Schedule, first_occurrence, local
from lazarette.storage.errors import InvalidArgument

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_SPAN = re.compile(r"(?:([a-z,-]+)\s+)?(\d{1,2}):(\d\d)-(\d{1,2}):(\d\d)")
_MINUTES_A_DAY = 24 * 60
_LOOKS = 600


@dataclass(frozen=True, slots=True)
class Window:
    """A span of the local day, on some days of the week; it may pass midnight.

    Attributes:
        begin: minute of the day it begins in.
        end: first minute after it.
        days: of its beginning; Monday is 0.
    """

    begin: int
    end: int
    days: frozenset[int] = frozenset(range(7))

    def holds(self, ns: int, zone: ZoneInfo) -> bool:
        """Whether the instant lies within."""
        here = local(ns, zone)
        minute, day = here.hour * 60 + here.minute, here.weekday()
        if self.begin < self.end:
            return day in self.days and self.begin <= minute < self.end
        if minute >= self.begin:
            return day in self.days
        return minute < self.end and (day - 1) % 7 in self.days

    def next_begin(self, after_ns: int, zone: ZoneInfo) -> int:
        """When it next begins after an instant."""
        today = local(after_ns, zone).date()
        for ahead in range(-1, 9):
            day = today + timedelta(days=ahead)
            if day.weekday() in self.days:
                hour, minute = divmod(self.begin, 60)
                begin = first_occurrence(datetime(day.year, day.month, day.day, hour, minute), zone)
                if begin > after_ns:
                    return begin
        raise AssertionError("a window begins every week")

    def __str__(self) -> str:
        end = self.end or _MINUTES_A_DAY  # 00:00-00:00 would not read back
        span = f"{self.begin // 60:02}:{self.begin % 60:02}-{end // 60:02}:{end % 60:02}"
        if len(self.days) == 7:
            return span
        return ",".join(_DAYS[day] for day in sorted(self.days)) + " " + span


def parse_window(text: str) -> Window:
    """Read ``22:00-06:00`` or ``mon-fri 22:00-06:00``.

    Raises:
        InvalidArgument: it cannot be understood.
    """
    found = _SPAN.fullmatch(" ".join(text.lower().split()))
    if found is None:
        raise InvalidArgument(f"not a window: {text!r}", hint="write 'mon-fri 22:00-06:00'")
    begin = int(found.group(2)) * 60 + int(found.group(3))
    end = int(found.group(4)) * 60 + int(found.group(5))
    if not (begin < _MINUTES_A_DAY and end <= _MINUTES_A_DAY and begin != end):
        raise InvalidArgument(f"not a window: {text!r}")
    days = _days(found.group(1)) if found.group(1) else frozenset(range(7))
    return Window(begin, end % _MINUTES_A_DAY, days)


def _days(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        names = (first[:3], (last or first)[:3])
        if not all(name in _DAYS for name in names):
            raise InvalidArgument(f"not days of the week: {text!r}")
        begin, end = (_DAYS.index(name) for name in names)
        found.update((begin + ahead) % 7 for ahead in range((end - begin) % 7 + 1))
    return frozenset(found)


def is_open(windows: Sequence[Window], ns: int, zone: ZoneInfo) -> bool:
    """Whether an instant lies within one of them; without any, always."""
    return not windows or any(window.holds(ns, zone) for window in windows)


def next_open(schedule: Schedule, windows: Sequence[Window], after_ns: int, zone: ZoneInfo) -> int:
    """The first due instant after that which lies within a window.

    Raises:
        InvalidArgument: there is none.
    """
    due = schedule.next_after(after_ns)
    for _ in range(_LOOKS):
        if is_open(windows, due, zone):
            return due
        begin = min(window.next_begin(due, zone) for window in windows)
        due = schedule.next_after(max(due, begin - 1))
    raise InvalidArgument(f"{schedule} is never due within its windows")


@dataclass(frozen=True, slots=True)
class RateRule:
    """Bytes a second within a window, or at all other times; None is no limit."""

    bytes_per_second: int | None
    window: Window | None = None

    def __str__(self) -> str:
        rate = "off" if self.bytes_per_second is None else str(self.bytes_per_second)
        return rate if self.window is None else f"{rate}@{self.window}"


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Bandwidth by time of day; the first rule that fits counts."""

    rules: tuple[RateRule, ...] = ()

    def at(self, ns: int, zone: ZoneInfo) -> int | None:
        """Bytes a second at an instant; None is no limit."""
        for rule in self.rules:
            if rule.window is None or rule.window.holds(ns, zone):
                return rule.bytes_per_second
        return None

    def __str__(self) -> str:
        return "; ".join(map(str, self.rules))


NO_LIMIT = RateLimit()


def parse_rate(text: str) -> RateLimit:
    """Read ``10M`` or ``2M@mon-fri 08:00-18:00; 20M``; ``off`` is no limit.

    Raises:
        InvalidArgument: it cannot be understood.
    """
    rules = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        size, at, window = part.partition("@")
        limit = None if size.strip() in ("off", "none") else parse_size(size)
        rules.append(RateRule(limit, parse_window(window) if at else None))
    return RateLimit(tuple(sorted(rules, key=lambda rule: rule.window is None)))

from __future__ import annotations

import zoneinfo
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazarette.backup.policy.schedule import (
    Cron,
    Every,
    instant,
    local,
    missed,
    next_due,
    parse_schedule,
)
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import InvalidArgument

NEW_YORK = "America/New_York"
ZONES = [
    "UTC",
    NEW_YORK,
    "Europe/Berlin",
    "Australia/Lord_Howe",  # half an hour of summer time
    "America/Sao_Paulo",  # changed at midnight
    "Asia/Kathmandu",  # 5:45
    "Africa/Casablanca",  # summer time pauses for Ramadan
    "Pacific/Apia",  # skipped 30 December 2011
    "America/St_Johns",
    "Asia/Gaza",
]
MINUTE = 60 * NANOSECONDS
HOUR = 60 * MINUTE


def at(zone: str, *parts: int, fold: int = 0) -> int:
    return instant(datetime(*parts, tzinfo=ZoneInfo(zone), fold=fold))  # type: ignore[misc,arg-type]


def runs(text: str, zone: str, start: int, end: int) -> list[str]:
    schedule = parse_schedule(text, zone)
    found = []
    now = start
    while (now := schedule.next_after(now)) < end:
        found.append(local(now, ZoneInfo(zone)).isoformat(timespec="minutes"))
    return found


def test_a_skipped_time_of_day_runs_when_the_gap_ends() -> None:
    found = runs("30 2 * * *", NEW_YORK, at(NEW_YORK, 2026, 3, 7), at(NEW_YORK, 2026, 3, 10))
    assert found == ["2026-03-07T02:30-05:00", "2026-03-08T03:00-04:00", "2026-03-09T02:30-04:00"]


def test_a_doubled_time_of_day_runs_once() -> None:
    found = runs("30 1 * * *", NEW_YORK, at(NEW_YORK, 2026, 10, 31), at(NEW_YORK, 2026, 11, 3))
    assert found == ["2026-10-31T01:30-04:00", "2026-11-01T01:30-04:00", "2026-11-02T01:30-05:00"]


@pytest.mark.parametrize("day", [(2026, 3, 8), (2026, 11, 1)])
def test_spaced_schedules_follow_real_time(day: tuple[int, int, int]) -> None:
    schedule = parse_schedule("*/15 * * * *", NEW_YORK)
    now = at(NEW_YORK, *day) - 1
    for _ in range(25 * 4):
        following = schedule.next_after(now)
        assert following - now in (15 * MINUTE, 1)
        now = following


def test_half_hour_changes() -> None:
    zone = "Australia/Lord_Howe"  # 4 October 2026, 02:00 becomes 02:30
    found = runs("15 2 * * *", zone, at(zone, 2026, 10, 3), at(zone, 2026, 10, 5))
    assert found == ["2026-10-03T02:15+10:30", "2026-10-04T02:30+11:00"]


def test_a_day_that_never_was() -> None:
    zone = "Pacific/Apia"  # went from 29 to 31 December 2011
    found = runs("0 12 * * *", zone, at(zone, 2011, 12, 29), at(zone, 2012, 1, 1))
    assert found == [
        "2011-12-29T12:00-10:00",
        "2011-12-31T00:00+14:00",
        "2011-12-31T12:00+14:00",
    ]


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("@daily", "2026-01-02T00:00"),
        ("@hourly", "2026-01-01T11:00"),
        ("@weekly", "2026-01-04T00:00"),
        ("@monthly", "2026-02-01T00:00"),
        ("@yearly", "2027-01-01T00:00"),
        ("every 15m", "2026-01-01T10:15"),
        ("every 1h 30m", "2026-01-01T10:30"),
        ("every hour", "2026-01-01T11:00"),
        ("0 0 29 2 *", "2028-02-29T00:00"),
        ("0 9-17/4 * * mon-fri", "2026-01-01T13:00"),
        ("0 0 13 * fri", "2026-01-02T00:00"),
        ("5,50 10 * jan,Feb *", "2026-01-01T10:05"),
        ("0 0 * * 7", "2026-01-04T00:00"),
        ("TZ=Asia/Tokyo 0 0 * * *", "2026-01-01T15:00"),
        ("CRON_TZ=Asia/Tokyo @daily", "2026-01-01T15:00"),
        ("10/20 * * * *", "2026-01-01T10:10"),
    ],
)
def test_next(text: str, due: str) -> None:
    schedule = parse_schedule(text)
    found = schedule.next_after(instant(datetime(2026, 1, 1, 10, 0, 30, tzinfo=UTC)))
    assert local(found, ZoneInfo("UTC")).strftime("%Y-%m-%dT%H:%M") == due


@pytest.mark.parametrize(
    "text",
    [
        "",
        "every",
        "every 0s",
        "every 5x",
        "* * * *",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * * 13 *",
        "* * * * 8",
        "5-1 * * * *",
        "*/0 * * * *",
        "*-5 * * * *",
        "a * * * *",
        "@sometimes",
        "0 0 30 2 *",
        "TZ=Mars/Olympus @daily",
        "TZ=../../etc/passwd @daily",
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_schedule(text)


def test_setting_the_clock_back_neither_repeats_nor_stalls() -> None:
    daily = parse_schedule("30 2 * * *", NEW_YORK)
    ran = at(NEW_YORK, 2026, 6, 1, 2, 30)
    assert next_due(daily, ran, ran - 2 * HOUR + MINUTE) == at(NEW_YORK, 2026, 6, 2, 2, 30)
    for text in ("*/15 * * * *", "every 15m"):
        spaced = parse_schedule(text, NEW_YORK)
        back = ran - 2 * HOUR + MINUTE
        assert 0 < next_due(spaced, ran, back) - back <= 15 * MINUTE
    gross = ran - 72 * HOUR
    assert next_due(daily, ran, gross) - gross <= 24 * HOUR


def test_missed_runs_are_noticed_once() -> None:
    daily = parse_schedule("30 2 * * *", NEW_YORK)
    ran = at(NEW_YORK, 2026, 6, 1, 2, 30)
    assert not missed(daily, ran, ran + HOUR)
    assert missed(daily, ran, ran + 300 * HOUR)
    assert not missed(daily, ran + 300 * HOUR, ran + 301 * HOUR)
    assert not missed(daily, None, ran)
    assert not missed(daily, ran, ran - HOUR)


instants = st.integers(
    instant(datetime(1975, 1, 1, tzinfo=UTC)), instant(datetime(2037, 1, 1, tzinfo=UTC))
)


@settings(max_examples=150)
@given(st.sampled_from(ZONES), instants, st.integers(0, 23), st.integers(0, 59))
def test_each_date_has_its_time_of_day_once(zone: str, start: int, hour: int, minute: int) -> None:
    """Over any zone and years: one run a calendar date, in order, at the time or a gap's end."""
    schedule = parse_schedule(f"{minute} {hour} * * *", zone)
    now = start
    previous = None
    for _ in range(12):
        now = schedule.next_after(now)
        here = local(now, ZoneInfo(zone))
        if (here.hour, here.minute) != (hour, minute):
            before = local(now - NANOSECONDS, ZoneInfo(zone))
            assert before.utcoffset() != here.utcoffset()
        if previous is not None:
            assert now > previous
            if here.hour == hour:
                assert now - previous <= 49 * HOUR
        previous = now


@settings(max_examples=100)
@given(st.sampled_from(ZONES), instants, st.sampled_from([1, 5, 15, 30]))
def test_spaced_schedules_have_no_holes(zone: str, start: int, minutes: int) -> None:
    schedule = parse_schedule(f"*/{minutes} * * * *", zone)
    now = schedule.next_after(start)
    assert now - start <= (minutes + 30) * MINUTE
    for _ in range(30):
        following = schedule.next_after(now)
        # a change by less than the spacing's multiple shifts the grid, once
        assert 0 < following - now <= (minutes + 30) * MINUTE
        now = following


@settings(max_examples=60)
@given(
    st.sampled_from(ZONES),
    instants,
    st.sets(st.integers(0, 59), min_size=1, max_size=3),
    st.sets(st.integers(0, 23), min_size=1, max_size=3),
    st.sets(st.integers(1, 28), min_size=1, max_size=5),
)
def test_against_looking_at_every_minute(
    zone: str, start: int, minutes: set[int], hours: set[int], days: set[int]
) -> None:
    """Where no clock change is near, next_after is the first minute whose fields match."""
    text = " ".join(",".join(map(str, sorted(each))) for each in (minutes, hours, days)) + " * *"
    schedule = parse_schedule(text, zone)
    assert isinstance(schedule, Cron)
    found = schedule.next_after(start)
    here = local(found, ZoneInfo(zone))
    offsets = {
        local(moment, ZoneInfo(zone)).utcoffset()
        for moment in range(start, found + 25 * HOUR, 12 * HOUR)
    }
    if len(offsets) > 1:
        return
    assert here.minute in minutes
    assert here.hour in hours
    assert here.day in days
    probe = local(start, ZoneInfo(zone)).replace(second=0, microsecond=0, tzinfo=None)
    probe += timedelta(minutes=1)
    end = here.replace(tzinfo=None)
    while probe < end:
        if probe.day not in days:
            probe = probe.replace(hour=0, minute=0) + timedelta(days=1)
        elif probe.hour not in hours:
            probe = probe.replace(minute=0) + timedelta(hours=1)
        else:
            assert probe.minute not in minutes
            probe += timedelta(minutes=1)


@given(st.integers(1, 10**6), instants)
def test_every(seconds: int, start: int) -> None:
    schedule = Every(seconds * NANOSECONDS)
    due = schedule.next_after(start)
    assert 0 < due - start <= seconds * NANOSECONDS
    assert schedule.next_after(due) - due == seconds * NANOSECONDS
    assert parse_schedule(str(schedule)) == schedule


def test_all_zones_are_there() -> None:
    assert set(ZONES) <= zoneinfo.available_timezones()

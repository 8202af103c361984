from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarette.backup.jobs.run import rate_of
from lazarette.backup.policy.schedule import instant, local, parse_schedule
from lazarette.backup.policy.windows import is_open, next_open, parse_rate, parse_window
from lazarette.storage.clock import NANOSECONDS, FakeClock
from lazarette.storage.errors import InvalidArgument

BERLIN = ZoneInfo("Europe/Berlin")


def at(*parts: int) -> int:
    return instant(datetime(*parts, tzinfo=BERLIN))  # type: ignore[arg-type,misc]


def test_a_night_passes_midnight() -> None:
    night = parse_window("mon-fri 22:00-06:00")
    friday, saturday, sunday = (2026, 1, 2), (2026, 1, 3), (2026, 1, 4)
    assert night.holds(at(*friday, 22, 0), BERLIN)
    assert night.holds(at(*saturday, 5, 59), BERLIN)
    assert not night.holds(at(*saturday, 6, 0), BERLIN)
    assert not night.holds(at(*saturday, 23, 0), BERLIN)
    assert not night.holds(at(*sunday, 3, 0), BERLIN)
    assert night.holds(at(2026, 1, 6, 3, 0), BERLIN)
    assert not night.holds(at(2026, 1, 5, 3, 0), BERLIN)
    assert parse_window(str(night)) == night
    assert str(parse_window("8:00-24:00")) == "08:00-24:00"
    whole = parse_window("00:00-24:00")
    assert parse_window(str(whole)) == whole


@pytest.mark.parametrize("text", ["", "8-9", "25:00-26:00", "08:00-08:00", "xyz 08:00-09:00"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_window(text)


def test_runs_wait_for_a_window() -> None:
    windows = [parse_window("22:00-06:00"), parse_window("12:00-12:30")]
    every = parse_schedule("every 10s")
    assert next_open(every, windows, at(2026, 1, 2, 5, 59, 50), BERLIN) == at(2026, 1, 2, 12, 0)
    assert next_open(every, windows, at(2026, 1, 2, 12, 0, 0), BERLIN) == at(2026, 1, 2, 12, 0, 10)
    with pytest.raises(InvalidArgument):
        next_open(parse_schedule("0 9 * * *", "Europe/Berlin"), windows, 0, BERLIN)


@given(
    st.integers(at(2020, 1, 1), at(2030, 1, 1)), st.sampled_from(["22:00-06:00", "sat 9:00-9:05"])
)
def test_the_next_run_is_in_a_window_and_none_is_left_out(start: int, text: str) -> None:
    windows = [parse_window(text)]
    every = parse_schedule("every 1m")
    due = next_open(every, windows, start, BERLIN)
    assert is_open(windows, due, BERLIN)
    before = every.next_after(start)
    for step in range(0, max((due - before) // (60 * NANOSECONDS), 0), 7):
        assert not is_open(windows, before + step * 60 * NANOSECONDS, BERLIN)
    assert local(due, BERLIN).second == 0


def test_rates_by_time_of_day() -> None:
    rate = parse_rate("20M; 2M@mon-fri 08:00-18:00; off@00:00-06:00")
    assert rate.at(at(2026, 1, 2, 9, 0), BERLIN) == 2 << 20
    assert rate.at(at(2026, 1, 2, 19, 0), BERLIN) == 20 << 20
    assert rate.at(at(2026, 1, 2, 3, 0), BERLIN) is None
    assert parse_rate("").at(at(2026, 1, 2, 9, 0), BERLIN) is None
    for wrong in ("x", "2M@noon"):
        with pytest.raises(InvalidArgument):
            parse_rate(wrong)


def test_a_limit_reads_back_and_changes_while_a_job_goes_on() -> None:
    text = "off@sat,sun 00:00-24:00; 2M@mon-fri 08:00-18:00; 20M"
    limit = parse_rate(text)
    assert parse_rate(str(limit)) == limit
    assert str(parse_rate("")) == ""
    friday = datetime(2026, 11, 27, 17, 59, 30, tzinfo=BERLIN)
    clock = FakeClock(instant(friday))
    rate = rate_of(str(limit), "Europe/Berlin", clock)
    assert rate() == 2 << 20
    clock.advance(60)
    assert rate() == 20 << 20
    clock.advance(7 * 3600)
    assert rate() is None
    assert rate_of("", "UTC", clock)() is None

"""Schedules as the scheduler sees them: simulated days of wake-ups, with clocks set by hand."""

from __future__ import annotations

import pickle
from datetime import datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazarette.backup.policy.schedule import instant, local
from lazarette.backup.policy.scheduler import PolicyTrigger
from lazarette.storage.clock import NANOSECONDS

NEW_YORK = ZoneInfo("America/New_York")
HOUR = 3600 * NANOSECONDS


def at(*parts: int) -> int:
    return instant(datetime(*parts, tzinfo=NEW_YORK))  # type: ignore[arg-type,misc]


def trigger(
    schedule: str, *, jitter: int = 0, windows: tuple[str, ...] = (), name: str = "p"
) -> PolicyTrigger:
    return PolicyTrigger(name, schedule, NEW_YORK.key, windows, jitter * NANOSECONDS)


def simulate(each: PolicyTrigger, start: int, end: int, steps: dict[int, int]) -> list[int]:
    """Real times of runs; ``steps`` sets the wall clock by so much at a real time."""
    real, offset, previous = start, 0, None
    due = each.next_ns(None, start)
    pending = sorted(steps)
    found = []
    while real < end:
        wake = due - offset
        if pending and pending[0] <= wake:
            real = pending.pop(0)
            offset += steps[real]
            now = real + offset
            if due > now or steps[real] < 0:
                due = each.next_ns(previous, now)
            continue
        real = max(wake, real)
        previous = real + offset
        found.append(real)
        due = each.next_ns(previous, previous)
    return found[:-1] if found and found[-1] >= end else found


def test_a_clock_stepped_back_two_hours() -> None:
    """A12: neither run again nor stalled."""
    start = at(2026, 6, 1)
    step = {start + 3 * HOUR + HOUR // 7: -2 * HOUR}
    daily = simulate(trigger("30 2 * * *"), start, start + 48 * HOUR, step)
    # by the wall clock at 02:30 of the second day: two hours later in real time
    assert daily == [at(2026, 6, 1, 2, 30), at(2026, 6, 2, 2, 30) + 2 * HOUR]
    for text in ("*/15 * * * *", "every 15m"):
        spaced = simulate(trigger(text), start, start + 12 * HOUR, step)
        gaps = {after - before for before, after in pairwise(spaced)}
        assert gaps == {HOUR // 4}


def test_a_clock_stepped_forward_runs_what_was_missed_once() -> None:
    start = at(2026, 6, 1)
    step = {start + HOUR: 48 * HOUR}
    daily = simulate(trigger("30 2 * * *"), start, start + 24 * HOUR, step)
    assert daily == [start + HOUR, at(2026, 6, 1, 2, 30)]


@pytest.mark.parametrize("day", [(2026, 3, 8), (2026, 11, 1)])
def test_the_days_of_the_change(day: tuple[int, int, int]) -> None:
    start, end = at(*day) - 24 * HOUR, at(day[0], day[1], day[2] + 2)
    for text in ("30 2 * * *", "30 1 * * *"):
        runs = simulate(trigger(text), start, end, {})
        dates = [local(run, NEW_YORK).date() for run in runs]
        assert len(dates) == len(set(dates)) == 3
    spaced = simulate(trigger("*/15 * * * *"), start, start + 72 * HOUR, {})
    assert {after - before for before, after in pairwise(spaced)} == {HOUR // 4}


def test_the_next_run_is_shown_with_offset_and_zone() -> None:
    due = trigger("30 2 * * *").get_next_fire_time(None, local(at(2026, 3, 8), NEW_YORK))
    assert due.isoformat() == "2026-03-08T03:00:00-04:00"
    assert str(due.tzinfo) == "America/New_York"


def test_triggers_are_stored_as_text() -> None:
    made = trigger("every 15m", jitter=60, windows=("mon-fri 22:00-06:00",))
    assert pickle.loads(pickle.dumps(made)) == made
    assert made != trigger("every 15m", jitter=60)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["*/15 * * * *", "every 10m", "30 2 * * *", "0 * * * *"]),
    st.integers(0, 200),
    st.integers(at(2020, 1, 1), at(2035, 1, 1)),
    st.text("ab", min_size=1, max_size=3),
)
def test_jitter_loses_no_run(schedule: str, jitter: int, start: int, name: str) -> None:
    plain, late = trigger(schedule), trigger(schedule, jitter=jitter, name=name)
    end = start + 30 * HOUR
    due = simulate(plain, start, end, {})
    began = simulate(late, start, end, {})
    for run in due[:-1]:
        assert sum(run <= each <= run + jitter * NANOSECONDS for each in began) == 1
    assert len(began) <= len(due) + 1


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["*/15 * * * *", "every 15m"]),
    st.integers(at(2020, 1, 1), at(2035, 1, 1)),
    st.lists(st.tuples(st.integers(1, 20), st.integers(-300, 300)), max_size=4),
)
def test_whatever_is_done_to_the_clock_spaced_runs_go_on(
    schedule: str, start: int, steps: list[tuple[int, int]]
) -> None:
    # a second past the hour: not in the very nanosecond in which a run is due
    when = {
        start + hours * HOUR + NANOSECONDS: minutes * 60 * NANOSECONDS
        for hours, minutes in steps
        if minutes
    }
    runs = simulate(trigger(schedule), start, start + 24 * HOUR, when)
    times = [start, *runs, start + 24 * HOUR]
    # setting the clock moves the grid of due times: one gap may be longer, by less than one run
    assert max(after - before for before, after in pairwise(times)) < HOUR // 2
    assert len(runs) <= 24 * 4 + 2 * len(when) + 1

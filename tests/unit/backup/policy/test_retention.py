from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazarette.backup.policy.retention import (
    Decision,
    Keep,
    RemovesEverything,
    parse_keep,
    plan,
)
from lazarette.backup.policy.schedule import instant, local
from lazarette.storage.clock import NANOSECONDS
from lazarette.storage.errors import InvalidArgument

BERLIN = ZoneInfo("Europe/Berlin")
DAY = 86_400 * NANOSECONDS
START = instant(datetime(2025, 1, 1, 12, tzinfo=UTC))


@dataclass(frozen=True)
class Snapshot:
    id: str
    time_ns: int
    good: bool = True
    tags: tuple[str, ...] = ()


def day(number: int, **more: object) -> Snapshot:
    return Snapshot(f"{number:04}", START + number * DAY, **more)  # type: ignore[arg-type]


def kept(decisions: list[Decision]) -> list[str]:
    return sorted(decision.snapshot.id for decision in decisions if decision.keep)


def test_a_floor_survives_a_gap() -> None:
    """A13: "3 days"; backups on days 1, 2, 3; the host is off; the next is on day 21."""
    keep = parse_keep("within=3d")
    snapshots = [day(number) for number in (1, 2, 3, 21)]
    assert kept(plan(snapshots, keep, START + 21 * DAY, BERLIN)) == ["0002", "0003", "0021"]


def test_a_bad_newest_backup_removes_nothing() -> None:
    keep = parse_keep("within=3d")
    snapshots = [day(1), day(2), day(3), day(4), day(21, good=False)]
    decisions = plan(snapshots, keep, START + 21 * DAY, BERLIN)
    assert len(kept(decisions)) == 5
    assert "nothing is removed" in decisions[1].reasons[-1]


def test_bad_backups_fill_no_places() -> None:
    keep = parse_keep("last=3,floor=1")
    snapshots = [day(number, good=number % 2 == 0) for number in range(11)]
    assert kept(plan(snapshots, keep, START + 11 * DAY, BERLIN)) == ["0006", "0008", "0010"]
    assert kept(plan(snapshots[:-1], keep, START + 11 * DAY, BERLIN)) == [
        each.id for each in snapshots[:-1]
    ]


def test_grandfathers_are_promoted() -> None:
    """A14: 400 daily backups, pruned after each."""
    keep = parse_keep("daily=7,weekly=4,monthly=12,yearly=3,floor=1")
    there: list[Snapshot] = []
    for number in range(400):
        now = START + number * DAY
        there.append(day(number))
        decisions = plan(there, keep, now, BERLIN)
        assert all(decision.reasons for decision in decisions)
        there = [each for each in there if each.id in kept(decisions)]
        assert kept(plan(there, keep, now, BERLIN)) == sorted(each.id for each in there)
    dates = [local(each.time_ns, BERLIN).date() for each in there]
    today = local(START + 399 * DAY, BERLIN).date()
    assert {today - timedelta(days=back) for back in range(7)} <= set(dates)
    weeks = {date.isocalendar()[:2] for date in dates}
    assert {(today - timedelta(weeks=back)).isocalendar()[:2] for back in range(4)} <= weeks
    months = {(date.year, date.month) for date in dates}
    assert len(months) == 12
    assert {date.year for date in dates} == {2025, 2026}
    assert (2025, 3) in months
    assert len(there) <= 7 + 4 + 12 + 3


def test_pruning_rarely_keeps_the_same_as_pruning_always() -> None:
    keep = parse_keep("daily=7,weekly=4,monthly=12,yearly=3,floor=1")
    always: list[Snapshot] = []
    for number in range(400):
        always.append(day(number))
        names = kept(plan(always, keep, START + number * DAY, BERLIN))
        always = [each for each in always if each.id in names]
    once = kept(plan([day(number) for number in range(400)], keep, START + 399 * DAY, BERLIN))
    assert once == [each.id for each in always]


def test_tags_and_the_future() -> None:
    keep = parse_keep("last=1,tag=golden,floor=0")
    snapshots = [day(1, tags=("golden",)), day(2), day(3), day(400)]
    decisions = plan(snapshots, keep, START + 3 * DAY, BERLIN)
    assert kept(decisions) == ["0001", "0003", "0400"]
    assert decisions[0].reasons == ("from the future: a clock was wrong",)
    assert decisions[-1].reasons == ("tag golden",)
    assert decisions[2].reasons == ("no rule keeps it",)


def test_both_hours_of_a_clock_set_back_count() -> None:
    keep = parse_keep("hourly=2,floor=0")
    first = instant(datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN))
    snapshots = [Snapshot("a", first), Snapshot("b", first + 3600 * NANOSECONDS)]
    assert kept(plan(snapshots, keep, first + DAY, BERLIN)) == ["a", "b"]


@pytest.mark.parametrize(
    "text", ["", "floor=0", "tag=x,floor=0", "within=3d,floor=0", "last=0,floor=0"]
)
def test_what_can_remove_everything_is_refused(text: str) -> None:
    if text == "":
        assert parse_keep(text) == Keep()
        return
    with pytest.raises(RemovesEverything):
        parse_keep(text)


def test_a_plan_that_removes_everything_is_refused() -> None:
    with pytest.raises(RemovesEverything):
        plan([day(1)], Keep(tags=("x",), floor=0), START + 2 * DAY, BERLIN)
    assert plan([], Keep(), START, BERLIN) == []


@pytest.mark.parametrize(
    "text", ["x", "daily", "daily=x", "daily=-1", "sometimes=3", "daily=1,daily=2"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_keep(text)


def test_rules_are_written_back() -> None:
    text = "last=1,hourly=24,daily=7,weekly=4,monthly=12,yearly=3,within=30d,tag=a,tag=b,floor=2"
    assert str(parse_keep(text)) == text


snapshots = st.lists(
    st.builds(
        Snapshot,
        st.uuids().map(str),
        st.integers(START, START + 900 * DAY),
        st.booleans(),
        st.sampled_from([(), ("golden",)]),
    ),
    max_size=40,
    unique_by=lambda each: each.id,
)
rules = st.builds(
    Keep,
    last=st.integers(0, 5),
    hourly=st.integers(0, 5),
    daily=st.integers(0, 7),
    weekly=st.integers(0, 4),
    monthly=st.integers(0, 12),
    yearly=st.integers(0, 3),
    within_ns=st.integers(0, 30).map(lambda days: days * DAY),
    tags=st.sampled_from([(), ("golden",)]),
    floor=st.integers(1, 4),
)


@settings(max_examples=150)
@given(snapshots, rules, st.sampled_from(["UTC", "America/New_York", "Pacific/Apia"]))
def test_laws(there: list[Snapshot], keep: Keep, zone: str) -> None:
    now = START + 900 * DAY
    decisions = plan(there, keep, now, ZoneInfo(zone))
    names = kept(decisions)
    assert len(decisions) == len(there)
    good = sorted((each for each in there if each.good), key=lambda each: -each.time_ns)
    assert len(set(names) & {each.id for each in good}) >= min(keep.floor, len(good))
    # a second run changes nothing
    left = [each for each in there if each.id in names]
    if left:
        assert kept(plan(left, keep, now, ZoneInfo(zone))) == names
    # bad ones never decide about good ones, except that a bad newest one saves all
    newest = max(there, key=lambda each: (each.time_ns, each.id), default=None)
    if newest is not None and newest.good:
        only_good = kept(plan(good, keep, now, ZoneInfo(zone)))
        assert set(names) & {each.id for each in good} == set(only_good)
    elif newest is not None:
        assert len(names) == len(there)


@settings(max_examples=60)
@given(snapshots, rules)
def test_more_places_never_keep_less(there: list[Snapshot], keep: Keep) -> None:
    now = START + 900 * DAY
    more = replace(keep, daily=keep.daily + 1, last=keep.last + 1)
    assert set(kept(plan(there, keep, now, BERLIN))) <= set(kept(plan(there, more, now, BERLIN)))

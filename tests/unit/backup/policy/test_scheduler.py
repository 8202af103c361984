from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import pytest

from lazarette.backup.policy.journal import Journal, Reason
from lazarette.backup.policy.model import Origin, Policy, parse_words
from lazarette.backup.policy.schedule import instant
from lazarette.backup.policy.scheduler import AlreadyRunning, Scheduler
from lazarette.storage.clock import NANOSECONDS, SystemClock
from lazarette.storage.errors import NotFound
from lazarette.storage.state import State


class SetClock(SystemClock):
    """The host's clock, set by hand."""

    def __init__(self) -> None:
        self.by = 0

    def now_ns(self) -> int:
        return super().now_ns() + self.by


def policy(name: str = "p", schedule: str = "every 1s", **words: object) -> Policy:
    return parse_words(name, {"volumes": [name], "schedule": schedule, **words}, Origin.SET)


class Bench:
    """A scheduler on a database of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path / "state.db"
        self.state = State(self.path)
        self.clock = SetClock()
        self.journal = Journal(self.state, self.clock)
        self.runs: list[tuple[str, Reason]] = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def run(self, what: Policy, reason: Reason) -> None:
        self.runs.append((what.name, reason))
        await self.hold.wait()

    def scheduler(self, **more: float) -> Scheduler:
        return Scheduler(self.path, self.run, self.clock, self.journal, **more)  # type: ignore[arg-type]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(autouse=True)
def closing(bench: Bench):  # type: ignore[no-untyped-def]
    yield
    bench.state.close()


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (whatever a test waits for)
            await asyncio.sleep(0.02)


async def test_runs_when_due(bench: Bench) -> None:
    scheduler = bench.scheduler()
    scheduler.start([policy(), policy("q", "@yearly")])
    await until(lambda: len(bench.runs) >= 2)
    assert bench.runs[:2] == [("p", Reason.SCHEDULE)] * 2
    assert scheduler.next_run("q").tzname() == "UTC"
    with pytest.raises(NotFound):
        scheduler.next_run("x")
    await scheduler.stop()


async def test_a_late_run_is_skipped_and_counted(bench: Bench) -> None:
    bench.hold.clear()
    scheduler = bench.scheduler()
    scheduler.start([policy()])
    await until(lambda: bench.journal.skipped("p", 0) >= 2)
    assert len(bench.runs) == 1
    assert scheduler.running == {"p"}
    with pytest.raises(AlreadyRunning):
        scheduler.run_now("p")
    bench.hold.set()
    await until(lambda: len(bench.runs) >= 2)
    await scheduler.stop()


async def test_only_so_many_at_once(bench: Bench) -> None:
    bench.hold.clear()
    scheduler = bench.scheduler(parallel=2)
    scheduler.start([policy(name, "@yearly") for name in "abcd"])
    for name in "abcd":
        scheduler.run_now(name)
    await until(lambda: len(bench.runs) == 2)
    await asyncio.sleep(0.1)
    assert len(bench.runs) == 2
    bench.hold.set()
    await until(lambda: len(bench.runs) == 4)
    assert {reason for _, reason in bench.runs} == {Reason.ASKED}
    await scheduler.stop()


async def test_what_was_missed_runs_once(bench: Bench) -> None:
    first = bench.scheduler()
    hourly = policy("p", "every 1h")
    first.start([hourly])
    due = first.next_run("p")
    first.run_now("p")
    await until(lambda: len(bench.runs) == 1)
    bench.journal.fired("p", bench.clock.now_ns() - 300 * 3600 * NANOSECONDS)
    await first.stop()
    for changed in (hourly, replace(hourly, windows=())):
        bench.runs.clear()
        bench.journal.fired("p", bench.clock.now_ns() - 300 * 3600 * NANOSECONDS)
        with bench.state.write() as db:  # even the job store's memory is not needed
            db.execute("DELETE FROM policy_jobs")
        again = bench.scheduler()
        again.start([changed])
        await until(lambda: len(bench.runs) == 1)
        assert bench.runs == [("p", Reason.MISSED)]
        await asyncio.sleep(0.2)
        assert len(bench.runs) == 1
        assert again.next_run("p") >= due
        await again.stop()


async def test_jobs_survive_in_the_database(bench: Bench) -> None:
    first = bench.scheduler()
    first.start([policy("p", "every 1h", jitter="10m"), policy("gone", "@daily")])
    due = first.next_run("p")
    await first.stop()
    second = bench.scheduler()
    second.start([policy("p", "every 1h", jitter="10m")])
    assert second.next_run("p") == due
    with pytest.raises(NotFound):
        second.next_run("gone")
    second.replace([policy("p", "every 2s")])
    assert second.next_run("p") != due
    await second.stop()


@pytest.mark.parametrize("hours", [-2, 2])
async def test_a_clock_that_was_set_is_noticed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    by = hours * 3600 * NANOSECONDS

    class Shifted(datetime):
        """The host's clock as APScheduler reads it."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(microseconds=bench.clock.by // 1000)

    monkeypatch.setattr("apscheduler.schedulers.base.datetime", Shifted)
    scheduler = bench.scheduler(watch=0.05)
    scheduler.start([policy("p", "every 1h")])
    due = instant(scheduler.next_run("p"))
    await asyncio.sleep(0.1)
    bench.clock.by = by
    await until(lambda: instant(scheduler.next_run("p")) == due + by)
    assert len(bench.runs) == (1 if hours > 0 else 0)
    await scheduler.stop()


async def test_a_run_that_waited_for_its_turn_when_the_daemon_died_is_not_lost(
    bench: Bench,
) -> None:
    bench.journal.fired("p", bench.clock.now_ns(), pending=True)
    scheduler = bench.scheduler()
    scheduler.start([policy("p", "@yearly")])
    await until(lambda: bench.runs == [("p", Reason.MISSED)])
    await until(lambda: not bench.journal.is_pending("p"))
    await scheduler.stop()

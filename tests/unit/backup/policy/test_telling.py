"""Messages, pings, metrics and status lines, against a real HTTP server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
from aiohttp import web

from lazarette.backup.policy.journal import Journal
from lazarette.backup.policy.metrics import Metrics, Watched
from lazarette.backup.policy.model import Origin, Policy, Tell, parse_words
from lazarette.backup.policy.notify import Notifier
from lazarette.backup.policy.outcome import Consistency, Kind, Outcome, Result, failed
from lazarette.backup.policy.status import Level, status_line, unprotected
from lazarette.storage.clock import NANOSECONDS, FakeClock
from lazarette.storage.state import State

# Apprise's own, at its first use
pytestmark = pytest.mark.filterwarnings("ignore:.*imghdr.*:DeprecationWarning")

HOUR = 3600 * NANOSECONDS
GOOD = Outcome(Result.OK, snapshot="s", consistency=Consistency.CRASH, pause_ns=5_000_000)


class Listener:
    """What a service on the other side saw."""

    def __init__(self) -> None:
        self.pings: list[str] = []
        self.messages: list[dict[str, str]] = []
        self.status = 200
        self.url = ""

    async def ping(self, request: web.Request) -> web.Response:
        self.pings.append(request.path)
        return web.Response(status=self.status)

    async def message(self, request: web.Request) -> web.Response:
        self.messages.append(await request.json())
        return web.Response(status=self.status)

    def titles(self) -> list[str]:
        return [message["title"] for message in self.messages]


@pytest_asyncio.fixture
async def listener() -> AsyncIterator[Listener]:
    made = Listener()
    app = web.Application()
    app.router.add_get("/ping/{what}", made.ping)
    app.router.add_post("/notify", made.message)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    made.url = f"{host}:{port}"
    yield made
    await runner.cleanup()


def policy(listener: Listener) -> Policy:
    plain = parse_words("p", {"volumes": ["db"], "schedule": "every 15m"}, Origin.SET)
    at = f"http://{listener.url}/ping/"
    return replace(
        plain,
        tell=Tell((f"json://{listener.url}/notify",), at + "start", at + "success", at + "fail"),
    )


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def state():  # type: ignore[no-untyped-def]
    made = State(":memory:")
    yield made
    made.close()


async def test_told_once_when_it_begins_daily_and_when_it_ends(
    listener: Listener, clock: FakeClock, state: State
) -> None:
    each = policy(listener)
    for _ in range(3):  # a restart repeats nothing
        notifier = Notifier(state, clock, "host-a")
        assert await notifier.ended(each, "db", Kind.BACKUP, failed("disk is full")) == []
    assert listener.titles() == ["db on host-a: failing"]
    assert "disk is full" in listener.messages[0]["message"]
    clock.advance(25 * 3600)
    await notifier.ended(each, "db", Kind.BACKUP, failed("disk is full"))
    assert len(listener.messages) == 2
    await notifier.ended(each, "db", Kind.BACKUP, GOOD)
    await notifier.ended(each, "db", Kind.BACKUP, GOOD)
    assert listener.titles()[2:] == ["db on host-a: no longer failing"]
    await notifier.ended(each, "db", Kind.BACKUP, replace(GOOD, suspicious=True))
    await notifier.ended(each, "db", Kind.DRILL, failed("no answer"))
    assert listener.titles()[3:] == ["db on host-a: suspicious", "db on host-a: drill failed"]


async def test_overdue(listener: Listener, clock: FakeClock, state: State) -> None:
    journal, notifier = Journal(state, clock), Notifier(state, clock, "host-a")
    each = policy(listener)
    journal.end(journal.begin("p", "db", Kind.BACKUP), GOOD)
    await notifier.looked_at(each, journal.protection("db", HOUR))
    assert listener.messages == []
    clock.advance(7200)
    await notifier.looked_at(each, journal.protection("db", HOUR))
    await notifier.looked_at(each, journal.protection("db", HOUR))
    assert listener.titles() == ["db on host-a: overdue"]
    assert "2h old; the target is 1h" in listener.messages[0]["message"]


async def test_a_new_policy_is_overdue_when_its_target_has_passed(
    listener: Listener, clock: FakeClock, state: State
) -> None:
    journal, notifier = Journal(state, clock), Notifier(state, clock, "host-a")
    each = policy(listener)
    for begins in (1, 2):  # forgotten and set again, its time begins anew
        journal.watch(["db"])
        await notifier.looked_at(each, journal.protection("db", HOUR))
        assert len(listener.messages) == 2 * (begins - 1)
        clock.advance(3601)
        await notifier.looked_at(each, journal.protection("db", HOUR))
        assert listener.titles()[-1] == "db on host-a: overdue"
        assert "there is no good backup; the target is 1h" in listener.messages[-1]["message"]
        journal.watch([])
        journal.watch(["db"])
        await notifier.looked_at(each, journal.protection("db", HOUR))
        assert listener.titles()[-1] == "db on host-a: no longer overdue"


async def test_pings(listener: Listener, clock: FakeClock, state: State) -> None:
    notifier, each = Notifier(state, clock, "h"), policy(listener)
    await notifier.began(each)
    await notifier.ended(each, "db", Kind.BACKUP, GOOD)
    await notifier.ended(each, "db", Kind.BACKUP, failed("x"))
    assert listener.pings == ["/ping/start", "/ping/success", "/ping/fail"]


async def test_what_cannot_be_delivered_is_a_warning(
    listener: Listener, clock: FakeClock, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazarette.backup.policy.notify._PING_TRIES", 1)
    listener.status = 500
    notifier, each = Notifier(state, clock, "h"), policy(listener)
    problems = await notifier.ended(each, "db", Kind.BACKUP, failed("x"))
    assert len(problems) == 2
    assert not any("/notify" in problem for problem in problems)
    away = replace(each, tell=Tell(("nonsense://x",), ping_failure="http://127.0.0.1:9/secret"))
    clock.advance(25 * 3600)
    problems = await notifier.ended(away, "db", Kind.BACKUP, failed("x"))
    assert len(problems) == 2
    assert not any("secret" in problem for problem in problems)


def test_metrics(clock: FakeClock, state: State) -> None:
    journal = Journal(state, clock)
    metrics = Metrics(
        lambda: [Watched("p", journal.protection("db", HOUR), journal.skipped("p", 0))]
    )

    def value(line: str) -> float:
        text = metrics.render().decode()
        return float(next(each for each in text.splitlines() if each.startswith(line)).split()[-1])

    assert value('lazarette_last_success_timestamp_seconds{policy="p",volume="db"}') == 0
    assert value("lazarette_overdue") == 0
    journal.watch(["db"])
    clock.advance(3601)
    assert value("lazarette_overdue") == 1
    started = clock.now_ns() / NANOSECONDS
    outcome = replace(GOOD, bytes_read=1000, bytes_sent=10)
    journal.end(journal.begin("p", "db", Kind.BACKUP), outcome)
    metrics.ended("db", Kind.BACKUP, outcome)
    journal.end(
        journal.begin("p", "db", Kind.DRILL), Outcome(Result.OK, restore_ns=2 * NANOSECONDS)
    )
    journal.skipped("p", 4)
    clock.advance(60)
    assert value("lazarette_last_success_timestamp_seconds") == started
    assert value("lazarette_overdue") == 0
    assert value("lazarette_rpo_seconds") == 60
    assert value("lazarette_rto_seconds") == 2
    assert value("lazarette_last_drill_ok") == 1
    assert value("lazarette_skipped_runs") == 4
    assert value('lazarette_runs_total{kind="backup",result="ok",volume="db"}') == 1
    assert value("lazarette_read_bytes_total") == 1000
    assert value("lazarette_pause_seconds_count") == 1
    journal.end(journal.begin("p", "db", Kind.BACKUP), failed("x"))
    assert value("lazarette_last_backup_ok") == 0
    assert value("lazarette_last_success_timestamp_seconds") == started


def test_status_lines(clock: FakeClock, state: State) -> None:
    journal = Journal(state, clock)

    def line() -> tuple[str, str]:
        found = status_line(journal.protection("db", HOUR, 5 * NANOSECONDS), "12:00+01:00")
        return found.level.value, found.text

    journal.watch(["db"])
    assert line() == ("warning", "not saved yet, next 12:00+01:00")
    clock.advance(3601)
    journal.watch(["db", "other"])
    assert line() == ("bad", "overdue: never saved, next 12:00+01:00")
    journal.end(journal.begin("p", "db", Kind.BACKUP), GOOD)
    clock.advance(60)
    assert line() == ("good", "saved 1m ago, crash consistent, next 12:00+01:00")
    slow = Outcome(Result.OK, restore_ns=9 * NANOSECONDS)
    journal.end(journal.begin("p", "db", Kind.DRILL), slow)
    assert line()[0] == "warning"
    assert "restores in 9.0s" in line()[1]
    journal.end(journal.begin("p", "db", Kind.BACKUP), Outcome(Result.WARNINGS, ("a", "b")))
    assert "none consistent, 2 warnings" in line()[1]
    journal.end(journal.begin("p", "db", Kind.BACKUP), failed("no"))
    assert line()[0] == "bad"
    assert unprotected("x").level is Level.WARNING
    clock.advance(7200)
    assert line()[1].startswith("overdue: saved 2h")

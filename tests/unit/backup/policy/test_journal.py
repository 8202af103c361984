from __future__ import annotations

from collections.abc import Iterator

import pytest

from lazarette.backup.policy.journal import Journal, Reason
from lazarette.backup.policy.outcome import Consistency, Kind, Outcome, Result, failed
from lazarette.backup.policy.suspicion import Extent, Thresholds, suspicions
from lazarette.storage.clock import NANOSECONDS, FakeClock
from lazarette.storage.errors import NotFound
from lazarette.storage.state import State

HOUR = 3600 * NANOSECONDS


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def journal(clock: FakeClock) -> Iterator[Journal]:
    state = State(":memory:")
    yield Journal(state, clock)
    state.close()


def test_a_run_is_written_down_and_read_back(journal: Journal, clock: FakeClock) -> None:
    number = journal.begin("p", "db", Kind.BACKUP, Reason.MISSED)
    assert journal.run(number).outcome is None
    clock.advance(5)
    outcome = Outcome(
        Result.WARNINGS,
        ("a: vanished",),
        snapshot="s",
        consistency=Consistency.CRASH,
        pause_ns=7,
        bytes_read=10,
        bytes_sent=3,
    )
    journal.end(number, outcome)
    run = journal.run(number)
    assert run.outcome == outcome
    assert run.reason == "missed while the daemon was away"
    assert run.ended_ns == run.started_ns + 5 * NANOSECONDS
    journal.end(number, failed("late"))
    assert journal.run(number).outcome == outcome
    with pytest.raises(NotFound):
        journal.run(99)


def test_runs_without_an_end_have_failed(journal: Journal) -> None:
    """A11: failed, not in progress for ever; a job that outlives the daemon is let be."""
    gone, alive = (journal.begin("p", "db", Kind.BACKUP) for _ in range(2))
    [run] = journal.close_abandoned(lambda number: number == alive)
    assert run.id == gone
    assert run.outcome is not None
    assert run.outcome.result is Result.FAILED
    assert journal.run(alive).outcome is None


def test_the_state_of_a_volume(journal: Journal, clock: FakeClock) -> None:
    nothing = journal.protection("db", HOUR)
    assert nothing.waiting
    assert not nothing.overdue
    assert nothing.rpo_ns is None
    good = journal.begin("p", "db", Kind.BACKUP)
    clock.advance(60)
    journal.end(good, Outcome(Result.OK, snapshot="s1"))
    for outcome in (failed("no"), Outcome(Result.WARNINGS, suspicious=True)):
        clock.advance(600)
        journal.end(journal.begin("p", "db", Kind.BACKUP), outcome)
    drill = journal.begin("p", "db", Kind.DRILL)
    journal.end(drill, Outcome(Result.OK, restore_ns=9 * NANOSECONDS))
    journal.end(journal.begin("p", "other", Kind.BACKUP), Outcome(Result.OK))
    now = journal.protection("db", HOUR, 10 * NANOSECONDS)
    assert now.last_good is not None
    assert now.last_good.id == good
    assert now.last is not None
    assert now.last.outcome is not None
    assert now.last.outcome.suspicious
    assert now.rpo_ns == 1260 * NANOSECONDS
    assert now.rto_ns == 9 * NANOSECONDS
    assert not now.overdue
    clock.advance(2400)
    assert journal.protection("db", HOUR).overdue
    assert [run.volume for run in journal.runs(limit=2)] == ["other", "db"]
    assert len(journal.runs(volume="db", kind=Kind.BACKUP)) == 3


def test_skipped_and_fired(journal: Journal) -> None:
    assert journal.last_fired("p") is None
    assert journal.skipped("p") == 1
    assert journal.skipped("p", 2) == 3
    assert journal.last_fired("p") is None
    journal.fired("p", 5)
    assert journal.last_fired("p") == 5
    assert journal.skipped("p", 0) == 3


def test_an_empty_volume_is_suspicious() -> None:
    """A36."""
    before = [Extent(1000, 1 << 30)] * 3
    [said] = suspicions(before, Extent(1, 0))
    assert "empty" in said
    assert suspicions([], Extent(1, 0)) == []
    assert suspicions([Extent(1, 0)], Extent(1, 0)) == []


def test_a_sudden_drop_is_suspicious() -> None:
    before = [Extent(1000, 1 << 30)] * 3
    assert suspicions(before, Extent(600, 1 << 30)) == []
    assert len(suspicions(before, Extent(400, 1 << 30))) == 1
    assert len(suspicions(before, Extent(400, 1 << 20))) == 2
    assert suspicions(before, Extent(5000, 1 << 33)) == []
    assert suspicions(before, Extent(400, 1 << 30), Thresholds(drop=0.9)) == []
    # one odd backup neither hides a drop nor makes one
    odd = [Extent(10, 100), *before]
    assert len(suspicions(odd, Extent(400, 1 << 30))) == 1
    assert suspicions([Extent(10**6, 1 << 40), *before], Extent(900, 1 << 30)) == []
    assert suspicions([Extent(5, 100)], Extent(2, 10)) == []


def test_a_run_that_was_due_is_pending_until_it_is_in_the_journal(journal: Journal) -> None:
    journal.fired("p", 5, pending=True)
    assert journal.is_pending("p")
    journal.fired("p", 6)  # the next one is skipped: the first still waits
    assert journal.is_pending("p")
    journal.begin("p", "db", Kind.BACKUP)
    assert not journal.is_pending("p")
    journal.fired("q", 5, pending=True)
    journal.taken("q")
    assert not journal.is_pending("q")
    assert not journal.is_pending("never heard of")


def test_a_good_drill_verifies(journal: Journal) -> None:
    assert journal.protection("db", HOUR).last_verified is None
    first = journal.begin("", "db", Kind.VERIFY)
    journal.end(first, Outcome(Result.OK))
    drill = journal.begin("p", "db", Kind.DRILL)
    journal.end(drill, failed("no answer"))
    seen = journal.protection("db", HOUR).last_verified
    assert seen is not None
    assert seen.id == first

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from lazarette.backup.policy.access import Ended
from lazarette.backup.policy.drill import PREFIX, DrillLimits, drill, sweep
from lazarette.backup.policy.outcome import Result
from lazarette.storage.clock import FakeClock, SystemClock
from lazarette.storage.errors import InternalError


class Host:
    """A runtime in memory."""

    def __init__(self) -> None:
        self.volumes: set[str] = set()
        self.containers: set[str] = set()
        self.answers = [1, 1, 0]
        self.broken = ""
        self.clock = FakeClock()
        self.hang = False

    def fail(self, step: str) -> None:
        if self.broken == step:
            raise InternalError(f"{step} failed")

    async def restore(self, volume: str, snapshot: str, into: str) -> str:
        self.volumes.add(into)
        self.fail("restore")
        self.clock.advance(2)
        if self.hang:
            await asyncio.sleep(60)
        return snapshot or "newest"

    async def start(self, volume: str, scratch: str, name: str) -> str:
        self.containers.add(name)
        self.fail("start")
        return "id"

    async def execute(self, container: str, argv: Sequence[str], timeout: float) -> Ended:
        self.clock.advance(1)
        return Ended(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0], b"", b"no")

    async def remove_container(self, name: str) -> None:
        self.containers.discard(name)

    async def remove_volume(self, name: str) -> None:
        assert not self.containers
        self.volumes.discard(name)

    async def leftovers(self) -> Sequence[tuple[str, str]]:
        return [
            (name if name in self.containers else "", name if name in self.volumes else "")
            for name in self.containers | self.volumes
        ]


async def test_the_restore_time_is_measured_to_the_first_good_answer() -> None:
    host = Host()
    outcome = await drill(7, "db", ["check"], host, host.clock)
    assert outcome.result is Result.OK
    assert outcome.restore_ns == 5 * 10**9
    assert outcome.snapshot == "newest"
    assert host.volumes == host.containers == set()


@pytest.mark.parametrize("step", ["restore", "start"])
async def test_everything_is_removed_after_a_failure(step: str) -> None:
    host = Host()
    host.broken = step
    outcome = await drill(7, "db", ["check"], host, host.clock)
    assert outcome.result is Result.FAILED
    assert step in outcome.error
    assert host.volumes == host.containers == set()


async def test_a_check_that_never_succeeds() -> None:
    host = Host()
    host.answers = [1]
    limits = DrillLimits(check=3)
    outcome = await drill(7, "db", ["check"], host, host.clock, snapshot="s", limits=limits)
    assert outcome.result is Result.FAILED
    assert outcome.error.endswith("failed: no")
    assert outcome.snapshot == "s"
    assert host.volumes == host.containers == set()


async def test_a_drill_that_hangs_or_is_cancelled() -> None:
    host = Host()
    host.hang = True
    outcome = await drill(7, "db", [], host, SystemClock(), limits=DrillLimits(whole=0.1))
    assert "longer than" in outcome.error
    task = asyncio.create_task(drill(8, "db", [], host, SystemClock()))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert host.volumes == host.containers == set()


async def test_what_a_killed_daemon_left_is_removed() -> None:
    host = Host()
    host.volumes = {PREFIX + "1", PREFIX + "2"}
    host.containers = {PREFIX + "1"}
    assert await sweep(host, but=[2]) == 1
    assert host.volumes == {PREFIX + "2"}

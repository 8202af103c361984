"""Safety snapshots go when they are old, and only they."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.managers import Host

from lazarette.runtime.protection.safeties import Safeties
from lazarette.storage.clock import NANOSECONDS, FakeClock, SystemClock
from lazarette.storage.volumes.contract import OpenGate

_DAY_NS = 86_400 * NANOSECONDS


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    if os.geteuid() != 0:
        pytest.skip("volume drivers need root")
    made = Host(tmp_path, ("overlay",))
    yield made
    made.clean()


def test_old_safety_snapshots_go(host: Host) -> None:
    manager, now = host.manager, SystemClock().now_ns()
    for volume in ("idle", "busy"):
        manager.create(volume)
        for name in ("before-restore-1", "before-rollback-1", "before-standby-1", "mine"):
            manager.snapshot([volume], OpenGate(), name)

    def left(days: float) -> dict[str, set[str]]:
        Safeties(manager, lambda: {"busy"}, 7, FakeClock(now + int(days * _DAY_NS))).sweep()
        return {name: {one.id for one in manager.snapshots(name)} for name in ("idle", "busy")}

    whole = {"before-restore-1", "before-rollback-1", "before-standby-1", "mine"}
    assert left(6.9) == {"idle": whole, "busy": whole}
    assert left(7.1) == {"idle": {"mine"}, "busy": whole}

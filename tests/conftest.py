"""Fixtures every suite may ask for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tests.support.daemon import Daemon, running
from tests.support.s3 import s3_bucket, s3_server

__all__ = ["daemon", "s3_bucket", "s3_server"]

# a busy machine is slow to make up input; that says nothing about the code
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

TIMED = (Path(__file__).parent / "system", Path(__file__).parent / "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole daemons under a deadline are run once more on failure, and listed as ``RERUN``.

    What is slow comes first: begun last, it would keep one worker busy long after the others.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if any(folder in item.path.parents for folder in TIMED):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why the tests that were run once more had failed."""
    for report in terminalreporter.stats.get("rerun", ()):
        terminalreporter.section(f"failed at first: {report.nodeid}", sep="-")
        terminalreporter.write_line(report.longreprtext)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of the test's own, ended with all it made."""
    with running(tmp_path / "d") as one:
        yield one

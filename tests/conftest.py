"""Fixtures every suite may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.daemon import Daemon
from tests.support.s3 import s3_bucket, s3_server

__all__ = ["daemon", "s3_bucket", "s3_server"]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of the test's own, ended with all it made."""
    if os.geteuid() != 0:
        pytest.skip("the daemon needs root")
    one = Daemon(tmp_path / "d")
    one.start()
    yield one
    one.end()
    assert not left_mounted(one.root), "mounts are left"


def left_mounted(root: Path) -> list[str]:
    """Mount points below a folder."""
    with open("/proc/self/mountinfo") as mounts:
        points = [line.split()[4] for line in mounts]
    return [point for point in points if point.startswith(f"{root}/")]

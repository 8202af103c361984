"""Several daemons on one host, begun at the same moment."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.daemon import Daemon


def test_daemons_that_begin_together_take_different_subnets(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("the daemon needs root")
    daemons = [Daemon(tmp_path / str(number)) for number in range(4)]
    shown = ("network", "inspect", "-f", "{{(index .IPAM.Config 0).Subnet}}")
    try:
        with ThreadPoolExecutor(len(daemons)) as threads:
            list(threads.map(Daemon.start, daemons))
            list(threads.map(lambda one: one.docker("network", "create", "other"), daemons))
        subnets = [one.docker(*shown, "bridge", "other").stdout.split() for one in daemons]
        assert len({each for pair in subnets for each in pair}) == 2 * len(daemons), subnets
    finally:
        for one in daemons:
            one.end()

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.netns import own_namespace
from tests.support.network_host import NetworkHost

from lazarette.runtime.networks.namespaces import NetNamespace


@pytest.fixture
def namespace() -> Iterator[NetNamespace]:
    """A network namespace of the test's own, which stands for the host."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with own_namespace() as made:
        yield made


@pytest.fixture
def host(namespace: NetNamespace, tmp_path: Path) -> Iterator[NetworkHost]:
    """A daemon's networks on that host."""
    made = NetworkHost(tmp_path / "host")
    try:
        yield made
    finally:
        made.close()

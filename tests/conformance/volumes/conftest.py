from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.volumes import KINDS, Bench, Kind, bench


@pytest.fixture(scope="session", params=KINDS, ids=lambda kind: kind.id)
def drivers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    kind: Kind = request.param
    with bench(kind, Path(tmp_path_factory.mktemp(f"laz-{kind.id}"))) as made:
        yield made


@pytest.fixture
def volumes(drivers: Bench) -> Iterator[Bench]:
    yield drivers
    drivers.clean()

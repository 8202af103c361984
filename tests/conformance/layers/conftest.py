from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.layers import KINDS, Kind, LayerBench, layer_bench


@pytest.fixture(scope="session", params=KINDS, ids=lambda kind: kind.id)
def layer_drivers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LayerBench]:
    kind: Kind = request.param
    with layer_bench(kind, Path(tmp_path_factory.mktemp(f"laz-layer-{kind.id}"))) as made:
        yield made


@pytest.fixture
def layers(layer_drivers: LayerBench) -> Iterator[LayerBench]:
    yield layer_drivers
    layer_drivers.clean()

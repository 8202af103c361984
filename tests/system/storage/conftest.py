from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.managers import Host

from lazarette.storage import native
from lazarette.storage.pool import GIB, Pool, PoolFormat


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    try:
        yield made
    finally:
        made.clean()


@pytest.fixture(params=list(PoolFormat), ids=lambda kind: kind.value)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    pool = Pool(tmp_path / "file", tmp_path / "disk", request.param, GIB)
    pool.open()
    try:
        yield pool.target
    finally:
        pool.close()


@pytest.fixture(params=["c", "python"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C module and without."""
    if request.param == "python":
        for name in ("scan", "scan_tree", "split", "copy_files", "unlike_files"):
            monkeypatch.setattr(native, name, getattr(native, f"{name}_plain"))

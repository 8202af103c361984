"""An image store killed at random moments is whole again at the next start.

``LAZ_KILL_ROUNDS`` sets how often (6), ``LAZ_KILL_SEED`` at which moments (7).
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.image_worker import MARK, open_store
from tests.support.registry import Registry, registry

from lazarette.runtime.images.removal import Remover
from lazarette.runtime.images.store import ImageStore

KILLS = int(os.environ.get("LAZ_KILL_ROUNDS", "6"))
SEED = os.environ.get("LAZ_KILL_SEED", "7")
LONGEST_S = 2.0


def check(store: ImageStore, root: Path) -> None:
    """Nothing half is visible, nothing without a use is left."""
    images = store.all()
    used = {chain for image in images for chain in image.chain}
    rows = store.layers.all()
    assert {layer.chain for layer in rows} == used
    assert store.layers.driver.keys() == sorted(layer.key for layer in rows)
    live = {layer.blob.digest for layer in rows}
    live |= {digest for image in images for digest in (image.id, image.manifest) if digest}
    present = {"sha256:" + blob.name for blob in (root / "images/sha256").iterdir()}
    assert present == live
    assert list((root / "images/ingest").iterdir()) == []
    for image in images:
        assert image.layer is not None
        merged = store.layers.driver.mount(image.layer)
        try:
            assert (merged / "bin/busybox").stat().st_size > 1_000_000
            built = [name for name in image.tags if "built:" in name]
            if built:
                assert (merged / MARK).read_text() in (built[0], "built:2")
        finally:
            store.layers.driver.unmount(image.layer)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Registry]:
    with registry(tmp_path / "registry") as one:
        yield one


@pytest.mark.timeout(max(300, 30 * KILLS))
def test_kills_at_random_moments(tmp_path: Path, running: Registry) -> None:
    moments = random.Random(SEED)
    loop = asyncio.new_event_loop()
    try:
        for turn in range(KILLS):
            with subprocess.Popen(
                [sys.executable, "-m", "tests.support.image_worker", str(tmp_path), running.host],
                stdout=subprocess.PIPE,
            ) as worker:
                assert worker.stdout is not None
                assert worker.stdout.readline() == b"ready\n"
                time.sleep(moments.uniform(0, LONGEST_S))
                assert worker.poll() is None, "the worker failed by itself"
                worker.kill()
            store, state = open_store(tmp_path, loop)
            try:
                check(store, tmp_path)
            except AssertionError as broken:
                raise AssertionError(f"kill {turn} of LAZ_KILL_SEED={SEED}: {broken}") from broken
            finally:
                state.close()
        store, state = open_store(tmp_path, loop)
        remover = Remover(store)
        while images := store.all():
            remover.remove(images[0].id, force=True)
        check(store, tmp_path)
        state.close()
    finally:
        loop.close()

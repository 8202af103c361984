"""Layers killed at each named step, then recovered."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.kills import killed_at, steps_of
from tests.support.layers import KINDS, Kind, file, folder, remove_all, tar

from lazarette.storage.layers.contract import LayerDriver

VERBS: dict[str, Callable[[LayerDriver], object]] = {
    "apply": lambda driver: driver.apply("new", "base", tar(file("d/g"), file("d/.wh.f", b""))),
    "prepare": lambda driver: driver.prepare("new", "base"),
    "remove": lambda driver: driver.remove("old"),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
@pytest.mark.parametrize("verb", VERBS)
def test_a_kill_at_any_step_is_recovered(tmp_path: Path, kind: Kind, verb: str) -> None:
    driver = kind.make(tmp_path)
    try:
        driver.recover()
        driver.apply("base", None, tar(folder("d"), file("d/f")))
        driver.prepare("old", "base")
        names = steps_of(lambda: VERBS[verb](driver))
        assert names
        for step in names:
            driver.remove("new")
            driver.prepare("old", "base")
            assert killed_at(step, lambda: VERBS[verb](kind.make(tmp_path)) and None), step
            driver.close()
            driver = kind.make(tmp_path)
            driver.recover()
            _check(driver, tmp_path)
            VERBS[verb](driver)
            assert driver.exists("new") is (verb != "remove")
    finally:
        remove_all(driver)
        driver.close()


def _check(driver: LayerDriver, root: Path) -> None:
    """Layers are wholly there or wholly absent, and nothing is left over."""
    base = root / "pool" if (root / "pool").exists() else root
    assert os.listdir(base / "staging") == os.listdir(base / "trash") == []
    assert sorted(os.listdir(base / "layers")) == driver.keys()
    for key in sorted(driver.keys()):
        tree = driver.mount(key)
        try:
            assert (tree / "d").is_dir()
        finally:
            driver.unmount(key)

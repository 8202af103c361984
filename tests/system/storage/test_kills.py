"""Every operation killed at each of its named steps, then recovered."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.kills import killed_at, steps_of
from tests.support.managers import Host
from tests.support.volumes import snapshot_of

from lazarette.storage.errors import InUse
from lazarette.storage.volumes.contract import OpenGate

KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "btrfs": ("btrfs", {}),
    "overlay": ("overlay", {}),
    "overlay-size": ("overlay", {"size": "64m"}),
    "fuse": ("fuse", {}),
    "fuse-size": ("fuse", {"size": "64m"}),
    "tmpfs": ("tmpfs", {}),
    "bind": ("bind", {}),
}


@contextmanager
def _root(host: Host, name: str) -> Iterator[Path]:
    """A volume's root while a user has it mounted."""
    try:
        yield host.manager.mount(name, "test")
    finally:
        host.manager.unmount(name, "test")


def _setup(host: Host, driver: str, options: dict[str, str]) -> None:
    host.manager.create("data", driver, options)
    with _root(host, "data") as root:
        (root / "f").write_text("one")
        host.manager.snapshot(["data"], OpenGate(), "s1")
        (root / "f").write_text("two")
    folder = host.root / "image"
    folder.mkdir(exist_ok=True)
    for number in range(5):
        (folder / f"file{number}").write_text("x" * 1000)


def _create(host: Host) -> None:
    data = host.manager.get("data")
    host.manager.create("new", data.driver, data.options)


def _snapshot_mounted(host: Host) -> None:
    host.manager.mount("data", "user")
    try:
        host.manager.snapshot(["data"], OpenGate(), "s2")
    finally:
        host.manager.unmount("data", "user")


def _resize(host: Host) -> None:
    if host.manager.get("data").options:
        host.manager.resize("data", 96 << 20)


def _populate(host: Host) -> None:
    data = host.manager.get("data")
    host.manager.create("empty", data.driver, data.options)
    host.manager.populate("empty", host.root / "image")


VERBS: dict[str, Callable[[Host], object]] = {
    "create": _create,
    "remove": lambda host: host.manager.remove("data"),
    "rename": lambda host: host.manager.rename("data", "renamed"),
    "snapshot": lambda host: host.manager.snapshot(["data"], OpenGate(), "s2"),
    "snapshot of a mounted volume": _snapshot_mounted,
    "resize": _resize,
    "delete snapshot": lambda host: host.manager.delete_snapshot("data", "s1"),
    "clone": lambda host: host.manager.clone("data", "s1", "copy"),
    "rollback": lambda host: host.manager.rollback("data", "s1"),
    "populate": _populate,
}


def _check(host: Host, verb: str) -> None:
    """Each volume is wholly there or wholly absent, and everything can be done again."""
    names = {volume.name for volume in host.manager.list()}
    driver_names = {name for driver in host.drivers.values() for name in driver.names()}
    assert names == driver_names
    if verb == "remove" and not names:
        return
    data = "renamed" if "renamed" in names else "data"
    assert data in names
    with _root(host, data) as root:
        content = (root / "f").read_text()
    snapshots = {info.id for info in host.manager.snapshots(data)}
    if verb == "resize":
        assert host.manager.usage(data).limit in (64 << 20, 96 << 20)
    if verb == "rollback" and any(s.startswith("before-rollback-") for s in snapshots):
        assert content in ("one", "two")
    else:
        assert content == "two"
    assert snapshots - {"s2"} >= ({"s1"} if verb != "delete snapshot" else set())
    for snapshot in snapshots:
        view = host.manager.view(data, snapshot)
        assert (view / "f").read_text() in ("one", "two")
        host.manager.release_view(data, snapshot)
    if "copy" in names:
        with _root(host, "copy") as root:
            assert (root / "f").read_text() == "one"
    if "empty" in names:
        with _root(host, "empty") as root:
            assert len(snapshot_of(root)) in (1, 6)
        host.manager.populate("empty", host.root / "image")
        with _root(host, "empty") as root:
            assert len(snapshot_of(root)) == 6
    for base in host.drivers:
        root = host.root / base
        inside = root / "pool" if (root / "pool").exists() else root
        assert os.listdir(inside / "staging") == os.listdir(inside / "trash") == []


def _move(host: Host) -> None:
    host.manager.create("fresh")
    host.manager.create("fresh", suited="overlay")


def test_a_kill_while_a_volume_moves_leaves_one(tmp_path: Path) -> None:
    host = Host(tmp_path, ("overlay", "bind"))
    try:
        names = steps_of(lambda: _move(host))
        moving = [name for name in names if name.startswith("volume.move")]
        assert len(moving) == 4
        for step in names:
            host.manager.remove("fresh", force=True)
            host.state.close()

            def work() -> None:
                host.open()
                _move(host)

            assert killed_at(step, work), step
            host.restart()
            held = [name for driver in host.drivers.values() for name in driver.names()]
            assert held == [volume.name for volume in host.manager.list()]
            _move(host)
            assert host.manager.get("fresh").driver == "overlay"
            with _root(host, "fresh") as root:
                (root / "f").touch()
    finally:
        host.clean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_kill_at_any_step_is_recovered(tmp_path: Path, kind: str, verb: str) -> None:
    driver, options = KINDS[kind]
    if (driver == "bind" and verb == "rollback") or (verb == "resize" and not options):
        return
    host = Host(tmp_path, (driver,))
    try:
        _setup(host, driver, options)
        names = steps_of(lambda: VERBS[verb](host))
        assert names
        for step in names:
            host.manager.unmount("data", "user")
            for name in [volume.name for volume in host.manager.list()]:
                host.manager.remove(name)
            _setup(host, driver, options)
            host.state.close()

            def work() -> None:
                host.open()
                VERBS[verb](host)

            assert killed_at(step, work), step
            host.restart()
            _check(host, verb)
            # and again: whatever was undone can now be done
            if "data" in {v.name for v in host.manager.list()} and verb != "clone":
                try:
                    VERBS[verb](host)
                except InUse:
                    pytest.fail(f"in use after a kill at {step}")
    finally:
        host.clean()

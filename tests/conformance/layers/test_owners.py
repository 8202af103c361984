"""L4 with an id map: owners of the host outside, those of the container on disk."""

from __future__ import annotations

import os
import stat
import tarfile
from pathlib import Path

import pytest
from tests.support.layers import KINDS, LayerBench, file, folder
from tests.support.remapped import require_mapped_layers

from lazarette.storage import syscalls
from lazarette.storage.changes import ChangeKind
from lazarette.storage.errors import InUse, MissingFeature
from lazarette.storage.idmaps import NOBODY, IdMap, IdRange

IDMAP = IdMap((IdRange(0, 100_000, 65_536),), (IdRange(0, 200_000, 65_536),))
OTHER = IdMap((IdRange(0, 300_000, 65_536),), (IdRange(0, 300_000, 65_536),))


def _drivers(*, maps_owners: bool) -> pytest.MarkDecorator:
    kinds = [kind for kind in KINDS if (kind.id != "fuse") is maps_owners]
    return pytest.mark.parametrize("layer_drivers", kinds, indirect=True, ids=lambda kind: kind.id)


@pytest.fixture
def base(layers: LayerBench) -> str:
    assert layers.driver.capabilities.maps_owners
    if layers.kind.id == "overlay":
        require_mapped_layers()
    owned = tarfile.TarInfo("of-user")
    owned.uid, owned.gid, owned.size = 70, 71, 1
    beyond = tarfile.TarInfo("beyond")
    beyond.uid, beyond.gid, beyond.size = 70_000, 70_000, 1
    return layers.base(folder("d"), file("d/f", b"x"), (owned, b"y"), (beyond, b"z"))


def owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


@_drivers(maps_owners=False)
def test_a_driver_that_maps_no_owners_says_so(layers: LayerBench) -> None:
    assert not layers.driver.capabilities.maps_owners
    key = layers.key()
    layers.driver.prepare(key, layers.base(file("f")))
    with pytest.raises(MissingFeature, match="fuse cannot map owners"):
        layers.mount(key, IDMAP)
    layers.driver.remove(key)


@_drivers(maps_owners=True)
def test_owners_are_mapped_in_a_committed_layer(layers: LayerBench, base: str) -> None:
    """It may be mounted in several ways at a time."""
    plain = layers.mount(base)
    mapped = layers.mount(base, IDMAP)
    other = layers.mount(base, OTHER)
    assert owner(plain / "of-user") == (70, 71)
    assert owner(mapped / "of-user") == (100_070, 200_071)
    assert owner(other / "of-user") == (300_070, 300_071)
    assert owner(mapped / "beyond") == (NOBODY, NOBODY)
    with pytest.raises(OSError, match="Read-only"):
        (mapped / "new").touch()
    assert layers.mount(base, IDMAP) == mapped


@_drivers(maps_owners=True)
def test_what_is_written_lands_with_the_owners_of_the_container(
    layers: LayerBench, base: str
) -> None:
    key = layers.key()
    layers.driver.prepare(key, base)
    root = layers.mount(key, IDMAP)
    with syscalls.filesystem_ids(*IDMAP.root):
        (root / "new").write_text("new")
        (root / "d" / "below").mkdir()
        os.chown(root / "d" / "f", 100_005, 200_006)
        (root / "of-user").unlink()
        os.rename(root / "d", root / "e")
    assert owner(root / "new") == IDMAP.root
    layers.unmount(key, IDMAP)
    seen = layers.mount(key)
    assert owner(seen / "new") == (0, 0)
    assert owner(seen / "e" / "below") == (0, 0)
    assert owner(seen / "e" / "f") == (5, 6)
    assert not (seen / "of-user").exists()
    with layers.driver.diff(key) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        found = {member.name: (member.uid, member.gid) for member in tar}
    assert found["new"] == (0, 0)
    assert found["e/f"] == (5, 6)
    assert found[".wh.of-user"] == (0, 0)
    kinds = {change.path: change.kind for change in layers.driver.changes(key)}
    assert kinds[b"of-user"] is ChangeKind.REMOVED
    assert kinds[b"new"] is ChangeKind.ADDED


@_drivers(maps_owners=True)
def test_an_active_layer_is_mounted_in_one_way(layers: LayerBench, base: str) -> None:
    key = layers.key()
    layers.driver.prepare(key, base)
    layers.mount(key, IDMAP)
    with pytest.raises(InUse, match="mounted with other owners"):
        layers.mount(key)
    with pytest.raises(InUse, match="mounted with other owners"):
        layers.mount(key, OTHER)
    with pytest.raises(InUse, match="it is mounted"):
        layers.driver.remove(key)
    layers.unmount(key, IDMAP)
    root = layers.mount(key)
    with pytest.raises(InUse, match="mounted with other owners"):
        layers.mount(key, IDMAP)
    assert stat.S_ISDIR(root.stat().st_mode)


@_drivers(maps_owners=True)
def test_a_layer_on_nothing_is_mapped_too(layers: LayerBench, base: str) -> None:
    key = layers.key()
    layers.driver.prepare(key, None)
    root = layers.mount(key, IDMAP)
    with syscalls.filesystem_ids(*IDMAP.to_host(7, 8)):
        os.mkdir(root / "sub")
    layers.unmount(key, IDMAP)
    assert owner(layers.mount(key) / "sub") == (7, 8)


@_drivers(maps_owners=True)
def test_a_restarted_driver_finds_a_mapped_mount(layers: LayerBench, base: str) -> None:
    key = layers.key()
    layers.driver.prepare(key, base)
    root = layers.mount(key, IDMAP)
    again = layers.kind.make(layers.root / "driver")
    again.recover()
    assert again.mount(key, IDMAP) == root
    again.unmount(key)
    with pytest.raises(InUse):
        again.mount(key)
    again.unmount(key)
    layers.unmount(key, IDMAP)
    assert owner(layers.mount(key) / "of-user") == (70, 71)

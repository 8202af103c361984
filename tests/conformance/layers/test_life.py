"""L1-L6, L10: layers as such.  Runs for every layer driver."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest
from tests.support.layers import LayerBench, file, folder, tar

from lazarette.storage import mounts
from lazarette.storage.errors import Conflict, InUse, InvalidArgument, NameTaken, NotFound
from lazarette.storage.layers.contract import CommitsInPlace


def test_l1_prepare_is_idempotent(layers: LayerBench) -> None:
    key, root = layers.child(None)
    (root / "kept").write_text("x")
    layers.driver.prepare(key, None)
    assert (root / "kept").read_text() == "x"


def test_l1_apply_is_idempotent(layers: LayerBench) -> None:
    key = layers.key()
    first = layers.driver.apply(key, None, tar(file("f")))
    assert layers.driver.apply(key, None, tar(file("f"))) == first


def test_l1_commit_is_idempotent(layers: LayerBench) -> None:
    key, _ = layers.child(None)
    layers.commit(key)
    layers.driver.commit(key)
    assert layers.driver.exists(key)


def test_l1_remove_is_idempotent(layers: LayerBench) -> None:
    key = layers.base(file("f"))
    layers.driver.remove(key)
    layers.driver.remove(key)
    layers.driver.remove("never")
    assert not layers.driver.exists(key)


def test_l1_unmount_of_what_is_not_mounted_does_nothing(layers: LayerBench) -> None:
    key = layers.base(file("f"))
    layers.driver.unmount(key)
    assert layers.driver.exists(key)


def test_l2_a_broken_tar_leaves_nothing(layers: LayerBench) -> None:
    whole = tar(file("f", b"x" * 100_000)).getvalue()
    key = layers.key()
    with pytest.raises(InvalidArgument):
        layers.driver.apply(key, None, io.BytesIO(whole[:50_000]))
    assert not layers.driver.exists(key)
    assert layers.driver.apply(key, None, io.BytesIO(whole)).size == 100_000


def test_l2_garbage_is_refused(layers: LayerBench) -> None:
    with pytest.raises(InvalidArgument):
        layers.driver.apply(layers.key(), None, io.BytesIO(b"no tar" * 1000))


def test_l2_leftovers_are_removed_by_recover(layers: LayerBench) -> None:
    pool = layers.root / "driver" / "pool"
    base = pool if pool.exists() else layers.root / "driver"
    for place in ("staging", "trash"):
        (base / place / "half").mkdir()
        (base / place / "half" / "f").write_text("x")
    layers.driver.recover()
    assert os.listdir(base / "staging") == os.listdir(base / "trash") == []


def test_an_empty_tar_is_an_empty_layer(layers: LayerBench) -> None:
    key = layers.base()
    assert os.listdir(layers.mount(key)) == []


def test_keys_are_sorted_and_complete(layers: LayerBench) -> None:
    made = sorted(layers.base(file("f")) for _ in range(3))
    assert layers.driver.keys() == made


def test_l3_a_committed_layer_cannot_be_written(layers: LayerBench) -> None:
    key = layers.base(file("f"))
    root = layers.mount(key)
    with pytest.raises(OSError) as refused:
        (root / "f").write_text("y")
    assert refused.value.errno == errno.EROFS


def test_l3_children_do_not_change_their_parent(layers: LayerBench) -> None:
    base = layers.base(folder("d"), file("d/f", b"parent"))
    _, root = layers.child(base)
    (root / "d" / "f").write_text("child")
    (root / "d" / "g").write_text("new")
    below = layers.mount(base)
    assert (below / "d" / "f").read_text() == "parent"
    assert os.listdir(below / "d") == ["f"]


def test_l4_a_mounted_active_layer_is_writable(layers: LayerBench) -> None:
    key, root = layers.child(layers.base(file("f", b"old")))
    (root / "f").write_text("new")
    layers.unmount(key)
    assert (layers.mount(key) / "f").read_text() == "new"


def test_l4_mounts_are_counted(layers: LayerBench) -> None:
    key = layers.base(file("f"))
    first = layers.mount(key)
    assert layers.mount(key) == first
    layers.unmount(key)
    assert (first / "f").read_text() == "x"
    layers.unmount(key)
    assert not first.exists() or not mounts.is_mount_point(first)


def test_l4_two_children_are_independent(layers: LayerBench) -> None:
    base = layers.base(file("f", b"base"))
    (_, one), (_, two) = layers.child(base), layers.child(base)
    (one / "f").write_text("one")
    assert (two / "f").read_text() == "base"
    (two / "f").unlink()
    assert (one / "f").read_text() == "one"


def test_l5_a_mounted_layer_is_not_removed(layers: LayerBench) -> None:
    key = layers.base(file("f"))
    layers.mount(key)
    with pytest.raises(InUse, match=key):
        layers.driver.remove(key)


def test_l5_a_parent_is_not_removed(layers: LayerBench) -> None:
    base = layers.base(file("f"))
    child = layers.key()
    layers.driver.prepare(child, base)
    with pytest.raises(InUse, match=child):
        layers.driver.remove(base)
    layers.driver.remove(child)
    layers.driver.remove(base)


def test_l6_remove_leaves_what_is_mounted_inside_alone(layers: LayerBench, tmp_path: Path) -> None:
    key, root = layers.child(None)
    (tmp_path / "precious").write_text("still here")
    (root / "inner").mkdir()
    mounts.bind(tmp_path, root / "inner")
    layers.unmount(key)
    layers.driver.remove(key)
    assert (tmp_path / "precious").read_text() == "still here"


def test_l6_remove_follows_no_symlink(layers: LayerBench, tmp_path: Path) -> None:
    key, root = layers.child(None)
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    layers.unmount(key)
    layers.driver.remove(key)
    assert (tmp_path / "outside").is_dir()


def test_a_missing_parent_is_refused(layers: LayerBench) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        layers.driver.prepare(layers.key(), "nowhere")
    with pytest.raises(NotFound):
        layers.driver.apply(layers.key(), "nowhere", tar(file("f")))


def test_an_active_parent_is_refused(layers: LayerBench) -> None:
    key, _ = layers.child(None)
    with pytest.raises(Conflict):
        layers.driver.prepare(layers.key(), key)


def test_a_key_is_taken_once(layers: LayerBench) -> None:
    base = layers.base(file("f"))
    with pytest.raises(NameTaken):
        layers.driver.prepare(base, None)
    key, _ = layers.child(base)
    with pytest.raises(NameTaken):
        layers.driver.prepare(key, None)


@pytest.mark.parametrize("bad", ["", "..", "a/b", "A", "-x", ".x", "x" * 129, "ä"])
def test_a_bad_key_is_refused(layers: LayerBench, bad: str) -> None:
    with pytest.raises(InvalidArgument):
        layers.driver.prepare(bad, None)


def test_committing_a_mounted_layer_is_refused(layers: LayerBench) -> None:
    key, _ = layers.child(None)
    with pytest.raises(InUse):
        layers.driver.commit(key)


def test_a_missing_layer_is_named_in_the_error(layers: LayerBench) -> None:
    for call in (layers.driver.mount, layers.driver.usage, layers.driver.commit):
        with pytest.raises(NotFound, match="nowhere"):
            call("nowhere")


def test_another_driver_object_finds_layers_and_mounts(layers: LayerBench) -> None:
    key, root = layers.child(layers.base(file("f")))
    (root / "g").write_text("y")
    again = layers.kind.make(layers.root / "driver")
    again.recover()
    assert again.keys() == layers.driver.keys()
    with pytest.raises(InUse):
        again.remove(key)
    assert (again.mount(key) / "g").read_text() == "y"
    assert again.mount(key) == root


def test_usage_counts_only_the_layer_itself(layers: LayerBench) -> None:
    base = layers.base(file("big", os.urandom(4 << 20)))
    key, root = layers.child(base)
    (root / "small").write_bytes(os.urandom(1 << 20))
    os.sync()
    usage = layers.driver.usage(key)
    assert layers.driver.usage(base).bytes >= (4 << 20) * (layers.kind.id != "btrfs")
    assert usage.bytes >= 1 << 20
    if layers.driver.capabilities.copy_on_write:
        assert usage.bytes < 2 << 20
    assert usage.inodes >= 1


def test_l10_128_layers_are_stacked(layers: LayerBench) -> None:
    parent = layers.base(file("f0", b"0"), file("top", b"0"))
    for depth in range(1, 128):
        key = layers.key()
        marks = [file(f"f{depth}")] if depth % 16 == 0 else []
        layers.driver.apply(key, parent, tar(*marks, file("top", str(depth).encode())))
        parent = key
    _, root = layers.child(parent)
    assert (root / "top").read_text() == "127"
    assert len(os.listdir(root)) == 9
    (root / "top").write_text("changed")
    assert (root / "f0").read_text() == "0"


def test_the_root_of_the_tree_has_metadata_of_its_own(layers: LayerBench) -> None:
    base = layers.base(folder("./", 0o2751, uid=3, gid=4), file("f"))
    key, root = layers.child(base)
    status = root.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o2751, 3, 4)
    root.chmod(0o700)
    layers.unmount(key)
    assert layers.mount(key).stat().st_mode & 0o7777 == 0o700


def test_committing_in_place_is_what_applying_the_diff_gives(layers: LayerBench) -> None:
    base, active, applied, adopted = (layers.key() for _ in range(4))
    driver = layers.driver
    driver.apply(base, None, tar(file("kept", b"k"), file("gone", b"g")))
    driver.prepare(active, base)
    root = layers.mount(active)
    (root / "new").write_bytes(b"n")
    (root / "gone").unlink()
    assert isinstance(driver, CommitsInPlace)
    with pytest.raises(InUse):
        driver.commit_as(active, adopted, size=1, diff_id="sha256:0")
    layers.unmount(active)
    with driver.diff(active) as stream:
        made = driver.apply(applied, base, stream)
    with pytest.raises(NameTaken):
        driver.commit_as(active, base, size=1, diff_id=made.diff_id)
    driver.commit_as(active, adopted, size=made.size, diff_id=made.diff_id)
    assert not driver.exists(active)
    for key in (applied, adopted):
        merged = layers.mount(key)
        assert sorted(os.listdir(merged)) == ["kept", "new"]
        child = layers.key()
        driver.prepare(child, key)
        assert (layers.mount(child) / "new").read_bytes() == b"n"
    with driver.diff(adopted) as stream:
        assert driver.apply(adopted, base, stream) == made

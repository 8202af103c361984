from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lazarette.storage import beneath, mounts
from lazarette.storage.errors import InUse


def test_walk_is_sorted_parents_first_and_follows_nothing(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").touch()
    (tmp_path / "a").touch()
    (tmp_path / "link").symlink_to("/etc")
    with beneath.opened(tmp_path) as root:
        assert [e.path for e in beneath.walk(root)] == [b"", b"a", b"b", b"b/x", b"link"]


def test_walk_marks_mount_points_and_stays_out(tmp_path: Path) -> None:
    tree, other = tmp_path / "tree", tmp_path / "other"
    (tree / "inner").mkdir(parents=True)
    other.mkdir()
    (other / "f").touch()
    mounts.bind(other, tree / "inner")
    try:
        with beneath.opened(tree) as root:
            assert [(e.path, e.mount_point) for e in beneath.walk(root)] == [
                (b"", False),
                (b"inner", True),
            ]
    finally:
        mounts.unmount(tree / "inner")


@pytest.mark.parametrize("replace", [Path.touch, lambda path: path.symlink_to("/"), os.mkfifo])
def test_walk_sees_what_replaces_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: Callable[[Path], None]
) -> None:
    (tmp_path / "changing").mkdir()
    (tmp_path / "later").mkdir()
    open_folder = beneath.open_folder

    def replacing(parent: int, name: bytes) -> int:
        if name == b"changing":
            (tmp_path / "changing").rmdir()
            replace(tmp_path / "changing")
        return open_folder(parent, name)

    monkeypatch.setattr(beneath, "open_folder", replacing)
    with beneath.opened(tmp_path) as root:
        found = {entry.path: entry.is_folder for entry in beneath.walk(root)}
    assert found == {b"": True, b"changing": False, b"later": True}


def test_walk_can_be_left_early(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with beneath.opened(tmp_path) as root:
        for entry in beneath.walk(root):
            if entry.path == b"a":
                break
        del entry
    assert len(os.listdir("/proc/self/fd")) == before


def test_remove_tree_refuses_a_mount_point(tmp_path: Path) -> None:
    tree, other = tmp_path / "tree", tmp_path / "other"
    (tree / "inner").mkdir(parents=True)
    other.mkdir()
    (other / "f").touch()
    mounts.bind(other, tree / "inner")
    try:
        with beneath.opened(tmp_path) as parent, pytest.raises(InUse):
            beneath.remove_tree(parent, b"tree")
    finally:
        mounts.unmount(tree / "inner")
    assert (other / "f").exists()


def test_remove_tree_of_a_link_removes_the_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "f").touch()
    (tmp_path / "link").symlink_to("kept")
    with beneath.opened(tmp_path) as parent:
        beneath.remove_tree(parent, b"link")
        beneath.remove_tree(parent, b"missing")
    assert (tmp_path / "kept" / "f").exists()


def test_open_parent_walks_paths_longer_than_the_kernel_takes(tmp_path: Path) -> None:
    with beneath.opened(tmp_path) as root:
        here = os.dup(root)
        path = b""
        for _ in range(40):
            name = b"d" * 150
            os.mkdir(name, dir_fd=here)
            deeper = beneath.open_folder(here, name)
            os.close(here)
            here = deeper
            path = path + b"/" + name if path else name
        os.close(here)
        parent, name = beneath.open_parent(root, path + b"/end")
        os.close(parent)
        assert name == b"end"
        beneath.remove_tree(root, b"d" * 150)
    assert os.listdir(tmp_path) == []


def test_open_parent_refuses_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with beneath.opened(tmp_path) as root, pytest.raises(OSError) as refused:
        beneath.open_parent(root, b"link/passwd")
    assert refused.value.errno in (errno.ELOOP, errno.ENOTDIR)


def test_resolve_keeps_links_inside_the_root(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "own").write_text("inside")
    (tmp_path / "link").symlink_to("/etc/own")
    (tmp_path / "up").symlink_to("../../../../etc/own")
    with beneath.opened(tmp_path) as root:
        for name in (b"link", b"up", b"/etc/own"):
            with open(beneath.resolve(root, name, os.O_RDONLY), encoding="utf-8") as file:
                assert file.read() == "inside"

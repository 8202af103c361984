"""L7-L9: what passes through apply, mount and diff.  Runs for every layer driver."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile

import pytest
from tests.support.layers import (
    LayerBench,
    entry,
    file,
    folder,
    hardlink,
    names,
    symlink,
    tar,
)
from tests.support.volumes import snapshot_of

from lazarette.storage.changes import ChangeKind
from lazarette.storage.errors import InvalidArgument

CAPABILITY = bytes.fromhex("0100000200040000" + "00" * 12)


def pax(**xattrs: bytes) -> dict[str, str]:
    return {
        "SCHILY.xattr." + key.replace("__", "."): value.decode("utf-8", "surrogateescape")
        for key, value in xattrs.items()
    }


def test_l7_one_of_everything_passes_through_apply(layers: LayerBench) -> None:
    big = os.urandom(300_000)
    key = layers.base(
        folder("d", 0o2750, uid=7, gid=8),
        file("d/file", big, 0o4711, uid=5, gid=6, pax_headers={"mtime": "1234567.123456789"}),
        hardlink("second", "d/file"),
        symlink("link", "../../etc/passwd"),
        entry("fifo", tarfile.FIFOTYPE, 0o600),
        entry("null", tarfile.CHRTYPE, 0o666, devmajor=1, devminor=3),
        file("marked", pax_headers=pax(user__k=b"\x00\xff", security__capability=CAPABILITY)),
        file("old", pax_headers={"mtime": "-1.5"}),
    )
    seen = snapshot_of(layers.mount(key))
    assert seen[b"d"].mode == stat.S_IFDIR | 0o2750
    assert (seen[b"d/file"].uid, seen[b"d/file"].gid) == (5, 6)
    assert seen[b"d/file"].mode == stat.S_IFREG | 0o4711
    assert seen[b"d/file"].content == big
    assert seen[b"d/file"].mtime_ns == 1_234_567_123_456_789
    assert seen[b"d/file"].links == seen[b"second"].links == 2
    assert seen[b"link"].content == b"../../etc/passwd"
    assert stat.S_ISFIFO(seen[b"fifo"].mode)
    assert seen[b"null"].rdev == os.makedev(1, 3)
    assert dict(seen[b"marked"].xattrs) == {
        "user.k": b"\x00\xff",
        "security.capability": CAPABILITY,
    }
    assert seen[b"old"].mtime_ns == -1_500_000_000
    assert seen[b"d"].mtime_ns == 1_000_000 * 10**9


def test_l7_everything_passes_through_mount_and_diff(layers: LayerBench) -> None:
    key, root = layers.child(None)
    (root / "d").mkdir(0o700)
    (root / "d" / "f").write_bytes(os.urandom(70_000))
    os.link(root / "d" / "f", root / "second")
    (root / "s").symlink_to(os.fsdecode(b"\xff broken"))
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (root / "cap").write_text("x")
    os.setxattr(root / "cap", "security.capability", CAPABILITY)
    os.setxattr(root / "cap", "user.bin", b"\x00\n=\xff")
    (root / "owned").write_text("x")
    os.chown(root / "owned", 70_000, 80_000)
    (root / "owned").chmod(0o6755)
    os.utime(root / "owned", ns=(5, -5))
    before = snapshot_of(root)
    data = layers.diff(key)
    again = layers.key()
    layers.driver.apply(again, None, io.BytesIO(data))
    after = snapshot_of(layers.mount(again))
    assert {p: n for p, n in after.items() if p} == {p: n for p, n in before.items() if p}


@pytest.mark.parametrize(
    "name",
    [
        b"a\nb",
        b"\xff\xfe",
        b"-rf",
        b" ",
        b"n" * 255,
        "é".encode(),
        "e\u0301".encode(),
        b"..x",
        b"c:d",
    ],
)
def test_l7_odd_names_pass_through(layers: LayerBench, name: bytes) -> None:
    key, root = layers.child(None)
    (root / os.fsdecode(name)).write_text("odd")
    again = layers.key()
    layers.driver.apply(again, None, io.BytesIO(layers.diff(key)))
    assert [os.fsencode(n) for n in os.listdir(layers.mount(again))] == [name]


def test_l7_a_path_longer_than_path_max_passes_through(layers: LayerBench) -> None:
    depth = 25
    parts = [f"{level:03}".ljust(200, "x") for level in range(depth)]
    members = [folder("/".join(parts[: level + 1])) for level in range(depth)]
    key = layers.base(*members, file("/".join([*parts, "end"]), b"deep"))
    seen = snapshot_of(layers.mount(key))
    assert seen["/".join([*parts, "end"]).encode()].content == b"deep"
    child, _ = layers.child(key)
    assert layers.diff(child)


def test_l7_holes_are_kept(layers: LayerBench) -> None:
    key, root = layers.child(None)
    with open(root / "sparse", "wb") as sparse:
        sparse.truncate(30 << 20)
        sparse.seek(10 << 20)
        sparse.write(b"data")
    again = layers.key()
    layers.driver.apply(again, None, io.BytesIO(layers.diff(key)))
    os.sync()
    status = (layers.mount(again) / "sparse").stat()
    assert status.st_size == 30 << 20
    assert status.st_blocks * 512 < 1 << 20


def test_l7_hard_links_stay_links_in_a_child(layers: LayerBench) -> None:
    base = layers.base(file("one", b"shared"), hardlink("two", "one"))
    key = layers.key()
    layers.driver.apply(key, base, tar(hardlink("three", "two")))
    root = layers.mount(key)
    assert (root / "three").read_bytes() == b"shared"


def test_l7_the_diff_id_is_the_hash_of_the_tar(layers: LayerBench) -> None:
    data = tar(file("f", b"content")).getvalue()
    applied = layers.driver.apply(layers.key(), None, io.BytesIO(data))
    assert applied.diff_id == "sha256:" + hashlib.sha256(data).hexdigest()
    assert applied.size == 7


def test_l7_metadata_of_a_parent_folder_comes_from_below(layers: LayerBench) -> None:
    base = layers.base(folder("srv", 0o2770, uid=11, gid=12), file("srv/a"))
    key = layers.key()
    layers.driver.apply(key, base, tar(file("srv/b")))
    status = (layers.mount(key) / "srv").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o2770, 11, 12)


# ---- whiteouts


def test_l8_a_whiteout_hides_a_file(layers: LayerBench) -> None:
    base = layers.base(file("gone"), file("kept"))
    key = layers.key()
    layers.driver.apply(key, base, tar(file(".wh.gone", b"")))
    assert os.listdir(layers.mount(key)) == ["kept"]


def test_l8_a_whiteout_hides_a_folder_with_all_in_it(layers: LayerBench) -> None:
    base = layers.base(folder("d"), file("d/f"), file("kept"))
    key = layers.key()
    layers.driver.apply(key, base, tar(file(".wh.d", b"")))
    assert os.listdir(layers.mount(key)) == ["kept"]


def test_l8_a_whiteout_of_nothing_does_no_harm(layers: LayerBench) -> None:
    base = layers.base(file("kept"))
    key = layers.key()
    layers.driver.apply(key, base, tar(file(".wh.never", b""), file("d/.wh.never", b"")))
    assert sorted(os.listdir(layers.mount(key))) == ["d", "kept"]


def test_l8_a_whiteout_in_a_first_layer_shows_nothing(layers: LayerBench) -> None:
    key = layers.base(file("f"), file(".wh.x", b""), folder("d"), file("d/.wh..wh..opq", b""))
    root = layers.mount(key)
    assert sorted(os.listdir(root)) == ["d", "f"]
    assert os.listdir(root / "d") == []


def test_l8_opaque_hides_only_what_is_below(layers: LayerBench) -> None:
    base = layers.base(folder("d"), file("d/old"), folder("d/sub"), file("d/sub/old"))
    for members in (
        (folder("d"), file("d/.wh..wh..opq", b""), file("d/new"), file("d/sub/new")),
        (folder("d"), file("d/new"), file("d/sub/new"), file("d/.wh..wh..opq", b"")),
    ):
        key = layers.key()
        layers.driver.apply(key, base, tar(*members))
        root = layers.mount(key)
        assert sorted(os.listdir(root / "d")) == ["new", "sub"]
        assert os.listdir(root / "d" / "sub") == ["new"]


def test_l8_a_whiteout_and_a_new_entry_of_one_name(layers: LayerBench) -> None:
    base = layers.base(folder("d"), file("d/old"))
    for members in (
        (file(".wh.d", b""), folder("d"), file("d/new")),
        (folder("d"), file("d/new"), file(".wh.d", b"")),
        (file(".wh.d", b""), file("d/new")),
    ):
        key = layers.key()
        layers.driver.apply(key, base, tar(*members))
        assert os.listdir(layers.mount(key) / "d") == ["new"]


@pytest.mark.parametrize("name", [".wh..wh.x", ".wh.", "d/.wh..wh..wh.f", ".wh..", ".wh..."])
def test_l8_a_name_that_looks_like_a_whiteout_is_refused(layers: LayerBench, name: str) -> None:
    with pytest.raises(InvalidArgument):
        layers.driver.apply(layers.key(), None, tar(file(name, b"")))


def test_l8_a_deleted_file_is_a_whiteout_in_the_diff(layers: LayerBench) -> None:
    base = layers.base(folder("d"), file("d/gone"), file("d/kept"))
    key, root = layers.child(base)
    (root / "d" / "gone").unlink()
    assert "d/.wh.gone" in names(layers.diff(key))
    assert [c.path for c in layers.driver.changes(key) if c.kind is ChangeKind.REMOVED] == [
        b"d/gone"
    ]


def test_l8_a_deleted_folder_is_one_whiteout(layers: LayerBench) -> None:
    base = layers.base(folder("d"), folder("d/e"), file("d/e/f"))
    key, root = layers.child(base)
    (root / "d" / "e" / "f").unlink()
    (root / "d" / "e").rmdir()
    (root / "d").rmdir()
    assert [n for n in names(layers.diff(key)) if ".wh." in n] == [".wh.d"]


def _without_foo(layers: LayerBench, key: str) -> None:
    root = layers.mount(key)
    assert os.listdir(root / "d1") == ["d2"]
    assert os.listdir(root / "d1" / "d2") == []


def test_l8_a_folder_deleted_and_made_again_over_three_layers(layers: LayerBench) -> None:
    """Case A26."""
    first = layers.base(folder("d1"), folder("d1/d2"), file("d1/d2/foo"))
    second, root = layers.child(first)
    (root / "d1" / "d2" / "foo").unlink()
    (root / "d1" / "d2").rmdir()
    (root / "d1").rmdir()
    layers.commit(second)
    third, root = layers.child(second)
    os.makedirs(root / "d1" / "d2")
    layers.commit(third)
    _without_foo(layers, third)
    # and by way of tars, as commit, save and load do
    loaded = [first]
    for key in (second, third):
        loaded.append(layers.key())
        layers.driver.apply(loaded[-1], loaded[-2], io.BytesIO(layers.diff(key)))
    _without_foo(layers, loaded[-1])


def test_l8_a_folder_deleted_and_made_again_in_one_layer(layers: LayerBench) -> None:
    """Case A26, layers two and three merged."""
    first = layers.base(folder("d1"), folder("d1/d2"), file("d1/d2/foo"), file("d1/bar"))
    merged, root = layers.child(first)
    (root / "d1" / "d2" / "foo").unlink()
    (root / "d1" / "d2").rmdir()
    (root / "d1" / "bar").unlink()
    (root / "d1").rmdir()
    os.makedirs(root / "d1" / "d2")
    removed = {c.path for c in layers.driver.changes(merged) if c.kind is ChangeKind.REMOVED}
    assert removed == {b"d1/bar", b"d1/d2/foo"}
    data = layers.diff(merged)
    layers.commit(merged)
    _without_foo(layers, merged)
    again = layers.key()
    layers.driver.apply(again, first, io.BytesIO(data))
    _without_foo(layers, again)


def test_renaming_a_folder_of_a_lower_layer(layers: LayerBench) -> None:
    """Case A27."""
    base = layers.base(
        folder("opt"),
        folder("opt/dir", 0o750, uid=3),
        file("opt/dir/f", b"content", pax_headers=pax(user__k=b"v")),
        hardlink("opt/dir/g", "opt/dir/f"),
    )
    key, root = layers.child(base)
    try:
        os.rename(root / "opt" / "dir", root / "opt" / "dir2")
        assert layers.driver.capabilities.directory_rename
    except OSError as refused:
        assert refused.errno == 18  # EXDEV, as the capabilities say; mv(1) copies then
        assert not layers.driver.capabilities.directory_rename
        assert os.system(f"mv {root}/opt/dir {root}/opt/dir2") == 0
    data = layers.diff(key)
    layers.commit(key)
    again = layers.key()
    layers.driver.apply(again, base, io.BytesIO(data))
    for made in (key, again):
        seen = snapshot_of(layers.mount(made))
        assert b"opt/dir" not in seen
        assert seen[b"opt/dir2"].uid == 3
        assert seen[b"opt/dir2/f"].content == b"content"
        assert dict(seen[b"opt/dir2/f"].xattrs) == {"user.k": b"v"}
        assert seen[b"opt/dir2/g"].links == 2


def test_a_renamed_folder_is_changed_again(layers: LayerBench) -> None:
    base = layers.base(folder("a"), file("a/one"), file("a/two"), folder("a/sub"), file("a/sub/x"))
    key, root = layers.child(base)
    if not layers.driver.capabilities.directory_rename:
        return
    os.rename(root / "a", root / "b")
    (root / "b" / "one").unlink()
    (root / "b" / "two").write_text("changed")
    os.rename(root / "b" / "sub", root / "sub")
    want = {p: n.content for p, n in snapshot_of(root).items()}
    again = layers.key()
    layers.driver.apply(again, base, io.BytesIO(layers.diff(key)))
    assert {p: n.content for p, n in snapshot_of(layers.mount(again)).items()} == want


def test_a_file_becomes_a_folder_and_the_reverse(layers: LayerBench) -> None:
    base = layers.base(file("f"), folder("d"), file("d/inner"), folder("d/e"), file("d/e/x"))
    key, root = layers.child(base)
    (root / "f").unlink()
    (root / "f").mkdir()
    (root / "f" / "new").write_text("n")
    (root / "d" / "inner").unlink()
    (root / "d" / "e" / "x").unlink()
    (root / "d" / "e").rmdir()
    (root / "d").rmdir()
    (root / "d").write_text("now a file")
    again = layers.key()
    layers.driver.apply(again, base, io.BytesIO(layers.diff(key)))
    seen = layers.mount(again)
    assert (seen / "f" / "new").read_text() == "n"
    assert (seen / "d").read_text() == "now a file"


# ---- diff and changes


def test_an_untouched_layer_has_no_changes(layers: LayerBench) -> None:
    key, root = layers.child(layers.base(folder("d"), file("d/f")))
    (root / "d" / "f").read_text()
    assert list(layers.driver.changes(key)) == []
    assert names(layers.diff(key)) == []


def test_changes_tell_added_modified_and_removed(layers: LayerBench) -> None:
    base = layers.base(folder("d"), file("d/changed"), file("d/gone"), file("same"))
    key, root = layers.child(base)
    (root / "d" / "changed").write_text("different")
    (root / "d" / "gone").unlink()
    (root / "d" / "new").write_text("n")
    found = {c.path: c.kind for c in layers.driver.changes(key)}
    assert found[b"d/changed"] is ChangeKind.MODIFIED
    assert found[b"d/gone"] is ChangeKind.REMOVED
    assert found[b"d/new"] is ChangeKind.ADDED
    assert found[b"d"] is ChangeKind.MODIFIED
    assert b"same" not in found


def test_changes_are_sorted_by_path(layers: LayerBench) -> None:
    key, root = layers.child(None)
    for name in ("a-b", "a", "b", "a.c"):
        (root / name).mkdir()
        (root / name / "x").touch()
    paths = [c.path for c in layers.driver.changes(key)]
    assert paths == sorted(paths)


@pytest.mark.parametrize("at", [0, 5])
def test_a_file_of_the_parent_written_in_place(layers: LayerBench, at: int) -> None:
    """Nothing but its bytes tells of that, and those may still be in memory."""
    for number in range(8):
        parent = layers.base(file("f", b"12345"), folder("d"), file("d/g", b"12345"))
        key, root = layers.child(parent)
        for path in ("f", "d/g"):
            with (root / path).open("r+b") as written:
                written.seek(at)
                written.write(b"%d new" % number)
        found = {change.path: change.kind for change in layers.driver.changes(key)}
        assert found[b"f"] is found[b"d/g"] is ChangeKind.MODIFIED
        whole = b"12345"[:at] + b"%d new" % number
        with tarfile.open(fileobj=io.BytesIO(layers.diff(key))) as read:
            for path in ("f", "d/g"):
                inside = read.extractfile(path)
                assert inside is not None
                assert inside.read() == whole


def test_a_change_of_mode_alone_is_in_the_diff(layers: LayerBench) -> None:
    key, root = layers.child(layers.base(file("f", b"content")))
    (root / "f").chmod(0o700)
    again = layers.key()
    layers.driver.apply(again, None, io.BytesIO(layers.diff(key)))
    copied = layers.mount(again) / "f"
    assert copied.stat().st_mode & 0o7777 == 0o700
    assert copied.read_bytes() == b"content"


def test_a_diff_can_be_taken_of_a_committed_layer(layers: LayerBench) -> None:
    key, root = layers.child(layers.base(file("f")))
    (root / "g").write_text("y")
    before = layers.diff(key)
    layers.commit(key)
    assert layers.diff(key) == before
    assert names(before) == ["g"]


def test_a_diff_that_is_not_read_to_its_end_can_be_closed(layers: LayerBench) -> None:
    key, root = layers.child(None)
    (root / "big").write_bytes(os.urandom(3 << 20))
    with layers.driver.diff(key) as stream:
        assert len(stream.read(1000)) == 1000
    layers.unmount(key)
    layers.driver.remove(key)


def test_stacking_metadata_never_shows_in_a_diff(layers: LayerBench) -> None:
    base = layers.base(folder("d"), file("d/f"))
    key, root = layers.child(base)
    (root / "d" / "f").write_text("up")
    with tarfile.open(fileobj=io.BytesIO(layers.diff(key))) as read:
        for member in read:
            assert not [k for k in member.pax_headers if "overlay" in k or "lazarette" in k]


# ---- hostile tars


@pytest.mark.parametrize(
    "name", ["../escape", "d/../../escape", "/../escape", "./../escape", "a/b/../../../escape"]
)
def test_l9_dotdot_is_refused(layers: LayerBench, name: str) -> None:
    key = layers.key()
    with pytest.raises(InvalidArgument):
        layers.driver.apply(key, None, tar(file(name)))
    assert not layers.driver.exists(key)


def test_l9_an_absolute_name_stays_inside(layers: LayerBench) -> None:
    key = layers.base(file("/tmp/laz-absolute-name"))
    assert (layers.mount(key) / "tmp" / "laz-absolute-name").exists()
    assert not os.path.exists("/tmp/laz-absolute-name")


def test_l9_a_symlinked_parent_resolves_inside(layers: LayerBench, tmp_path: object) -> None:
    outside = f"{tmp_path}/target"
    os.mkdir(outside)
    key = layers.base(symlink("evil", outside), file("evil/f"))
    assert os.listdir(outside) == []
    assert (layers.mount(key) / outside.lstrip("/") / "f").read_text() == "x"


def test_l9_a_relative_symlinked_parent_cannot_leave(layers: LayerBench) -> None:
    key = layers.base(folder("a"), symlink("a/up", "../../../../.."), file("a/up/here"))
    assert (layers.mount(key) / "here").read_text() == "x"


def test_l9_a_symlink_of_the_parent_layer_is_followed_inside(layers: LayerBench) -> None:
    base = layers.base(folder("usr"), folder("usr/lib"), symlink("lib", "usr/lib"))
    key = layers.key()
    layers.driver.apply(key, base, tar(file("lib/new.so")))
    root = layers.mount(key)
    assert (root / "lib").is_symlink()
    assert (root / "usr" / "lib" / "new.so").read_text() == "x"


def test_l9_a_loop_of_symlinks_is_refused(layers: LayerBench) -> None:
    with pytest.raises(InvalidArgument):
        layers.driver.apply(
            layers.key(), None, tar(symlink("a", "b"), symlink("b", "a"), file("a/f"))
        )


def test_l9_a_hard_link_cannot_reach_outside(layers: LayerBench) -> None:
    for target in ("../../../../etc/passwd", "/etc/passwd", "missing"):
        with pytest.raises(InvalidArgument):
            layers.driver.apply(layers.key(), None, tar(hardlink("stolen", target)))


def test_l9_a_hard_link_through_a_symlink_cannot_reach_outside(layers: LayerBench) -> None:
    with pytest.raises(InvalidArgument):
        layers.driver.apply(
            layers.key(), None, tar(symlink("etc", "/etc"), hardlink("stolen", "etc/passwd"))
        )


def test_l9_a_file_over_a_symlink_replaces_the_link(layers: LayerBench, tmp_path: object) -> None:
    victim = f"{tmp_path}/victim"
    with open(victim, "w") as made:
        made.write("safe")
    key = layers.base(symlink("f", victim), file("f", b"new"))
    with open(victim) as kept:
        assert kept.read() == "safe"
    assert (layers.mount(key) / "f").read_bytes() == b"new"
    assert not (layers.mount(key) / "f").is_symlink()


def test_l9_a_whiteout_cannot_reach_through_a_symlink(layers: LayerBench, tmp_path: object) -> None:
    victim = f"{tmp_path}/victim"
    with open(victim, "w") as made:
        made.write("safe")
    layers.base(symlink("evil", str(tmp_path)), file("evil/.wh.victim", b""))
    assert os.path.exists(victim)


def test_l9_a_hand_made_whiteout_device_is_refused(layers: LayerBench) -> None:
    with pytest.raises(InvalidArgument):
        layers.driver.apply(
            layers.key(), None, tar(entry("x", tarfile.CHRTYPE, devmajor=0, devminor=0))
        )


def test_l9_stacking_xattrs_in_a_tar_are_left_out(layers: LayerBench) -> None:
    base = layers.base(folder("secret"), file("secret/f"))
    key = layers.key()
    evil = folder("d", pax_headers=pax(trusted__overlay__redirect=b"/secret"))
    layers.driver.apply(key, base, tar(evil))
    assert os.listdir(layers.mount(key) / "d") == []


def test_l9_an_entry_twice_keeps_the_last(layers: LayerBench) -> None:
    key = layers.base(file("f", b"one"), file("f", b"two"))
    assert (layers.mount(key) / "f").read_bytes() == b"two"


def test_l9_a_folder_over_a_file_of_the_same_tar(layers: LayerBench) -> None:
    key = layers.base(file("x"), folder("x"), file("x/inner"))
    assert (layers.mount(key) / "x" / "inner").read_text() == "x"

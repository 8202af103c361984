"""The union through a real mount."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.unions import Union, kill_mount, prepare, serving

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def union(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Union]:
    """A union over two lower layers, not yet mounted."""
    yield prepare(tmp_path, lowers=2)


def test_merges_layers_and_copies_up(union: Union) -> None:
    (union.lower(0) / "a").write_text("top")
    (union.lower(1) / "a").write_text("bottom")
    (union.lower(1) / "b").write_text("below")
    with serving(union):
        assert (union.root / "a").read_text() == "top"
        before = (union.root / "b").stat().st_ino
        with (union.root / "b").open("a") as stream:
            stream.write(" more")
        assert (union.root / "b").read_text() == "below more"
        assert (union.root / "b").stat().st_ino == before
        assert (union.lower(1) / "b").read_text() == "below"
        union.remount()
        assert (union.root / "b").stat().st_ino == before
        assert (union.root / "b").read_text() == "below more"


def test_directory_deleted_and_made_again_is_empty(union: Union) -> None:
    deep = union.lower(1) / "d1" / "d2"
    deep.mkdir(parents=True)
    (deep / "foo").write_text("x")
    with serving(union):
        (union.root / "d1/d2/foo").unlink()
        (union.root / "d1/d2").rmdir()
        (union.root / "d1").rmdir()
        assert not (union.root / "d1").exists()
        (union.root / "d1/d2").mkdir(parents=True)
        assert list((union.root / "d1/d2").iterdir()) == []
        union.remount()
        assert [path.name for path in (union.root / "d1").iterdir()] == ["d2"]
        assert list((union.root / "d1/d2").iterdir()) == []


def test_rename_of_lower_folder_is_refused_with_exdev(union: Union) -> None:
    (union.lower(1) / "dir").mkdir()
    with serving(union):
        with pytest.raises(OSError) as caught:
            os.rename(union.root / "dir", union.root / "dir2")
        assert caught.value.errno == errno.EXDEV
        assert (union.root / "dir").is_dir()
        (union.root / "new").mkdir()
        (union.root / "new").rename(union.root / "new2")
        assert (union.root / "new2").is_dir()


def test_hard_link_survives_copy_up(union: Union) -> None:
    (union.lower(0) / "one").write_text("same")
    os.link(union.lower(0) / "one", union.lower(0) / "two")
    with serving(union):
        (union.root / "one").write_text("changed")
        assert (union.root / "two").read_text() == "changed"
        assert os.path.samefile(union.root / "one", union.root / "two")
        assert (union.root / "two").stat().st_nlink == 2
        (union.root / "one").unlink()
        assert (union.root / "two").stat().st_nlink == 1
        union.remount()
        assert (union.root / "two").read_text() == "changed"
        (union.root / "two").unlink()
        assert os.listdir(union.base / "work" / "links") == []


def test_reader_of_lower_file_does_not_block_writers(union: Union) -> None:
    (union.lower(0) / "f").write_text("old")
    with serving(union):
        with (union.root / "f").open() as reader:
            before = os.fstat(reader.fileno()).st_ino
            (union.root / "f").write_text("new text")
            assert reader.read() == "old"
            assert (union.root / "f").read_text() == "new text"
            assert (union.root / "f").stat().st_ino == before
            os.fchmod(reader.fileno(), 0o600)
        assert (union.root / "f").stat().st_mode & 0o777 == 0o600


def test_unlinked_open_file_keeps_working(union: Union) -> None:
    (union.lower(0) / "f").write_text("lower")
    with serving(union):
        with (union.root / "f").open("r+") as stream:
            (union.root / "f").unlink()
            stream.write("LOW")
            stream.flush()
            os.fchmod(stream.fileno(), 0o640)
            os.ftruncate(stream.fileno(), 4)
            os.fsync(stream.fileno())
            st = os.fstat(stream.fileno())
            assert (st.st_nlink, st.st_size, st.st_mode & 0o777) == (0, 4, 0o640)
            stream.seek(0)
            assert stream.read() == "LOWe"
        assert os.listdir(union.root) == []


def test_temporary_file_gets_a_name(union: Union) -> None:
    with serving(union):
        fd = os.open(union.root, os.O_TMPFILE | os.O_RDWR, 0o644)
        try:
            os.write(fd, b"data")
            os.link(
                f"/proc/self/fd/{fd}", union.root / "named", src_dir_fd=fd, follow_symlinks=True
            )
        finally:
            os.close(fd)
        assert (union.root / "named").read_bytes() == b"data"


def test_server_outlives_caller_and_is_adopted(union: Union) -> None:
    with serving(union):
        pid = union.mounted.status().pid
        assert union.mounted.ensure()
        assert union.mounted.status().pid == pid
        kill_mount(union.mounted)
        assert not union.mounted.alive()
        with pytest.raises(OSError) as caught:
            os.listdir(union.root)
        assert caught.value.errno == errno.ENOTCONN
        assert not union.mounted.ensure()
        assert union.mounted.alive()
        assert os.listdir(union.root) == []


def test_reserved_names_are_refused_when_asked(tmp_path: Path) -> None:
    union = prepare(tmp_path, reserve_wh=True)
    with serving(union):
        with pytest.raises(OSError) as caught:
            (union.root / ".wh.x").mkdir()
        assert caught.value.errno == errno.EINVAL


def overlay(lower: Path, upper: Path, work: Path, target: Path) -> None:
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "test", str(target)], check=True)


def test_kernel_overlay_reads_what_the_union_wrote_and_the_reverse(union: Union) -> None:
    for name in ("gone", "kept", "changed"):
        (union.lower(1) / name).write_text(name)
    (union.lower(0) / "d").mkdir()
    (union.lower(0) / "d" / "hidden").write_text("x")
    with serving(union):
        (union.root / "gone").unlink()
        (union.root / "changed").write_text("new")
        shutil.rmtree(union.root / "d")
        (union.root / "d").mkdir()
        (union.root / "d" / "fresh").write_text("y")
    lowers = Path(":".join(union.spec.lowers))
    (union.base / "kernel-work").mkdir()
    overlay(lowers, union.upper, union.base / "kernel-work", union.root)
    try:
        assert sorted(os.listdir(union.root)) == ["changed", "d", "kept"]
        assert (union.root / "changed").read_text() == "new"
        assert os.listdir(union.root / "d") == ["fresh"]
        (union.root / "kept").unlink()
        (union.root / "d" / "fresh").rename(union.root / "moved")
        (union.root / "gone").mkdir()
    finally:
        subprocess.run(["umount", str(union.root)], check=True)
    with serving(union):
        assert sorted(os.listdir(union.root)) == ["changed", "d", "gone", "moved"]
        assert os.listdir(union.root / "d") == []
        assert (union.root / "moved").read_text() == "y"
        assert os.listdir(union.root / "gone") == []


def test_kernel_overlay_stacks_on_the_union(union: Union) -> None:
    (union.lower(0) / "seed").write_text("s")
    with serving(union):
        parts = [union.root / name for name in ("lower", "upper", "work", "merged")]
        for part in parts:
            part.mkdir()
        (parts[0] / "a").write_text("a")
        (parts[0] / "d").mkdir()
        (parts[0] / "d" / "b").write_text("b")
        for again in range(2):
            overlay(parts[0], parts[1], parts[2], parts[3])
            try:
                if not again:
                    (parts[3] / "a").unlink()
                    shutil.rmtree(parts[3] / "d")
                    (parts[3] / "d").mkdir()
                    (parts[3] / "new").write_text("n")
                assert sorted(os.listdir(parts[3])) == ["d", "new"]
                assert os.listdir(parts[3] / "d") == []
            finally:
                subprocess.run(["umount", str(parts[3])], check=True)
            st = (parts[1] / "a").lstat()
            assert stat.S_ISCHR(st.st_mode) and st.st_rdev == 0
            union.remount()


def test_setuid_and_capabilities_are_dropped_on_write(union: Union) -> None:
    for name in ("suid", "cap"):
        (union.lower(0) / name).write_text("x")
    os.chmod(union.lower(0) / "suid", 0o6777)
    os.chmod(union.lower(0) / "cap", 0o666)
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(union.lower(0) / "cap", "security.capability", capability)
    os.chmod(union.base, 0o755)
    script = "import os; os.setuid(1234); open('{}', 'a').write('y')"
    with serving(union):
        for name in ("suid", "cap"):
            assert os.stat(union.root / name)
            command = [sys.executable, "-S", "-E", "-c", script.format(name)]
            subprocess.run(command, check=True, cwd=union.root)
            assert (union.root / name).read_text() == "xy"
        assert (union.root / "suid").stat().st_mode & 0o7777 == 0o777
        assert os.listxattr(union.root / "cap") == []


def test_acl_is_inherited_and_checked(union: Union) -> None:
    with serving(union):
        (union.root / "d").mkdir()
        setfacl = ["setfacl", "-m", "d:u:1234:rwx,u:1234:rwx", str(union.root / "d")]
        subprocess.run(setfacl, check=True)
        previous = os.umask(0o077)
        try:
            (union.root / "d" / "f").write_text("x")
        finally:
            os.umask(previous)
        done = subprocess.run(
            ["getfacl", "-cp", str(union.root / "d" / "f")], capture_output=True, check=True
        )
        assert b"user:1234:rwx" in done.stdout and b"mask::rw-" in done.stdout


def test_paths_longer_than_path_max(union: Union) -> None:
    deep = union.lower(0)
    name = "n" * 200
    fds = [os.open(deep, os.O_RDONLY)]
    for _ in range(30):
        os.mkdir(name, dir_fd=fds[-1])
        fds.append(os.open(name, os.O_RDONLY, dir_fd=fds[-1]))
    with os.fdopen(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fds[-1]), "w") as stream:
        stream.write("leaf")
    for fd in fds:
        os.close(fd)
    with serving(union):
        fds = [os.open(union.root, os.O_RDONLY)]
        for _ in range(30):
            fds.append(os.open(name, os.O_RDONLY, dir_fd=fds[-1]))
        with os.fdopen(os.open("leaf", os.O_RDWR | os.O_APPEND, dir_fd=fds[-1]), "r+") as stream:
            stream.write("+")
            stream.flush()
            stream.seek(0)
            assert stream.read() == "leaf+"
        os.rename("leaf", "leaf2", src_dir_fd=fds[-1], dst_dir_fd=fds[-1])
        assert os.listdir(fds[-1]) == ["leaf2"]
        for fd in fds:
            os.close(fd)


def test_listing_stays_while_entries_come_and_go(union: Union) -> None:
    for number in range(3000):
        (union.lower(number % 2) / f"f{number:04}").touch()
    with serving(union):
        seen = []
        with os.scandir(union.root) as entries:
            for entry in entries:
                seen.append(entry.name)
                if len(seen) % 3 == 0:
                    os.unlink(union.root / entry.name)
                if len(seen) % 5 == 0:
                    (union.root / f"new{len(seen)}").touch()
        old = [name for name in seen if name.startswith("f")]
        assert sorted(old) == [f"f{number:04}" for number in range(3000)]
        assert len(seen) == len(set(seen))


def test_folder_of_a_lower_layer_is_renamed_with_redirect(tmp_path: Path) -> None:
    union = prepare(tmp_path, lowers=2, redirect=True)
    (union.lower(1) / "d" / "e").mkdir(parents=True)
    (union.lower(1) / "d" / "e" / "f").write_text("f")
    (union.lower(0) / "d").mkdir()
    (union.lower(0) / "d" / "g").write_text("g")
    with serving(union):
        number = (union.root / "d").stat().st_ino
        (union.root / "new").mkdir()
        (union.root / "d").rename(union.root / "new" / "moved")
        for _ in range(2):
            assert os.listdir(union.root) == ["new"]
            moved = union.root / "new" / "moved"
            assert sorted(os.listdir(moved)) == ["e", "g"]
            assert (moved / "e" / "f").read_text() == "f"
            assert moved.stat().st_ino == number
            union.remount()


def test_a_lower_file_with_several_names_tells_how_many_are_left(union: Union) -> None:
    for name in ("a", "b", "c"):
        if name == "a":
            (union.lower() / name).write_text("below")
        else:
            (union.lower() / name).hardlink_to(union.lower() / "a")
    with serving(union):
        (union.root / "a").unlink()
        assert (union.root / "b").stat().st_nlink == 2
        (union.root / "new").write_text("above")
        (union.root / "new").replace(union.root / "b")
        assert (union.root / "c").stat().st_nlink == 1
    with serving(union):
        assert (union.root / "c").stat().st_nlink == 1
        assert (union.root / "c").read_text() == "below"

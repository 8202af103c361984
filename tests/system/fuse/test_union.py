"""The union through a real mount."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.unions import Union, kill, prepare, serving

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
        kill(pid)
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

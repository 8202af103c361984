"""The C module does what its Python versions do."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from lazarette.storage import beneath, copying, mounts, native

CopyFiles = Callable[[int, int, Iterable[bytes], bool], list[bytes]]


def test_the_c_module_is_built() -> None:
    assert native.scan is not native.scan_plain, "run scripts/setup"


# ---- listings


def _fill(folder: Path) -> None:
    for number in range(300):
        (folder / f"file{number}").touch()
    (folder / "\udcff odd\n").mkdir()
    (folder / ("n" * 255)).symlink_to("nowhere")
    os.link(folder / "file0", folder / "other")
    os.mkfifo(folder / "pipe")


def test_a_listing_has_all_entries_with_what_lstat_says(tmp_path: Path) -> None:
    _fill(tmp_path)
    with beneath.opened(tmp_path) as folder:
        listing = native.scan(folder)
        assert listing == native.scan(folder) == native.scan_plain(folder)
        records = native.split(listing)
        assert records == native.split_plain(listing)
        assert sorted(records) == beneath.names(folder)
        for name, packed in records.items():
            status, record = (
                os.stat(name, dir_fd=folder, follow_symlinks=False),
                native.record(packed),
            )
            assert record.key == (status.st_dev, status.st_ino)
            assert record.ctime_ns == status.st_ctime_ns
            assert (record.mode, record.links) == (status.st_mode, status.st_nlink)
            assert record.name == len(name)
    assert b"".join(packed + name for name, packed in records.items()) == listing


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "file7").write_text("x"),
        lambda folder: (folder / "file7").rename(folder / "file8"),
        lambda folder: (folder / "file7").chmod(0o600),
        lambda folder: os.link(folder / "file7", folder / "new"),
        lambda folder: (folder / "\udcff odd\n").rmdir(),
    ],
)
def test_any_change_changes_the_listing(tmp_path: Path, change: Callable[[Path], object]) -> None:
    _fill(tmp_path)
    os.utime(tmp_path / "file7", ns=(1, 2))
    with beneath.opened(tmp_path) as folder:
        before = native.scan(folder)
        change(tmp_path)
        assert native.scan(folder) != before


def test_the_listings_of_a_tree_are_those_of_its_folders(tmp_path: Path) -> None:
    _fill(tmp_path)
    deep = tmp_path / "a/\udcff odd\n/c"
    deep.mkdir(parents=True)
    _fill(deep)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "mounted").mkdir()
    mounts.mount("tmpfs", tmp_path / "mounted", [])
    try:
        with beneath.opened(tmp_path) as folder:
            found = native.scan_tree(folder)
            assert found == native.scan_tree_plain(folder)
            wanted = {
                entry.path
                for entry in beneath.walk(folder)
                if entry.is_folder and not entry.mount_point
            }
            assert found.keys() == wanted
            for path, listing in found.items():
                with beneath.opened(os.fsencode(tmp_path) + b"/" + path) as one:
                    assert listing == native.scan(one)
    finally:
        mounts.unmount(tmp_path / "mounted")
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.scan_tree(-7)


def test_very_deep_folders_are_left_out(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    with beneath.opened(tmp_path) as folder:
        found = native.scan_tree(folder)
        assert found.keys() == native.scan_tree_plain(folder).keys()
    assert 400 < len(found) < 600
    beneath.remove_path(tmp_path / "d")


def test_an_empty_folder_has_an_empty_listing(tmp_path: Path) -> None:
    with beneath.opened(tmp_path) as folder:
        assert native.scan(folder) == native.scan_plain(folder) == b""
    assert native.split(b"") == native.split_plain(b"") == {}


@pytest.mark.parametrize("split", [native.split, native.split_plain])
def test_half_a_listing_is_refused(
    tmp_path: Path, split: Callable[[bytes], dict[bytes, bytes]]
) -> None:
    (tmp_path / "name").touch()
    with beneath.opened(tmp_path) as folder:
        listing = native.scan(folder)
    for length in range(1, len(listing)):
        with pytest.raises(ValueError, match="middle of an entry"):
            split(listing[:length])


def test_what_is_no_folder_has_no_listing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for scan in (native.scan, native.scan_plain):
        with open(tmp_path / "file") as file, pytest.raises(NotADirectoryError):
            scan(file.fileno())
        with pytest.raises(OSError, match="Bad file descriptor"):
            scan(-7)


# ---- copies


@pytest.fixture(params=["c", "python"])
def copy_files(request: pytest.FixtureRequest) -> CopyFiles:
    return native.copy_files if request.param == "c" else native.copy_files_plain


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    yield source, target


def _copy(
    copy_files: CopyFiles, folders: tuple[Path, Path], *names: str, again: bool = False
) -> list[str]:
    with beneath.opened(folders[0]) as source, beneath.opened(folders[1]) as target:
        left = copy_files(source, target, [os.fsencode(name) for name in names], again)
    return [os.fsdecode(name) for name in left]


def _described(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    return (
        *(status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_atime_ns),
        path.read_bytes(),
    )


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o4755, 0o000, 0o1777])
@pytest.mark.parametrize("content", [b"", b"x", b"x" * 200_000])
def test_plain_files_are_copied(
    copy_files: CopyFiles, folders: tuple[Path, Path], content: bytes, mode: int
) -> None:
    for name in ("\udcff odd\n", "second"):
        path = folders[0] / name
        path.write_bytes(content)
        os.chown(path, 12, 34)
        path.chmod(mode)
        os.utime(path, ns=(-1_500_000_001, 2**40 * 10**6 + 7))
    wanted = (stat.S_IFREG | mode, 12, 34, 2**40 * 10**6 + 7, -1_500_000_001, content)
    assert _copy(copy_files, folders, "\udcff odd\n", "second") == []
    for name in ("\udcff odd\n", "second"):
        assert _described(folders[1] / name) == wanted


def _acl(*entries: tuple[int, int]) -> bytes:
    """An ACL as xattrs have it, of tags and permissions; a named user is number 99."""
    packed = (struct.pack("<HHi", tag, may, 99 if tag == 2 else -1) for tag, may in entries)
    return struct.pack("<I", 2) + b"".join(packed)


def _make(source: Path) -> dict[str, Path]:
    (source / "folder").mkdir()
    (source / "link").symlink_to("folder")
    os.mkfifo(source / "pipe")
    for name in ("two", "attribute", "acl"):
        (source / name).write_text(name)
    os.link(source / "two", source / "names")
    os.setxattr(source / "attribute", "user.k", b"v")
    acl = _acl((1, 7), (2, 6), (4, 4), (16, 6), (32, 4))
    os.setxattr(source / "acl", "system.posix_acl_access", acl)
    with open(source / "hole", "wb") as hole:
        hole.truncate(1 << 19)
    return {path.name: path for path in source.iterdir()}


def test_what_is_not_plain_is_left_and_nothing_of_it_is_there(
    copy_files: CopyFiles, folders: tuple[Path, Path]
) -> None:
    names = [*_make(folders[0]), "absent"]
    assert _copy(copy_files, folders, *names) == names
    assert list(folders[1].iterdir()) == []


def test_what_is_there_already_is_left_as_it_is(
    copy_files: CopyFiles, folders: tuple[Path, Path]
) -> None:
    (folders[0] / "f").write_text("new")
    (folders[0] / "l").write_text("new")
    (folders[1] / "f").write_text("old")
    (folders[1] / "l").symlink_to("elsewhere")
    assert _copy(copy_files, folders, "f", "l") == ["f", "l"]
    assert (folders[1] / "f").read_text() == "old"
    assert not (folders[1] / "elsewhere").exists()
    assert _copy(copy_files, folders, "l", again=True) == ["l"]
    assert not (folders[1] / "elsewhere").exists()


def test_what_a_folder_bequeaths_is_noticed(
    copy_files: CopyFiles, folders: tuple[Path, Path]
) -> None:
    acl = _acl((1, 7), (2, 7), (4, 7), (16, 7), (32, 7))
    os.setxattr(folders[1], "system.posix_acl_default", acl)
    (folders[0] / "f").write_text("x")
    assert _copy(copy_files, folders, "f") == ["f"]
    assert list(folders[1].iterdir()) == []
    with beneath.opened(folders[0]) as source, beneath.opened(folders[1]) as target:
        copying.copy_entry(source, b"f", (folders[0] / "f").lstat(), target, b"f")
        assert copying.read_xattrs(target, b"f") == {}
        assert stat.S_IMODE((folders[1] / "f").stat().st_mode) == 0o644


def test_a_full_disk_leaves_nothing_half(copy_files: CopyFiles, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "source").mkdir()
    (tmp_path / "source/f").write_bytes(b"x" * 900_000)
    mounts.mount("tmpfs", tmp_path / "small", [("size", "500k")])
    try:
        assert _copy(copy_files, (tmp_path / "source", tmp_path / "small"), "f") == ["f"]
        assert list((tmp_path / "small").iterdir()) == []
    finally:
        mounts.unmount(tmp_path / "small")


def test_a_name_that_is_no_bytes_is_refused(folders: tuple[Path, Path]) -> None:
    with beneath.opened(folders[0]) as source, pytest.raises(TypeError):
        native.copy_files(source, source, ["text"], False)  # type: ignore[list-item]

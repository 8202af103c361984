from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lazarette.backup.stores.contract import BlobNotFound, StoreUnavailable, TagMismatch, WrongStore
from lazarette.backup.stores.local import LocalStore, translate
from lazarette.storage.errors import Forbidden, LazaretteError, NoSpace


def test_a_missing_folder_is_the_wrong_store(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(WrongStore):
            LocalStore(str(path))


def test_a_removed_folder_is_the_wrong_store(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    store = LocalStore(str(folder))
    folder.rmdir()
    with pytest.raises(WrongStore):
        store.get("x")
    store.close()


def test_foreign_files_are_not_objects(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("a/b", b"1")
    (tmp_path / "Foreign").touch()
    (tmp_path / "a" / ".DS_Store").touch()
    (tmp_path / "a" / "link").symlink_to("/etc/passwd")
    with pytest.raises(BlobNotFound):
        store.stat("a/link")
    assert [info.name for info in store.list()] == ["a/b"]
    store.close()


def test_a_tag_never_comes_back(tmp_path: Path) -> None:
    """Inodes are used again and the kernel's clock is coarse: the tags still differ."""
    store = LocalStore(str(tmp_path))
    tags = {store.put("x", b"same") for _ in range(200)}
    assert len(tags) == 200
    for tag in list(tags)[:5]:
        if tag != store.stat("x").tag:
            with pytest.raises(TagMismatch):
                store.replace("x", b"new", tag)
    store.close()


def test_nothing_is_left_of_a_failed_write(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.put("x", b"1")
    with pytest.raises(TagMismatch):
        store.replace("x", b"2", "other")
    assert list((tmp_path / "TMP").iterdir()) == []
    store.close()


def test_remains_of_a_crash_are_swept(tmp_path: Path) -> None:
    old, young = tmp_path / "TMP" / "old", tmp_path / "TMP" / "young"
    old.parent.mkdir()
    old.touch()
    young.touch()
    os.utime(old, (1, 1))
    store = LocalStore(str(tmp_path))
    store.put("x", b"1")
    assert not old.exists()
    assert young.exists()
    store.close()


@pytest.mark.parametrize(
    ("number", "due"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EROFS, Forbidden),
        (errno.EIO, StoreUnavailable),
        (errno.ESTALE, StoreUnavailable),
    ],
)
def test_errnos(number: int, due: type[LazaretteError]) -> None:
    error = translate(OSError(number, "x"), "write", "x")
    assert isinstance(error, due)
    assert error.hint

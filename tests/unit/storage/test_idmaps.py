"""Maps of users: both directions, names, and namespaces that have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazarette.storage import syscalls
from lazarette.storage.errors import InvalidArgument
from lazarette.storage.idmaps import NOBODY, IdMap, IdRange, waiting

TWO = IdMap((IdRange(0, 100_000, 10), IdRange(10, 500_000, 5)), (IdRange(0, 200_000, 20),))


def test_both_directions() -> None:
    assert TWO.root == (100_000, 200_000)
    assert TWO.to_host(9, 19) == (100_009, 200_019)
    assert TWO.to_host(14, 10) == (500_004, 200_010)
    assert TWO.from_host(500_004, 200_010) == (14, 10)
    assert TWO.from_host(0, 200_020) == (NOBODY, NOBODY)


@pytest.mark.parametrize("ids", [(15, 0), (0, 20)])
def test_an_id_outside_is_refused(ids: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument, match="outside of the mapped ids"):
        TWO.to_host(*ids)


def test_a_label_is_one_maps_own() -> None:
    same = IdMap(tuple(TWO.uids), tuple(TWO.gids))
    assert same.label == TWO.label
    assert IdMap(TWO.uids, TWO.uids).label != TWO.label


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_process_in_a_namespace_has_the_map() -> None:
    with waiting(["unshare", "--user"]) as pid:
        TWO.write(pid)
        uids = Path(f"/proc/{pid}/uid_map").read_text().split()
        gids = Path(f"/proc/{pid}/gid_map").read_text().split()
    assert uids == ["0", "100000", "10", "10", "500000", "5"]
    assert gids == ["0", "200000", "20"]
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_files_of_another_user_with_roots_rights(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with syscalls.filesystem_ids(1234, 5678):
        (tmp_path / "theirs").touch()
    (tmp_path / "ours").touch()
    theirs, ours = (tmp_path / "theirs").stat(), (tmp_path / "ours").stat()
    assert (theirs.st_uid, theirs.st_gid) == (1234, 5678)
    assert (ours.st_uid, ours.st_gid) == (0, 0)

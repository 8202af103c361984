"""``--userns-remap``: users, groups and their ranges of ids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lazarette.runtime import remap
from lazarette.storage.errors import InvalidArgument
from lazarette.storage.idmaps import IdMap, IdRange

FILE = """# a comment
root:100000:65536
alice:200000:65536
1000:300000:10

alice:400000:5
broken:1
alice:many:5
alice:500000:0
bob:600000:65536"""


def test_ranges_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "subuid").write_text(FILE)
    assert remap.read_ranges(tmp_path / "subuid", ("alice", "1000")) == (
        IdRange(0, 200_000, 65_536),
        IdRange(65_536, 300_000, 10),
        IdRange(65_546, 400_000, 5),
    )
    assert remap.read_ranges(tmp_path / "subuid", ("bob", "7")) == (IdRange(0, 600_000, 65_536),)
    assert remap.read_ranges(tmp_path / "subuid", ("carol", "8")) == ()
    assert remap.read_ranges(tmp_path / "missing", ("alice", "1000")) == ()


@pytest.mark.parametrize(
    ("text", "names", "groups"),
    [
        ("root", ("root", "0"), ("root", "0")),
        ("0", ("root", "0"), ("root", "0")),
        ("daemon:root", ("daemon", "1"), ("root", "0")),
        ("daemon:0", ("daemon", "1"), ("root", "0")),
        ("1:1", ("daemon", "1"), ("daemon", "1")),
    ],
)
def test_users_and_groups(text: str, names: tuple[str, str], groups: tuple[str, str]) -> None:
    assert remap.find(text) == remap.Remapped(names, groups)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:b:c", "invalid user/group specification"),
        (":root", "invalid user/group specification"),
        ("root:", "invalid user/group specification"),
        ("no-such-user", "no user no-such-user"),
        ("4294967294", "no user 4294967294"),
        ("99999999999999999999", "no user 99999999999999999999"),
        ("root:no-such-group", "no group no-such-group"),
    ],
)
def test_what_is_no_user(text: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        remap.find(text)


def test_maps_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remap, "SUBUID", tmp_path / "subuid")
    monkeypatch.setattr(remap, "SUBGID", tmp_path / "subgid")
    assert remap.idmap_of("") is None
    with pytest.raises(InvalidArgument, match="subuid has no range of ids for daemon") as told:
        remap.idmap_of("daemon")
    assert told.value.hint.startswith("usermod --add-subuids 100000-165535")
    (tmp_path / "subuid").write_text("daemon:1000:10\n")
    with pytest.raises(InvalidArgument, match="subgid has no range of ids for daemon"):
        remap.idmap_of("daemon")
    (tmp_path / "subgid").write_text("daemon:2000:20\nroot:3000:30\n")
    uids = (IdRange(0, 1000, 10),)
    assert remap.idmap_of("daemon") == IdMap(uids, (IdRange(0, 2000, 20),))
    assert remap.idmap_of("daemon:root") == IdMap(uids, (IdRange(0, 3000, 30),))


MAKE = """
import pwd, sys
from lazarette.runtime import remap
remap.SUBUID.write_text("someone:150000:100000\\n")
remap.SUBGID.unlink(missing_ok=True)
first = remap.idmap_of("default")
assert remap.idmap_of("default") == first
assert pwd.getpwnam("dockremap").pw_shell == "/bin/false"
print(first.uids, first.gids, remap.SUBUID.read_text().count("dockremap"))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_default_user_is_made_once(tmp_path: Path) -> None:
    """By the host's own tools, on a copy of ``/etc`` that only this process sees."""
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    over = f"lowerdir=/etc,upperdir={tmp_path / 'upper'},workdir={tmp_path / 'work'}"
    script = f'mount -t overlay etc -o "{over}" /etc && exec "$0" -c "$1"'
    argv = ["unshare", "--mount", "sh", "-c", script, sys.executable, MAKE]
    done = subprocess.run(argv, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    ranges = [
        f"(IdRange(inside=0, outside={first}, length=65536),)" for first in (250_000, 100_000)
    ]
    assert done.stdout.decode() == " ".join([*ranges, "1\n"])

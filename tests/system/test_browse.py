"""Looking into a repository without restoring: mount, ls, find, cat, diff, dump."""

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.daemon import LAZ
from tests.support.waiting import until

_ODD = b"a\nb\xff"


class Browsed:
    """A repository with two snapshots of a small tree."""

    def __init__(self, root: Path) -> None:
        self.environment = {**os.environ, "LAZ_KEYS": str(root / "keys")}
        self.url = str(root / "repo")
        self.source = root / "source"
        (self.source / "sub").mkdir(parents=True)
        (self.source / "one").write_bytes(os.urandom(300_000))
        os.link(self.source / "one", self.source / "sub" / "two")
        (self.source / "link").symlink_to("sub/two")
        (Path(os.fsdecode(os.fsencode(self.source) + b"/" + _ODD))).write_text("odd")
        os.setxattr(self.source / "one", "user.note", b"kept")
        self.run("repo", "init", "--no-daemon", "--kit-file", str(root / "kit"), self.url)
        self.back_up()
        (self.source / "late").write_text("late")
        (self.source / "sub").chmod(0o700)
        self.back_up()

    def back_up(self) -> None:
        self.run("backup", "path", str(self.source), "--name", "files", "--repo", self.url)

    def run(self, *arguments: str) -> bytes:
        done = subprocess.run(
            [str(LAZ), *arguments], capture_output=True, check=False, env=self.environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def points(self) -> list[str]:
        return [
            one["id"] for one in json.loads(self.run("backup", "ls", "--repo", self.url, "--json"))
        ]


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> Browsed:
    return Browsed(tmp_path_factory.mktemp("browse"))


@pytest.fixture
def mounted(browsed: Browsed, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mnt"
    folder.mkdir()
    with subprocess.Popen(
        [str(LAZ), "mount", browsed.url, str(folder)],
        env=browsed.environment,
        stderr=subprocess.DEVNULL,
    ) as server:
        until(lambda: server.poll() is not None or os.path.ismount(folder))
        assert server.poll() is None
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
            server.wait(30)


def test_mount_shows_every_snapshot(browsed: Browsed, mounted: Path) -> None:
    assert os.listdir(mounted) == ["files"]
    names = os.listdir(mounted / "files")
    assert len(names) == 3
    oldest, _ = browsed.points()
    [named] = [name for name in names if name.endswith("-" + oldest[:8])]
    first, newest = mounted / "files" / named, mounted / "files" / "latest"
    assert (newest / "one").read_bytes() == (browsed.source / "one").read_bytes()
    assert (newest / "late").read_text() == "late"
    assert not (first / "late").exists()
    assert os.readlink(newest / "link") == "sub/two"
    assert os.getxattr(newest / "one", "user.note") == b"kept"
    shown, real = os.stat(newest / "one"), os.stat(browsed.source / "one")
    assert (shown.st_nlink, shown.st_size, shown.st_mtime_ns, shown.st_mode) == (
        2,
        real.st_size,
        real.st_mtime_ns,
        real.st_mode,
    )
    assert shown.st_ino == os.stat(newest / "sub" / "two").st_ino
    assert _ODD in os.listdir(os.fsencode(newest))
    with pytest.raises(OSError, match="Read-only"):
        (newest / "new").write_text("x")


def test_ls_find_cat_diff_and_dump(browsed: Browsed) -> None:
    repo = ("--repo", browsed.url)
    first, second = browsed.points()
    listed = json.loads(browsed.run("ls", *repo, "--json", "files@latest"))
    assert {bytes.fromhex(one["name_hex"]) for one in listed} == {
        b"late",
        b"link",
        b"one",
        b"sub",
        _ODD,
    }
    assert b"\xff" not in browsed.run("ls", *repo, "files@latest")
    found = json.loads(browsed.run("find", *repo, "--json", second, "tw*"))
    assert [bytes.fromhex(one["path_hex"]) for one in found] == [b"sub/two"]
    assert browsed.run("cat", *repo, second, "sub/two") == (browsed.source / "one").read_bytes()
    changed = json.loads(browsed.run("diff", *repo, "--json", first, second))
    kinds = {bytes.fromhex(one["path_hex"]): one["kind"] for one in changed}
    assert kinds[b"late"] == "added"
    assert kinds[b"sub"] == "metadata"
    assert b"one" not in kinds
    with tarfile.open(fileobj=io.BytesIO(browsed.run("dump", *repo, second, "sub"))) as tar:
        assert any(member.name.endswith("two") for member in tar)

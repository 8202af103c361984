"""Snapshots of mounted unions on filesystems with reflinks, and without."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.mounts import loop_filesystem, tmpfs
from tests.support.unions import Union, kill_mount, prepare, serving

from lazarette.fuse.differences import Difference, differences

ROUNDS = int(os.environ.get("LAZ_ROUNDS", "6"))

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def pool(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    with loop_filesystem(tmp_path_factory.mktemp("pool"), request.param, 512 << 20) as place:
        yield place


@pytest.fixture
def union(pool: Path, request: pytest.FixtureRequest) -> Iterator[Union]:
    base = pool / f"{request.node.originalname}-{os.getpid()}"
    base.mkdir()
    (base / "snaps").mkdir()
    yield prepare(base, lowers=1)
    shutil.rmtree(base)


def take(union: Union, name: str) -> Path:
    target = union.base / "snaps" / name
    union.mounted.prepare(str(target))
    union.mounted.take(str(target))
    union.mounted.settle(str(target))
    return target


def tree(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything that can be seen of a tree."""
    seen: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        st = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        names = sorted(os.listxattr(path, follow_symlinks=False))
        seen[str(path.relative_to(folder))] = (
            st.st_mode,
            st.st_uid,
            st.st_gid,
            st.st_mtime_ns,
            st.st_rdev,
            content,
            tuple(names),
        )
    return seen


def by_path(found: Iterator[Difference]) -> dict[bytes, Difference]:
    return {each.path: each for each in found}


def test_what_was_open_before_and_closed_during_a_snapshot_is_in_it(union: Union) -> None:
    with serving(union):
        for name in ("s1", "s2"):  # the first is made of everything, the second of changes
            target = union.base / "snaps" / name
            with (union.root / "a").open("w") as stream:
                union.mounted.prepare(str(target))
                stream.write(name)
            union.mounted.take(str(target))
            union.mounted.settle(str(target))
            assert (target / "upper/a").read_text() == name


def test_files_cloned_twice_are_as_they_were_the_second_time(union: Union) -> None:
    """Onto their own clones: shorter, longer, with holes, without an attribute, another file."""
    rng = random.Random(3)
    with serving(union):
        files = {name: rng.randbytes(300_000) for name in ("cut", "grown", "holed", "new", "less")}
        for turn in ("s1", "s2"):
            for name, content in files.items():
                (union.root / name).write_bytes(content)
            os.setxattr(union.root / "less", "user.a", b"1")
            target = union.base / "snaps" / turn
            union.mounted.prepare(str(target))
            inodes = {p.name: p.stat().st_ino for p in Path(f"{target}.partial/upper").iterdir()}
            os.truncate(union.root / "cut", 100_001)
            with (union.root / "grown").open("r+b") as stream:
                stream.seek(250_000)
                stream.write(rng.randbytes(200_000))
            with (union.root / "holed").open("r+b") as stream:
                stream.truncate(0)
                stream.truncate(300_000)
                stream.seek(200_000)
                stream.write(b"x" * 4096)
            (union.root / "other").write_bytes(b"other")
            (union.root / "other").rename(union.root / "new")
            os.removexattr(union.root / "less", "user.a")
            union.mounted.take(str(target))
            wanted = tree(union.upper)
            union.mounted.settle(str(target))
            assert tree(target / "upper") == wanted
            made = {path.name: path.stat().st_ino for path in (target / "upper").iterdir()}
            kept = {name for name in files if made[name] == inodes[name]}
            assert kept == {"cut", "grown", "holed", "less"}


def test_snapshot_does_not_change_any_more(union: Union) -> None:
    (union.lower() / "base").write_text("below")
    with serving(union):
        (union.root / "a").write_text("one")
        (union.root / "still").write_bytes(bytes(100_000))
        stream = (union.root / "open").open("w+b", buffering=0)
        stream.write(b"before")
        first = take(union, "s1")
        stream.write(b"after")
        (union.root / "a").write_text("two")
        (union.root / "base").write_text("changed")
        (union.root / "d").mkdir()
        (union.root / "d" / "x").write_text("x")
        second = take(union, "s2")
        stream.close()
        (union.root / "d" / "x").unlink()
        (union.root / "d").rename(union.root / "e")
        third = take(union, "s3")
        assert tree(third / "upper") == tree(union.upper)
    assert (first / "upper/a").read_text() == "one"
    assert (first / "upper/open").read_bytes() == b"before"
    assert sorted(os.listdir(first / "upper")) == ["a", "open", "still"]
    assert (second / "upper/open").read_bytes() == b"beforeafter"
    assert (second / "upper/base").read_text() == "changed"
    assert (second / "upper/d/x").read_text() == "x"
    assert sorted(os.listdir(third / "upper")) == ["a", "base", "e", "open", "still"]
    found = by_path(differences(str(second), str(third)))
    assert {b"d", b"d/x", b"e"} <= set(found) <= {b"a", b"base", b"d", b"d/x", b"e", b"open"}
    assert (second / "upper/still").samefile(third / "upper/still")


def test_mapping_that_outlives_its_descriptor_is_seen(union: Union) -> None:
    with serving(union):
        (union.root / "m").write_bytes(bytes(100_000))
        fd = os.open(union.root / "m", os.O_RDWR)
        mapping = mmap.mmap(fd, 100_000)
        os.close(fd)
        first = take(union, "s1")
        mapping[50_000] = 7
        second = take(union, "s2")
        third = take(union, "s3")
        mapping[60_000] = 8
        fourth = take(union, "s4")
        mapping.close()
        assert (first / "upper/m").read_bytes()[50_000] == 0
        assert (second / "upper/m").read_bytes()[50_000] == 7
        assert (third / "upper/m").read_bytes()[60_000] == 0
        assert (fourth / "upper/m").read_bytes()[60_000] == 8


def test_changed_ranges_cover_what_changed(union: Union) -> None:
    rng = random.Random(3)
    with serving(union):
        with (union.root / "f").open("w+b", buffering=0) as stream:
            stream.write(rng.randbytes(4 << 20))
            first = take(union, "s1")
            offsets = [rng.randrange(4 << 20) for _ in range(20)]
            for offset in offsets:
                os.pwrite(stream.fileno(), b"!!", offset)
            second = take(union, "s2")
    (found,) = differences(str(first), str(second))
    assert found.path == b"f" and found.ranges is not None
    for offset in offsets:
        assert any(start <= offset < start + length for start, length in found.ranges)
    assert sum(length for _, length in found.ranges) < 1 << 20
    rebuilt = bytearray((first / "upper/f").read_bytes())
    after = (second / "upper/f").read_bytes()
    for start, length in found.ranges:
        rebuilt[start : start + length] = after[start : start + length]
    assert rebuilt == after


def test_hard_links_stay_linked_in_snapshots(union: Union) -> None:
    (union.lower() / "one").write_text("same")
    os.link(union.lower() / "one", union.lower() / "two")
    with serving(union):
        (union.root / "p").write_text("p")
        os.link(union.root / "p", union.root / "q")
        (union.root / "one").write_text("changed")
        take(union, "s1")
        (union.root / "q").write_text("pq")
        second = take(union, "s2")
        assert (second / "upper/p").samefile(second / "upper/q")
        assert (second / "upper/p").read_text() == "pq"
        (kept,) = (second / "links").iterdir()
        assert kept.samefile(second / "upper/one")


def test_unknown_changes_after_a_kill_make_a_whole_copy(union: Union) -> None:
    with serving(union):
        (union.root / "a").write_text("a")
        take(union, "s1")
        (union.root / "a").write_text("b")
        assert b"a" in union.mounted.changed()
        union.remount()
        assert b"a" in union.mounted.changed()
        kill_mount(union.mounted)
        union.mounted.ensure()
        with pytest.raises(OSError) as caught:
            union.mounted.changed()
        assert caught.value.errno == errno.EUCLEAN
        target = union.base / "snaps" / "s2"
        union.mounted.prepare(str(target))
        assert union.mounted.take(str(target)).whole
        union.mounted.settle(str(target))
        assert (target / "upper/a").read_text() == "b"


@pytest.mark.timeout(max(300, 30 * ROUNDS))
def test_snapshots_equal_the_tree_under_random_changes(union: Union) -> None:
    rng = random.Random(int(os.environ.get("LAZ_SEED", "11")))
    for index in range(5):
        (union.lower() / f"low{index}").mkdir()
        (union.lower() / f"low{index}" / "f").write_bytes(rng.randbytes(5000))
    with serving(union):
        for number in range(ROUNDS):
            for _ in range(30):
                change(union.root, rng)
            target = union.base / "snaps" / f"r{number}"
            union.mounted.prepare(str(target))
            for _ in range(10):
                change(union.root, rng)
            union.mounted.take(str(target))
            expected = tree(union.upper)
            links = {path.name: path.read_bytes() for path in (union.base / "work/links").iterdir()}
            for _ in range(5):
                change(union.root, rng)
            union.mounted.settle(str(target))
            assert tree(target / "upper") == expected
            assert {path.name: path.read_bytes() for path in (target / "links").iterdir()} == links


def change(root: Path, rng: random.Random) -> None:
    """One random change, which may fail as the kernel says."""
    names = [*root.rglob("*"), *(root / f"n{rng.randrange(9)}" for _ in range(4))]
    one, two = rng.choice(names), rng.choice(names)
    kind = rng.randrange(9)
    try:
        if kind == 0:
            one.mkdir()
        elif kind == 1:
            one.write_bytes(rng.randbytes(rng.randrange(20_000)))
        elif kind == 2:
            with one.open("r+b") as stream:
                stream.seek(rng.randrange(1 + one.stat().st_size))
                stream.write(rng.randbytes(100))
        elif kind == 3:
            one.unlink()
        elif kind == 4:
            one.rename(two)
        elif kind == 5:
            os.link(one, two)
        elif kind == 6:
            os.chmod(one, rng.choice((0o600, 0o755)))
        elif kind == 7:
            (one / f"c{rng.randrange(5)}").write_text("child")
        else:
            one.rmdir()
    except OSError as error:
        assert error.errno not in (errno.EIO, errno.ESTALE, errno.ENOSYS), error


def test_without_reflinks_it_is_refused(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "tmpfs") as base:
        refused_on(prepare(base))


def refused_on(union: Union) -> None:
    with serving(union):
        (union.root / "a").write_text("a")
        with pytest.raises(OSError) as caught:
            union.mounted.prepare(str(union.base / "s1"))
        assert caught.value.errno == errno.EOPNOTSUPP
        assert not (union.base / "s1").exists()

"""Cases of the catalogue that concern reading and writing trees, by their letters."""

from __future__ import annotations

import os
import random
import shutil
import socket
import stat
import threading
from pathlib import Path

import pytest
from tests.support.mounts import loop_filesystem, tmpfs
from tests.support.repositories import backup, bring_back, local, reopen
from tests.support.trees import describe

from lazarette.backup import restore
from lazarette.backup.archive import Outcome
from lazarette.backup.repository.entries import Kind
from lazarette.backup.restore import Mode, TargetNotEmpty
from lazarette.backup.tree import PathNotFound, TreeReader
from lazarette.storage import process
from lazarette.storage.errors import NoSpace, SourceMissing


def _source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def test_a1_odd_names(tmp_path: Path) -> None:
    source = _source(tmp_path)
    top = os.fsencode(source)
    names = [
        b"a\nb",
        b"\x1b[31mred",
        b"\xff\xfe",
        b"-rf",
        b"..\\test.txt",
        b"c:colon",
        b"space ",
        b"dot.",
        b"n" * 255,
        "é".encode(),
        b"e\xcc\x81",
    ]
    for number, name in enumerate(names):
        Path(os.fsdecode(top + b"/" + name)).write_bytes(b"%d" % number)
    directory = os.open(source, os.O_RDONLY)
    for _ in range(40):
        os.mkdir(b"d" * 200, dir_fd=directory)
        below = os.open(b"d" * 200, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(os.open("deep", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=directory))
    os.close(directory)
    before = describe(source)
    assert max(map(len, before)) > 4096
    with local(tmp_path) as repo:
        report = backup(repo, source)
        assert report.warnings == ()
        tree = TreeReader(repo.reader, report.snapshot)
        assert [entry.name for entry in tree.listing(tree.root)] == sorted([*names, b"d" * 200])
        assert bring_back(repo, report.snapshot, tmp_path / "target").warnings == ()
    assert describe(tmp_path / "target") == before
    process.run(["rm", "-rf", str(source), str(tmp_path / "target")])


def test_a2_hard_links_and_parts_of_a_tree(tmp_path: Path) -> None:
    source = _source(tmp_path)
    for name in "xyzp":
        (source / name).mkdir()
    (source / "x" / "one").write_bytes(random.Random(1).randbytes(5 << 20))
    os.link(source / "x" / "one", source / "y" / "two")
    os.link(source / "x" / "one", source / "z" / "three")
    (source / "p" / "a").write_bytes(b"pair")
    os.link(source / "p" / "a", source / "p" / "b")
    before = describe(source)
    with local(tmp_path) as repo:
        report = backup(repo, source)
        assert report.stats.bytes_read == (5 << 20) + 4
        assert report.stats.bytes_sent < 5.2 * (1 << 20)
        bring_back(repo, report.snapshot, tmp_path / "all")
        bring_back(repo, report.snapshot, tmp_path / "part", include=(b"y",))
        bring_back(repo, report.snapshot, tmp_path / "strip", include=(b"z/three",), strip=b"z")
    assert describe(tmp_path / "all") == before
    content = (source / "x" / "one").read_bytes()
    assert (tmp_path / "part" / "y" / "two").read_bytes() == content
    assert sorted(os.listdir(tmp_path / "part")) == ["y"]
    assert (tmp_path / "strip" / "three").read_bytes() == content


def test_a3_sparse_file_larger_than_the_disk(tmp_path: Path) -> None:
    source = _source(tmp_path)
    with open(source / "disk.img", "wb") as file:
        file.truncate(50 << 30)
        for at in (0, 20 << 30, (50 << 30) - (1 << 20)):
            file.seek(at)
            file.write(random.Random(at).randbytes(1 << 20))
    before = describe(source)
    with local(tmp_path) as repo, loop_filesystem(tmp_path, "ext4", 64 << 20) as target:
        report = backup(repo, source)
        assert report.stats.bytes_read <= 4 << 20
        assert report.stats.duration_ns < 10 * 10**9
        done = bring_back(repo, report.snapshot, target)
        assert done.outcome is Outcome.OK
        after = describe(target)
        after.pop(b"lost+found", None)
        assert after == before
        blocks = (target / "disk.img").stat().st_blocks
        assert blocks <= 2 * (source / "disk.img").stat().st_blocks


def test_a4_attribute_too_large_for_the_target(tmp_path: Path) -> None:
    with (
        local(tmp_path) as repo,
        loop_filesystem(tmp_path, "btrfs", 128 << 20) as source,
        loop_filesystem(tmp_path, "ext4", 32 << 20) as target,
    ):
        (source / "file").write_bytes(b"data")
        os.setxattr(source / "file", "user.big", os.urandom(12 << 10))
        os.setxattr(source / "file", "user.ok", b"fine")
        process.run(["setfacl", "-m", "u:1234:rw", str(source / "file")])
        (source / "later").write_bytes(b"later")
        report = backup(repo, source)
        done = bring_back(repo, report.snapshot, target)
        (warning,) = done.warnings
        assert warning.path == b"file"
        assert "user.big" in warning.text and ("ENOSPC" in warning.text or "E2BIG" in warning.text)
        assert done.outcome is Outcome.WARNINGS
        assert (target / "later").read_bytes() == b"later"
        one, other = describe(source)[b"file"], describe(target)[b"file"]
        assert (
            dict(one.xattrs)["system.posix_acl_access"]
            == (dict(other.xattrs)["system.posix_acl_access"])
        )
        assert dict(other.xattrs)["user.ok"] == b"fine"
        assert (one.mode, one.content) == (other.mode, other.content)


def test_a5_sockets_pipes_and_devices(tmp_path: Path) -> None:
    source = _source(tmp_path)
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.open(source, os.O_RDONLY)
        bound.bind(f"/proc/self/fd/{here}/a.sock")
        os.close(here)
        os.mkfifo(source / "b.fifo")
        os.mknod(source / "c.null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (source / "zz.txt").write_bytes(b"end")
        before = describe(source)
        with local(tmp_path) as repo:
            report = backup(repo, source)
            assert report.warnings == ()
            bring_back(repo, report.snapshot, tmp_path / "target")
    assert describe(tmp_path / "target") == before


def test_a6_shut_directories_and_parents_of_a_part(tmp_path: Path) -> None:
    source = _source(tmp_path)
    inner = source / "p" / "ro"
    inner.mkdir(parents=True)
    (inner / "f").write_bytes(b"f")
    os.chmod(inner, 0o555)
    os.utime(inner, ns=(0, 1_000_000_000 * 10**9))
    os.chown(source / "p", 1234, 1234)
    os.chmod(source / "p", 0o711)
    os.utime(source / "p", ns=(0, 930_000_000 * 10**9 + 5))
    before = describe(source)
    with local(tmp_path) as repo:
        report = backup(repo, source)
        bring_back(repo, report.snapshot, tmp_path / "all")
        bring_back(repo, report.snapshot, tmp_path / "part", include=(b"p/ro/f",))
    assert describe(tmp_path / "all") == before
    assert describe(tmp_path / "part") == before


def test_a7_root_of_the_volume(tmp_path: Path) -> None:
    source = _source(tmp_path)
    (source / "PG_VERSION").write_bytes(b"15\n")
    os.setxattr(source, "user.role", b"root")
    process.run(["setfacl", "-m", "u:1234:rx", str(source)])
    os.chown(source, 999, 999)
    os.chmod(source, 0o700)
    os.utime(source, ns=(0, 1_500_000_000_000_000_123))
    before = describe(source)
    with local(tmp_path) as repo:
        report = backup(repo, source)
        shutil.rmtree(source)
        for name in ("source", "other"):
            bring_back(repo, report.snapshot, tmp_path / name)
            assert describe(tmp_path / name) == before


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a8_extreme_times(tmp_path: Path, kind: str) -> None:
    size = 320 << 20 if kind == "xfs" else 128 << 20
    times = {
        "old": -2_177_452_800 * 10**9,
        "before": -1,
        "after": 1,
        "y2038": 2_147_483_648 * 10**9,
        "y2300": 10_413_792_000_123_456_789,
        "y2500": 16_725_225_600 * 10**9 + 7,
        "y3000": 32_503_680_000 * 10**9 + 9,
    }
    with local(tmp_path) as repo, loop_filesystem(tmp_path, kind, size) as source:
        for name, when in times.items():
            (source / name).write_bytes(name.encode())
            os.utime(source / name, ns=(0, when))
        report = backup(repo, source)
        tree = TreeReader(repo.reader, report.snapshot)
        for name in times:
            held = (source / name).stat().st_mtime_ns
            assert tree.lookup(name.encode()).mtime == held
            assert kind != "btrfs" or held == times[name]
        done = bring_back(repo, report.snapshot, tmp_path / "target")
        late = {warning.path for warning in done.warnings}
        for name in times:
            same = (tmp_path / "target" / name).stat().st_mtime_ns == (
                (source / name).stat().st_mtime_ns
            )
            assert same or name.encode() in late


def test_a9_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    source = _source(tmp_path)
    (source / "steady").write_bytes(random.Random(3).randbytes(300_000))
    target = source / "kuma.db"
    target.write_bytes(b"x" * (8 << 20))
    stop = threading.Event()

    def write() -> None:
        chance = random.Random(4)
        with open(target, "r+b", buffering=0) as file:
            while not stop.is_set():
                file.seek(chance.randrange(8 << 20))
                file.write(chance.randbytes(5000))
                file.truncate(chance.randrange(4 << 20, 9 << 20))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with local(tmp_path) as repo:
            report = backup(repo, source)
            for _ in range(20):  # a busy machine may not let the writer in while it is read
                if report.warnings:
                    break
                report = backup(repo, source)
            stop.set()
            writer.join()
            assert [warning.path for warning in report.warnings] == [b"kuma.db"]
            assert "changed while" in report.warnings[0].text
            assert report.outcome is Outcome.WARNINGS
            assert repo.check(1.0).clean
            done = bring_back(repo, report.snapshot, tmp_path / "target")
            assert done.outcome is Outcome.OK
            assert describe(tmp_path / "target")[b"steady"] == describe(source)[b"steady"]
            again = backup(reopen(repo), source, report.snapshot)
            assert again.warnings == () and again.stats.bytes_read > 0
            bring_back(repo, again.snapshot, tmp_path / "second")
            assert describe(tmp_path / "second") == describe(source)
    finally:
        stop.set()
        writer.join()


def test_a22_other_filesystems_are_left_out(tmp_path: Path) -> None:
    source = _source(tmp_path)
    (source / "inside").mkdir()
    (source / "kept").write_bytes(b"kept")
    with tmpfs(source / "inside"), local(tmp_path) as repo:
        (source / "inside" / "foreign").write_bytes(b"foreign")
        report = backup(repo, source)
        tree = TreeReader(repo.reader, report.snapshot)
        assert [path for path, _ in tree.walk()] == [b"", b"inside", b"kept"]
        assert [warning.path for warning in report.warnings] == [b"inside"]


def test_a36_source_missing_or_empty(tmp_path: Path) -> None:
    source = _source(tmp_path)
    for number in range(10):
        (source / f"f{number}").write_bytes(b"x" * 1000)
    with local(tmp_path) as repo:
        with pytest.raises(SourceMissing):
            backup(repo, tmp_path / "absent")
        first = backup(repo, source).snapshot
        for number in range(9):
            (source / f"f{number}").unlink()
        shrunk = backup(repo, source, first)
        assert shrunk.outcome is Outcome.WARNINGS and "only 1 of 10" in shrunk.warnings[0].text
        (source / "f9").unlink()
        with pytest.raises(SourceMissing):
            backup(repo, source, shrunk.snapshot)
        assert len(repo.snapshots()) == 2


def test_restore_refuses_a_full_folder_and_unknown_paths(tmp_path: Path) -> None:
    source = _source(tmp_path)
    (source / "a").write_bytes(b"a")
    with local(tmp_path) as repo:
        record = backup(repo, source).snapshot
        with pytest.raises(TargetNotEmpty):
            bring_back(repo, record, source)
        with pytest.raises(PathNotFound):
            bring_back(repo, record, tmp_path / "t", include=(b"b",))


def test_restore_by_delta_writes_only_what_differs(tmp_path: Path) -> None:
    source = _source(tmp_path)
    chance = random.Random(5)
    (source / "big").write_bytes(chance.randbytes(16 << 20))
    (source / "small").write_bytes(b"small")
    (source / "dir").mkdir()
    (source / "dir" / "x").write_bytes(b"x" * 10_000)
    os.symlink("small", source / "link")
    before = describe(source)
    with local(tmp_path) as repo:
        record = backup(repo, source).snapshot
        with open(source / "big", "r+b") as file:
            file.seek(5 << 20)
            file.write(b"changed")
        (source / "small").unlink()
        (source / "small").mkdir()
        (source / "small" / "nested").write_bytes(b"n")
        (source / "extra").write_bytes(b"extra")
        shutil.rmtree(source / "dir")
        os.setxattr(source / "big", "user.extra", b"1")
        done = bring_back(repo, record, source, mode=Mode.DELTA)
        assert (done.warnings, done.damaged) == ((), ())
        assert describe(source) == before
        assert done.bytes_written < 1 << 20
        again = bring_back(repo, record, source, mode=Mode.DELTA)
        assert again.bytes_written == 0 and describe(source) == before


def test_restore_never_follows_a_symlink_in_the_target(tmp_path: Path) -> None:
    source = _source(tmp_path)
    (source / "d").mkdir()
    (source / "d" / "f").write_bytes(b"f")
    outside = tmp_path / "outside"
    outside.mkdir()
    target = tmp_path / "target"
    target.mkdir()
    os.symlink(outside, target / "d")
    with local(tmp_path) as repo:
        record = backup(repo, source).snapshot
        bring_back(repo, record, target, mode=Mode.MERGE)
    assert list(outside.iterdir()) == []
    assert (target / "d" / "f").read_bytes() == b"f"


def test_owners_can_be_mapped(tmp_path: Path) -> None:
    source = _source(tmp_path)
    (source / "f").write_bytes(b"f")
    os.chown(source / "f", 10, 20)
    with local(tmp_path) as repo:
        record = backup(repo, source).snapshot
        owners = restore.OwnerMap({10: 110}, {20: 120})
        bring_back(repo, record, tmp_path / "t", owners=owners)
    status = (tmp_path / "t" / "f").stat()
    assert (status.st_uid, status.st_gid) == (110, 120)


def test_restore_into_a_full_filesystem_can_go_on(tmp_path: Path) -> None:
    source = _source(tmp_path)
    for number in range(6):
        (source / f"f{number}").write_bytes(random.Random(number).randbytes(4 << 20))
    with local(tmp_path) as repo, tmpfs(tmp_path / "small", 14 << 20) as target:
        record = backup(repo, source).snapshot
        with pytest.raises(NoSpace):
            bring_back(repo, record, target)
        process.run(["mount", "-o", "remount,size=64m", str(target)])
        done = bring_back(repo, record, target, mode=Mode.DELTA)
        assert done.outcome is Outcome.OK
        assert done.bytes_written < 20 << 20
        assert describe(target) == describe(source)


def test_content_reads_anywhere(tmp_path: Path) -> None:
    source = _source(tmp_path)
    data = random.Random(6).randbytes(9 << 20)
    (source / "data").write_bytes(data)
    with open(source / "holes", "wb") as file:
        file.truncate(1 << 30)
        file.seek(600 << 20)
        file.write(data)
    with local(tmp_path) as repo:
        record = backup(repo, source).snapshot
        tree = TreeReader(repo.reader, record)
        content = tree.content(tree.lookup(b"data"))
        chance = random.Random(7)
        for _ in range(50):
            at, length = chance.randrange(len(data) + 10), chance.randrange(1 << 20)
            assert content.read(at, length) == data[at : at + length]
        holes = tree.content(tree.lookup(b"holes"))
        assert holes.read((600 << 20) - 5, 10) == bytes(5) + data[:5]
        assert holes.read((600 << 20) + len(data) - 3, 6) == data[-3:] + bytes(3)
        assert tree.lookup(b"data").kind == Kind.FILE


def test_inode_flags_come_back(tmp_path: Path) -> None:
    """Immutable and append-only last of all, no copy-on-write while the file is empty."""
    with local(tmp_path) as repo, loop_filesystem(tmp_path, "btrfs", 256 << 20) as place:
        source, target = place / "source", place / "target"
        source.mkdir()
        (source / "nocow").touch()
        process.run(["chattr", "+C", str(source / "nocow")])
        (source / "nocow").write_bytes(b"x" * 300_000)
        (source / "dir").mkdir()
        for name, flag in (("fixed", "+i"), ("log", "+a"), ("dir", "+d")):
            if name != "dir":
                (source / name).write_bytes(b"1")
            process.run(["chattr", flag, str(source / name)])
        try:
            record = backup(repo, source).snapshot
            assert bring_back(repo, record, target).warnings == ()
            again = bring_back(repo, record, target, mode=Mode.DELTA)
            assert again.damaged == ()
            shown = [_flags(folder) for folder in (source, target)]
            assert shown[0] == shown[1]
            assert "C" in shown[0]["nocow"] and "i" in shown[0]["fixed"]
            assert "a" in shown[0]["log"] and "d" in shown[0]["dir"]
        finally:
            process.run(["chattr", "-R", "-i", "-a", str(place)], check=False)


def _flags(folder: Path) -> dict[str, str]:
    out = process.run(["lsattr", "-d", *map(str, sorted(folder.iterdir()))]).stdout.decode()
    return {line.split()[1].rpartition("/")[2]: line.split()[0] for line in out.splitlines()}

"""Lazy trees through a real mount, filled from a folder."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from tests.support.mounts import tmpfs
from tests.support.unions import kill, kill_mount
from tests.support.waiting import until

from lazarette.fuse import mount, syscalls
from lazarette.fuse.client import LazyMount
from lazarette.fuse.content import Mark
from lazarette.fuse.latesource import FACTS, Facts
from lazarette.fuse.source import SourceEntry
from lazarette.fuse.spec import LazySpec
from lazarette.storage import process

KILLS = int(os.environ.get("LAZ_KILLS", "4"))
MIB, BLOCK, PAGE = 1 << 20, 65536, 4096

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


class Lazy:
    """A lazy tree below ``base`` with its source folder and the source's switches."""

    def __init__(self, base: Path) -> None:
        self.source, self.switches = base / "source", base / "switches"
        self.root, self.store = base / "merged", base / "store"
        for folder in (self.source, self.switches, self.root, self.store):
            folder.mkdir()
        self.mount = LazyMount(
            LazySpec(
                mountpoint=str(self.root),
                control=str(base / "c"),
                store=str(self.store),
                source="tests.support.sources:folder_source",
                arguments={"folder": str(self.source), "switches": str(self.switches)},
                deadline=0.3,
                reads=str(base / "reads"),
                log=str(base / "log"),
            )
        )

    @property
    def tree(self) -> Path:
        return self.store / "tree"

    def set(self, switch: str, on: bool) -> None:
        path = self.switches / switch
        path.touch() if on else path.unlink()

    def forget(self) -> None:
        """Unmount, and begin again with nothing here."""
        self.mount.stop()
        shutil.rmtree(self.store)
        self.store.mkdir()

    def fill(self) -> None:
        self.mount.fill()
        until(lambda: self.mount.progress().complete, "the fill does not end")


@pytest.fixture
def lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lazy]:
    """A lazy tree, not yet mounted; unmounted afterwards."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))  # its source is a test's
    tree = Lazy(tmp_path)
    yield tree
    if mount.is_mounted(str(tree.root)):
        tree.mount.stop()


def populate(folder: Path, seed: int = 1) -> dict[str, bytes]:
    rng = random.Random(seed)
    contents = {}
    for name in ("a", "d/b", "d/e/c", "empty", "d/sparse"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = rng.randbytes(rng.randrange(1, 600_000)) if name != "empty" else b""
        if name == "d/sparse":
            data = b"x" + bytes(400_000) + b"y"
        path.write_bytes(data)
        contents[name] = data
    (folder / "link").symlink_to("d/b")
    os.link(folder / "a", folder / "d/a-too")
    contents["d/a-too"] = contents["a"]
    os.setxattr(folder / "a", "user.note", b"kept")
    os.chmod(folder / "d/b", 0o640)
    os.chown(folder / "d/b", 12, 34)
    return contents


def test_content_comes_on_demand_and_fill_leaves_a_folder(lazy: Lazy) -> None:
    contents = populate(lazy.source)
    lazy.mount.start()
    assert (lazy.root / "d/b").read_bytes() == contents["d/b"]
    st = (lazy.root / "d/b").stat()
    assert (st.st_mode & 0o777, st.st_uid, st.st_gid) == (0o640, 12, 34)
    assert st.st_mtime_ns == (lazy.source / "d/b").stat().st_mtime_ns
    assert os.readlink(lazy.root / "link") == "d/b"
    assert os.getxattr(lazy.root / "a", "user.note") == b"kept"
    assert (lazy.root / "a").stat().st_nlink in (1, 2)
    assert not lazy.mount.progress().complete
    lazy.fill()
    lazy.mount.stop()
    for name, data in contents.items():
        assert (lazy.tree / name).read_bytes() == data
    assert (lazy.tree / "a").samefile(lazy.tree / "d/a-too")
    assert (lazy.tree / "a").stat().st_nlink == 2
    assert os.listxattr(lazy.tree / "d/b") == []
    assert os.listdir(lazy.store / "maps") == []
    assert (lazy.tree / "d/sparse").stat().st_blocks < 700


def test_writes_stay_local(lazy: Lazy) -> None:
    contents = populate(lazy.source)
    lazy.mount.start()
    expected = bytearray(contents["a"])
    with (lazy.root / "a").open("r+b") as stream:
        stream.seek(100)
        stream.write(b"local")
        expected[100:105] = b"local"
        stream.seek(0, os.SEEK_END)
        stream.write(b"tail")
        expected += b"tail"
    (lazy.root / "d/e/c").write_bytes(b"all new")
    os.truncate(lazy.root / "d/b", 1000)
    os.truncate(lazy.root / "d/b", 2000)
    (lazy.root / "d/sparse").unlink()
    (lazy.root / "new").write_bytes(b"new")
    lazy.fill()
    lazy.mount.stop()
    assert (lazy.tree / "a").read_bytes() == expected
    assert (lazy.tree / "d/a-too").read_bytes() == expected
    assert (lazy.tree / "d/e/c").read_bytes() == b"all new"
    assert (lazy.tree / "d/b").read_bytes() == contents["d/b"][:1000] + bytes(1000)
    assert not (lazy.tree / "d/sparse").exists()
    assert (lazy.tree / "new").read_bytes() == b"new"


def test_broken_source_gives_eio_after_the_deadline_and_recovers(lazy: Lazy) -> None:
    contents = populate(lazy.source)
    lazy.mount.start()
    assert (lazy.root / "d/b").read_bytes() == contents["d/b"]
    assert sorted(os.listdir(lazy.root)) == sorted(os.listdir(lazy.source))
    lazy.set("broken", True)
    assert (lazy.root / "d/b").read_bytes() == contents["d/b"]
    with pytest.raises(OSError) as caught:
        (lazy.root / "a").read_bytes()
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError) as caught:
        os.listdir(lazy.root / "d/e")
    assert caught.value.errno == errno.EIO
    lazy.set("broken", False)
    assert (lazy.root / "a").read_bytes() == contents["a"]
    assert (lazy.root / "d/e/c").read_bytes() == contents["d/e/c"]


def test_reads_that_wait_for_the_source_do_not_hold_up_the_end(lazy: Lazy) -> None:
    """However many: one thread always reads, and finds that the mount is gone."""
    populate(lazy.source)
    for number in range(12):
        (lazy.source / f"f{number}").write_bytes(bytes([number]) * 5000)
    lazy.mount = LazyMount(msgspec.structs.replace(lazy.mount.spec, deadline=300.0))
    lazy.mount.start()
    os.listdir(lazy.root)
    lazy.set("broken", True)
    reading = [process.spawn(["cat", str(lazy.root / f"f{number}")]) for number in range(12)]
    time.sleep(1)
    assert all(each.poll() is None for each in reading)
    with lazy.mount.processes() as serving:
        assert serving
        process.run(["umount", "-f", str(lazy.root)], check=False)
        for each in reading:
            assert each.wait() != 0
        process.run(["umount", "-l", str(lazy.root)], check=False)
        assert all(syscalls.ended(each, 20) for each in serving)


def require_standby(lazy: Lazy) -> None:
    if not lazy.mount.status().standby:
        pytest.skip("this kernel does not send requests again")


def test_a_request_that_kills_every_server_is_an_error(lazy: Lazy) -> None:
    contents = populate(lazy.source)
    lazy.mount.start()
    require_standby(lazy)
    kept = os.open(lazy.root / "d/b", os.O_RDWR)
    assert os.read(kept, 700_000) == contents["d/b"]
    lazy.set("deadly", True)
    with pytest.raises(OSError) as caught:
        (lazy.root / "d/e/c").stat()
    assert caught.value.errno == errno.EIO
    lazy.set("deadly", False)
    os.pwrite(kept, b"goes on", 0)
    assert os.pread(kept, 7, 0) == b"goes on"
    os.close(kept)
    assert (lazy.root / "d/e/c").read_bytes() == contents["d/e/c"]
    status = lazy.mount.status()
    assert (status.handovers, status.lost) == (11, 0)


def test_servers_that_die_before_they_serve_end_the_mount(lazy: Lazy) -> None:
    contents = populate(lazy.source)
    lazy.mount.start()
    require_standby(lazy)
    status = lazy.mount.status()
    (lazy.store / "maps").rename(lazy.store / "away")
    (lazy.store / "maps").touch()
    kill(status.pid)
    with pytest.raises(OSError) as caught:
        os.listdir(lazy.root)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    (lazy.store / "maps").unlink()
    (lazy.store / "away").rename(lazy.store / "maps")
    assert not lazy.mount.ensure()
    assert (lazy.root / "a").read_bytes() == contents["a"]


@pytest.mark.timeout(max(300, 30 * KILLS))
def test_files_stay_open_while_servers_are_killed_during_the_fill(lazy: Lazy) -> None:
    rng = random.Random(9)
    model = bytearray(rng.randbytes(3_000_000))
    (lazy.source / "f").write_bytes(model)
    lazy.set("slow", True)
    lazy.mount.start()
    require_standby(lazy)
    fd = os.open(lazy.root / "f", os.O_RDWR)
    for _ in range(KILLS):
        lazy.mount.fill(bytes_per_second=50e6)
        for _ in range(rng.randrange(1, 30)):
            change(fd, model, rng)
        kill(lazy.mount.status().pid)
    lazy.set("slow", False)
    lazy.fill()
    os.close(fd)
    assert (lazy.root / "f").read_bytes() == model
    assert lazy.mount.status().handovers == KILLS
    lazy.mount.stop()
    assert (lazy.tree / "f").read_bytes() == model


def change(fd: int, model: bytearray, rng: random.Random) -> None:
    """Write somewhere, in the file and its model, and look somewhere else."""
    offset = rng.randrange(len(model))
    data = rng.randbytes(min(rng.choice((3, 5000, 200_000)), len(model) - offset))
    done = os.pwrite(fd, data, offset)
    model[offset : offset + done] = data[:done]
    check = rng.randrange(len(model))
    assert os.pread(fd, 1000, check) == model[check : check + 1000]


def test_another_limit_counts_at_once(lazy: Lazy) -> None:
    populate(lazy.source)
    lazy.mount.start()
    lazy.mount.fill(bytes_per_second=1.0)
    assert not lazy.mount.progress().complete
    lazy.fill()


def test_what_was_read_first_comes_first_the_next_time(lazy: Lazy) -> None:
    names = [f"d{number}/f" for number in range(20)]
    for name in names:
        (lazy.source / name).parent.mkdir()
        (lazy.source / name).write_bytes(name.encode() * 1000)
    for chosen in (["d7/f", "d13/f"], ["d4/f"]):
        lazy.mount.start()
        for name in chosen:
            assert (lazy.root / name).read_bytes() == name.encode() * 1000
        lazy.forget()
    lazy.set("log", True)
    lazy.mount.start()
    lazy.fill()
    read = (lazy.switches / "log").read_text().split()
    assert set(read[:3]) == {"d7/f", "d13/f", "d4/f"}
    assert sorted(read) == sorted(names)


def test_server_begins_while_its_source_is_away(lazy: Lazy) -> None:
    contents = populate(lazy.source)
    lazy.mount.start()
    assert (lazy.root / "d/b").read_bytes() == contents["d/b"]
    (lazy.root / "mine").write_bytes(b"kept")
    lazy.set("broken", True)
    kill_mount(lazy.mount)
    lazy.mount.ensure()
    lazy.mount.fill()
    assert (lazy.root / "d/b").read_bytes() == contents["d/b"]
    assert (lazy.root / "mine").read_bytes() == b"kept"
    with pytest.raises(OSError) as caught:
        (lazy.root / "a").read_bytes()
    assert caught.value.errno == errno.EIO
    until(lambda: lazy.mount.progress().error, "the fill does not say what it lacks")
    lazy.set("broken", False)
    assert (lazy.root / "a").read_bytes() == contents["a"]
    until(lambda: lazy.mount.progress().complete, "the fill does not go on")
    lazy.mount.stop()
    for name, data in contents.items():
        assert (lazy.tree / name).read_bytes() == data


def test_full_disk_stops_writers_and_the_fill_but_no_reader(lazy: Lazy) -> None:
    rng = random.Random(3)
    model = {name: bytearray(rng.randbytes(2_000_000)) for name in ("f0", "f1", "f2", "f3")}
    for name, data in model.items():
        (lazy.source / name).write_bytes(data)
    refused = 0
    with tmpfs(lazy.store, 3 << 20):
        lazy.mount.start()
        lazy.mount.fill()
        until(lambda: lazy.mount.progress().error, "the disk does not become full")
        for _ in range(200):
            name = rng.choice(list(model))
            start = rng.randrange(len(model[name]))
            with (lazy.root / name).open("r+b", buffering=0) as stream:
                assert os.pread(stream.fileno(), 100_000, start) == model[name][start:][:100_000]
                data = rng.randbytes(min(rng.choice((10, 5000, 150_000)), 2_000_000 - start))
                try:
                    done = os.pwrite(stream.fileno(), data, start)
                except OSError as full:
                    assert full.errno == errno.ENOSPC
                    refused += 1
                else:
                    model[name][start : start + done] = data[:done]
        assert refused > 0
        kill_mount(lazy.mount)
        lazy.mount.ensure()
        for name, data in model.items():
            assert (lazy.root / name).read_bytes() == data
        process.run(["mount", "-o", "remount,size=20M", str(lazy.store)])
        lazy.fill()
        lazy.mount.stop()
        for name, data in model.items():
            assert (lazy.tree / name).read_bytes() == data


@pytest.mark.parametrize("room", [5, 24])
def test_write_that_a_full_disk_cuts_short_is_kept_as_far_as_is_said(lazy: Lazy, room: int) -> None:
    rng = random.Random(room)
    model = bytearray(rng.randbytes(2 * MIB))
    places = (MIB + 2 * BLOCK, MIB + 8 * BLOCK)  # of which nothing is here
    model[places[1] : places[1] + 2 * BLOCK] = bytes(2 * BLOCK)
    (lazy.source / "f").write_bytes(model)
    with tmpfs(lazy.store, 3 * MIB):
        lazy.mount.start()
        with (lazy.root / "f").open("r+b", buffering=0) as stream:
            assert os.pread(stream.fileno(), PAGE, 0) == model[:PAGE]
            for place in places:
                with (lazy.root / f"ballast{place}").open("ab", buffering=0) as ballast:
                    with pytest.raises(OSError, match="No space"):
                        while True:
                            ballast.write(bytes(PAGE))
                    ballast.truncate(ballast.tell() - room * PAGE)
                data = rng.randbytes(2 * BLOCK)
                try:
                    done = os.pwrite(stream.fileno(), data, place)
                except OSError as full:
                    assert full.errno == errno.ENOSPC
                    done = 0
                assert done < len(data)
                model[place : place + done] = data[:done]
                (lazy.root / f"ballast{place}").unlink()
        process.run(["mount", "-o", "remount,size=20M", str(lazy.store)])
        lazy.fill()
        assert (lazy.root / "f").read_bytes() == model
        lazy.mount.stop()
        assert (lazy.tree / "f").read_bytes() == model


def test_times_that_are_set_during_the_fill_stay(lazy: Lazy) -> None:
    (lazy.source / "f").write_bytes(random.Random(4).randbytes(60 * MIB))
    lazy.mount.start()
    lazy.mount.fill()
    turns = 0
    while not lazy.mount.progress().complete:
        turns += 1
        os.utime(lazy.root / "f", ns=(turns, turns))
        assert (lazy.root / "f").stat().st_mtime_ns == turns
        time.sleep(0.02)
        # the file itself is another one for moments, in which something is written to it
        until(lambda: (lazy.tree / "f").stat().st_mtime_ns == turns, "a time is lost", 5)  # noqa: B023
    assert turns > 0


def test_file_cut_to_nothing_by_a_server_that_died_carries_no_trace(lazy: Lazy) -> None:
    populate(lazy.source)
    lazy.mount.start()
    assert "a" in os.listdir(lazy.root)
    lazy.mount.stop()
    # where a truncation is when the file has been cut and that is not noted yet
    attribute = "trusted.overlay.lazarette.content"
    mark = Mark.parse(os.getxattr(lazy.tree / "a", attribute))
    os.setxattr(lazy.tree / "a", attribute, replace(mark, limit=0, cutting=True).pack())
    os.truncate(lazy.tree / "a", 0)
    lazy.mount.start()
    lazy.fill()
    lazy.mount.stop()
    assert (lazy.tree / "a").read_bytes() == b""
    assert os.listxattr(lazy.tree / "a") == ["user.note"]
    assert os.listdir(lazy.store / "maps") == []


@pytest.mark.timeout(max(300, 30 * KILLS))
def test_kills_during_fill_and_writes_lose_nothing(lazy: Lazy) -> None:
    rng = random.Random(7)
    model = bytearray(rng.randbytes(3_000_000))
    (lazy.source / "f").write_bytes(model)
    lazy.set("slow", True)
    for _ in range(KILLS):
        lazy.mount.ensure()
        lazy.mount.fill(bytes_per_second=50e6)
        fd = os.open(lazy.root / "f", os.O_RDWR)
        try:
            for _ in range(rng.randrange(1, 30)):
                change(fd, model, rng)
            kill_mount(lazy.mount)
        finally:
            os.close(fd)
    lazy.mount.ensure()
    lazy.set("slow", False)
    lazy.fill()
    assert (lazy.root / "f").read_bytes() == model
    lazy.mount.stop()
    assert (lazy.tree / "f").read_bytes() == model


def test_what_is_told_of_the_source_needs_none(lazy: Lazy) -> None:
    """A tree whose facts are known is shown, and tells of its root, while the source is away."""
    (lazy.source / "file").write_bytes(b"content")
    root = SourceEntry(b"", b".", 0o40711, uid=7, gid=8, mtime_ns=5, xattrs={b"user.a": b"1"})
    Facts(65536, 3, 12, root).save(lazy.store / FACTS)
    lazy.set("broken", True)
    lazy.mount.start()
    found = lazy.root.stat()
    assert (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns) == (0o40711, 7, 8, 5)
    assert os.getxattr(lazy.root, "user.a") == b"1"
    assert (lazy.mount.progress().files, lazy.mount.progress().bytes) == (3, 12)
    with pytest.raises(OSError, match="Input/output"):
        os.listdir(lazy.root)
    lazy.set("broken", False)
    assert (lazy.root / "file").read_bytes() == b"content"


def test_a_source_is_opened_before_anyone_reads(lazy: Lazy) -> None:
    (lazy.source / "file").write_bytes(b"content")
    lazy.set("counted", True)
    lazy.mount.start()
    until(lambda: (lazy.switches / "opened").exists(), "the source is not opened")
    assert (lazy.root / "file").read_bytes() == b"content"
    assert (lazy.switches / "opened").read_bytes() == b"1"

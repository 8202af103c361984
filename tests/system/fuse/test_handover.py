"""Another server takes the mount over: killed, or upgraded, nobody who uses it notices."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.support.unions import Union, kill, prepare, serving
from tests.support.waiting import until

from lazarette.fuse import jsontext
from lazarette.fuse.syscalls import ended

KILLS = int(os.environ.get("LAZ_KILLS", "4"))

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture(params=["through", "plain"])
def union(request: pytest.FixtureRequest, tmp_path: Path) -> Union:
    return prepare(tmp_path, passthrough=request.param == "through")


def hand_over(union: Union, how: str) -> None:
    """Have another server go on, and wait until it does."""
    before = union.mounted.status()
    if not before.standby:
        pytest.skip("this kernel does not send requests again")
    if how == "upgrade":
        assert union.mounted.upgrade().pid == before.pid
    else:
        kill(before.pid)
        assert union.mounted.status().pid != before.pid
    after = union.mounted.status()
    assert (after.handovers, after.lost) == (before.handovers + 1, 0)
    assert union.mounted.alive()


def test_nobody_goes_on_with_a_mount_that_is_gone(union: Union) -> None:
    """Servers that came up one after the other would open again what lies below it."""
    with serving(union):
        status = union.mounted.status()
        if not status.standby:
            pytest.skip("this kernel does not send requests again")
        standby = os.pidfd_open(status.standby)
        os.kill(status.standby, signal.SIGSTOP)
        kill(status.pid)
        union.mounted.clear()
        away = union.upper.rename(union.base / "away")  # as what is on a disk that is unmounted
        os.kill(status.standby, signal.SIGCONT)
        assert ended(standby, 60)
        assert not union.upper.exists()
        away.rename(union.upper)
        os.close(standby)


@pytest.mark.parametrize("how", ["kill", "upgrade"])
def test_everything_open_goes_on(union: Union, how: str) -> None:
    (union.lower() / "low").write_bytes(b"low" * 100_000)
    (union.lower() / "below").mkdir()
    for number in range(400):
        (union.lower() / "below" / f"file-{number:03}-{'x' * 40}").touch()
    root = union.root
    with serving(union):
        (root / "d/e").mkdir(parents=True)
        (root / "one").write_bytes(b"1")
        os.link(root / "one", root / "two")
        inos = {name: (root / name).stat().st_ino for name in ("one", "low", "d/e", "below")}
        written = os.open(root / "d/e/written", os.O_RDWR | os.O_CREAT)
        os.write(written, b"before ")
        gone = os.open(root / "gone", os.O_RDWR | os.O_CREAT)
        os.write(gone, b"still here")
        os.unlink(root / "gone")
        low = os.open(root / "low", os.O_RDONLY)
        assert os.read(low, 3) == b"low"
        os.unlink(root / "low")
        nameless = os.open(root / "d", os.O_TMPFILE | os.O_RDWR, 0o600)
        os.write(nameless, b"nameless")
        folder = os.open(root / "d", os.O_RDONLY | os.O_DIRECTORY)
        page = mmap.mmap(written, 4096) if _grown(written) else None
        with os.scandir(root / "below") as entries:
            seen = [next(entries).name for _ in range(50)]
            for _ in range(2):
                hand_over(union, how)
            seen.extend(entry.name for entry in entries)
        assert sorted(seen) == sorted(os.listdir(union.lower() / "below"))
        os.pwrite(written, b"after", 7)
        os.fsync(written)
        assert os.pread(written, 12, 0) == b"before after"
        assert page is not None and page[:12] == b"before after"
        page[7:12] = b"twice"
        page.flush()
        assert (union.upper / "d/e/written").read_bytes()[:12] == b"before twice"
        assert os.pread(gone, 20, 0) == b"still here"
        os.pwrite(gone, b"and", 0)
        os.fsync(gone)
        assert os.fstat(gone).st_nlink == 0
        assert os.pread(low, 3, 3) == b"low"
        path = f"/proc/self/fd/{nameless}"
        os.link(path, root / "d/named", src_dir_fd=nameless, follow_symlinks=True)
        assert (union.upper / "d/named").read_bytes() == b"nameless"
        assert sorted(os.listdir(folder)) == ["e", "named"]
        os.rename("named", "renamed", src_dir_fd=folder, dst_dir_fd=folder)
        assert (root / "d/renamed").exists()
        assert not (root / "low").exists() and not (root / "gone").exists()
        assert (root / "two").stat().st_nlink == 2
        for name, number in inos.items():
            assert name == "low" or (root / name).stat().st_ino == number
        page.close()
        for fd in (written, gone, low, nameless, folder):
            os.close(fd)
        (root / "d/renamed").unlink()
        # Nothing is held any more: the mount can be taken away, and what was removed is gone.
        assert sorted(os.listdir(union.base / "work/tmp")) in ([], ["whiteout"])


def _grown(fd: int) -> bool:
    os.ftruncate(fd, 4096)
    return True


@pytest.mark.timeout(max(300, 30 * KILLS))
@pytest.mark.parametrize("how", ["kill", "upgrade"])
def test_work_under_way_goes_on(union: Union, how: str) -> None:
    """Several threads that make, rename, link, remove and sync while servers come and go."""
    for number in range(40):
        (union.lower() / f"low{number}").write_bytes(b"x" * 300_000)
    stop = threading.Event()
    failures: list[BaseException] = []
    counts = [0] * 3
    with serving(union):
        workers = [
            threading.Thread(target=_work, args=(union.root, index, counts, stop, failures))
            for index in range(3)
        ]
        for worker in workers:
            worker.start()
        try:
            for _ in range(KILLS):
                before = list(counts)
                hand_over(union, how)
                until(
                    lambda before=before: (
                        failures  # type: ignore[misc]
                        or all(now > then for now, then in zip(counts, before, strict=True))
                    ),
                    "a worker does not go on",
                    pause=0.005,
                )
        finally:
            stop.set()
            for worker in workers:
                worker.join()
        assert failures == []
        for number in range(40):
            assert set((union.root / f"low{number}").read_bytes()) <= set(b"x+")
        for index in range(3):
            assert os.listdir(union.root / f"w{index}") == ["kept"]
            kept = (union.root / f"w{index}/kept").read_bytes()
            assert kept == b"".join(b"%d\n" % number for number in range(counts[index]))


def _work(
    root: Path, index: int, counts: list[int], stop: threading.Event, failures: list[BaseException]
) -> None:
    try:
        (root / f"w{index}").mkdir()
        with open(root / f"w{index}/kept", "ab", buffering=0) as kept:
            while not stop.is_set():
                _one_round(root / f"w{index}", root, index, counts[index])
                kept.write(b"%d\n" % counts[index])
                counts[index] += 1
    except BaseException as failure:  # noqa: BLE001 - the test reports it
        failures.append(failure)


def _one_round(here: Path, root: Path, index: int, number: int) -> None:
    """Each call is checked: done once, wholly, whoever did it."""
    folder = here / f"d{number}"
    folder.mkdir()
    fd = os.open(folder / "f", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o640)
    try:
        assert os.write(fd, b"%d" % number * 100) == len(b"%d" % number * 100)
        os.fsync(fd)
        os.link(folder / "f", folder / "l")
        os.rename(folder / "f", folder / "g")
        os.symlink("g", folder / "s")
        assert sorted(os.listdir(folder)) == ["g", "l", "s"]
        assert os.fstat(fd).st_nlink == 2
        os.setxattr(folder / "g", "user.x", b"1", os.XATTR_CREATE)
        assert (folder / "s").read_bytes() == b"%d" % number * 100
        low = root / f"low{(number * 3 + index) % 40}"
        before = low.stat().st_size
        with low.open("ab") as stream:
            stream.write(b"+")
        assert low.stat().st_size == before + 1
        os.rename(folder, here / "moved")
        assert not folder.exists()
        (here / "moved/g").unlink()
        (here / "moved/l").unlink()
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 1, 0) == (b"%d" % number)[:1]
        (here / "moved/s").unlink()
        (here / "moved").rmdir()
        assert not (here / "moved").exists()
    finally:
        os.close(fd)


def test_code_that_does_not_start_leaves_the_old_server(union: Union, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with serving(union):
        fd = os.open(union.root / "f", os.O_RDWR | os.O_CREAT)
        if not union.mounted.status().standby:
            pytest.skip("this kernel does not send requests again")
        with pytest.raises(OSError) as caught:
            union.mounted.upgrade(str(broken))
        assert caught.value.errno == errno.EIO
        with pytest.raises(FileNotFoundError):
            union.mounted.upgrade(str(tmp_path / "missing"))
        os.write(fd, b"on")
        os.fsync(fd)
        os.close(fd)
        assert union.mounted.upgrade(sys.executable).lost == 0
        assert (union.root / "f").read_bytes() == b"on"


def test_without_standby_a_killed_server_is_an_error(tmp_path: Path) -> None:
    union = prepare(tmp_path, standby=False)
    with serving(union):
        kill(union.mounted.status().pid)
        with pytest.raises(OSError) as caught:
            os.listdir(union.root)
        assert caught.value.errno == errno.ENOTCONN
        assert not union.mounted.ensure()
        with pytest.raises(OSError) as caught:
            union.mounted.upgrade()
        assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.slow
def test_server_that_does_not_answer_is_not_replaced(union: Union) -> None:
    with serving(union):
        before = union.mounted.status()
        os.kill(before.pid, signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError):
                union.mounted.ensure()
        finally:
            os.kill(before.pid, signal.SIGCONT)
        assert union.mounted.ensure()
        assert union.mounted.status().pid == before.pid


def test_standby_ends_with_its_mount(union: Union) -> None:
    with serving(union):
        standby = union.mounted.status().standby
        hand_over(union, "kill")
        other = union.mounted.status().standby
        assert other != standby
    until(lambda: not any(_runs(pid) for pid in (standby, other)), "a standby stays behind")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_changes_are_known_over_an_upgrade_and_lost_over_a_kill(union: Union) -> None:
    """A snapshot needs reflinks; what it would ask is asked here."""
    with serving(union):
        record = union.base / "work/record"
        (union.root / "f").write_bytes(b"1")
        hand_over(union, "upgrade")
        assert not jsontext.decode(record.read_bytes())["clean"]
        hand_over(union, "kill")
        with pytest.raises(OSError) as caught:
            union.mounted.changed()
        assert caught.value.errno == errno.EUCLEAN


def test_answers_come_soon(union: Union) -> None:
    """A mount with many known files: users wait while they are found again, and no longer."""
    with serving(union):
        for number in range(1000):
            (union.root / f"f{number}").touch()
        began = time.monotonic()
        hand_over(union, "kill")
        assert (union.root / "f7").stat().st_size == 0
        assert time.monotonic() - began < 60

"""What volume drivers cost: database throughput and snapshot pauses against plain ext4.

    .venv/bin/python benchmarks/drivers.py [--seconds 20] [--rounds 3] [--scale 30] [--json FILE]
    .venv/bin/python benchmarks/drivers.py --files 1000 10000 50000 [--file-size 4096]

Each round runs pgbench (8 clients, fsync on, checksums on) on every subject in turn, first
undisturbed, then with a snapshot taken and kept every four seconds, so that a slow minute
of the machine hits all of them.  Numbers are medians over rounds; ratios are to the folder
on the host's own filesystem in the same run.  The gate is the cgroup freezer, as for
containers.  A pause is how long writers were held; where nobody is held (atomic snapshots)
it is the longest single write to the volume while the snapshot was taken.

With ``--files`` there is no database: volumes hold so many files, a program in the gate writes
to one of them all the time, and shown is what snapshots, the comparison of two, a clone and
the removal of a snapshot take.  Needs root and a PostgreSQL server (``postgresql-15`` or later).
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from database import database, pgbench

from lazarette.storage import process
from lazarette.storage.clock import SystemClock
from lazarette.storage.volumes.btrfs import BtrfsVolumeDriver
from lazarette.storage.volumes.contract import SnapshotInfo, SnapshotKind, VolumeDriver
from lazarette.storage.volumes.fuse import FuseVolumeDriver
from lazarette.storage.volumes.overlay import OverlayVolumeDriver

EVERY_SECONDS = 4.0
FREEZERS = (Path("/sys/fs/cgroup/freezer"), Path("/sys/fs/cgroup"))


@dataclass
class Subject:
    """One thing measured."""

    name: str
    make: Callable[[Path], VolumeDriver] | None
    options: dict[str, str] = field(default_factory=dict)
    plain: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    pauses_ms: list[float] = field(default_factory=list)
    clone_ms: list[float] = field(default_factory=list)


SUBJECTS = (
    Subject("ext4", None),
    Subject("btrfs", lambda root: BtrfsVolumeDriver(root, SystemClock())),
    Subject(
        "btrfs nodatacow",
        lambda root: BtrfsVolumeDriver(root, SystemClock()),
        {"nodatacow": "true"},
    ),
    Subject("overlay", lambda root: OverlayVolumeDriver(root, SystemClock())),
    Subject("fuse", lambda root: FuseVolumeDriver(root, SystemClock())),
)


class Freezer:
    """A gate over a group of processes."""

    def __init__(self) -> None:
        base = next(path for path in FREEZERS if (path / "cgroup.procs").exists())
        self._group = base / f"laz-drivers-{secrets.token_hex(4)}"
        self._group.mkdir()
        self._first = (self._group / "freezer.state").exists()

    def add(self, pid: int) -> None:
        (self._group / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        if self._first:
            (self._group / "freezer.state").write_text("FROZEN")
            while (self._group / "freezer.state").read_text().strip() != "FROZEN":
                pass
            return
        (self._group / "cgroup.freeze").write_text("1")
        while "frozen 1" not in (self._group / "cgroup.events").read_text():
            pass

    def open(self) -> None:
        if self._first:
            (self._group / "freezer.state").write_text("THAWED")
        else:
            (self._group / "cgroup.freeze").write_text("0")

    def remove(self) -> None:
        for _ in range(100):
            try:
                self._group.rmdir()
                return
            except OSError:
                time.sleep(0.05)


class Probe:
    """Writes to a volume all the time and remembers how long each write took."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "probe"
        self._stop = threading.Event()
        self._writes: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        with open(self._path, "wb", buffering=0) as file:
            while not self._stop.wait(0.001):
                started = time.monotonic()
                os.pwrite(file.fileno(), b"x" * 4096, 0)
                self._writes.append((started, time.monotonic()))

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def longest_ms(self, began: float, ended: float) -> float:
        """The longest write that overlaps a time."""
        took = [end - start for start, end in self._writes if end >= began and start <= ended]
        return max(took, default=0.0) * 1000


def measure(subject: Subject, root: Path, seconds: int, scale: int) -> None:
    gate = Freezer()
    driver = None if subject.make is None else subject.make(root / "driver")
    try:
        if driver is None:
            folder = root / "plain"
            folder.mkdir(exist_ok=True)
        else:
            driver.create("db", subject.options)
            folder = driver.mount("db")
        folder.chmod(0o755)
        with database(folder, scale, gate.add) as sockets:
            subject.plain.append(pgbench(sockets, seconds))
            taken: list[str] = []
            last = time.monotonic()

            def snapshot() -> None:
                nonlocal last
                if driver is None or time.monotonic() - last < EVERY_SECONDS:
                    return
                last = time.monotonic()
                taken.append(f"s{len(taken)}")
                info = driver.snapshot("db", taken[-1], gate)
                windows.append((last, time.monotonic(), info))

            windows: list[tuple[float, float, SnapshotInfo]] = []
            with Probe(folder) as probe:
                subject.held.append(pgbench(sockets, seconds, snapshot))
            for began, ended, info in windows:
                atomic = info.kind is SnapshotKind.ATOMIC
                pause = probe.longest_ms(began, ended) if atomic else info.pause_ns / 1e6
                subject.pauses_ms.append(pause)
        if driver is not None and taken:
            started = time.monotonic()
            driver.clone("db", taken[-1], "copy")
            subject.clone_ms.append((time.monotonic() - started) * 1000)
    finally:
        gate.remove()
        if driver is not None:
            driver.unmount("db")
            for name in driver.names():
                driver.remove(name)
            driver.close()


# ---- many files

WRITER = """
import os, sys
with open(sys.argv[1], "r+b", buffering=0) as file:
    while True:
        os.pwrite(file.fileno(), os.urandom(4096), 0)
"""


def _fill(folder: Path, count: int, size: int) -> None:
    content = os.urandom(size)
    for number in range(count):
        if number % 100 == 0:
            inner = folder / f"d{number // 100}"
            inner.mkdir()
        (inner / f"f{number}").write_bytes(content)


def _timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return (time.monotonic() - started) * 1000


def many_files(subject: Subject, root: Path, count: int, size: int, rounds: int) -> str:
    """A row of what a volume of that many files costs."""
    assert subject.make is not None
    gate = Freezer()
    driver = subject.make(root / "driver")
    writer: process.Running | None = None
    try:
        driver.create("db", subject.options)
        folder = driver.mount("db")
        _fill(folder, count, size)
        os.sync()
        writer = process.spawn([sys.executable, "-c", WRITER, str(folder / "d0/f0")])
        gate.add(writer.pid)
        pauses: list[float] = []
        whole: list[float] = []
        with Probe(folder) as probe:
            for number in range(rounds):
                time.sleep(0.5)
                began = time.monotonic()
                info = driver.snapshot("db", f"s{number}", gate)
                ended = time.monotonic()
                whole.append((ended - began) * 1000)
                atomic = info.kind is SnapshotKind.ATOMIC
                pauses.append(probe.longest_ms(began, ended) if atomic else info.pause_ns / 1e6)
        last = f"s{rounds - 1}"
        compared = _timed(lambda: list(driver.changes("db", "s0", last)))
        cloned = _timed(lambda: driver.clone("db", last, "copy"))
        deleted = _timed(lambda: driver.delete_snapshot("db", "s0"))
    finally:
        if writer is not None:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        gate.remove()
        driver.unmount("db")
        for name in driver.names():
            driver.remove(name)
        driver.close()
    shown = (
        *(statistics.median(pauses), max(pauses), statistics.median(whole)),
        *(compared, cloned, deleted),
    )
    return f"{subject.name:18} {count:8}" + "".join(f" {value:9.1f}" for value in shown)


def files_table(subjects: list[Subject], counts: list[int], size: int, parent: str) -> None:
    """Print a row for each driver and number of files."""
    titles = ("pause", "longest", "whole", "changes", "clone", "delete")
    print(f"{'ms':18} {'files':>8}" + "".join(f" {title:>9}" for title in titles))
    for count in counts:
        for subject in subjects:
            root = Path(tempfile.mkdtemp(prefix="laz-drivers-", dir=parent))
            os.chmod(root, 0o755)
            try:
                print(many_files(subject, root, count, size, 5), flush=True)
            finally:
                shutil.rmtree(root)


def _row(subject: Subject, base: Subject) -> str:
    def ratio(own: list[float], other: list[float]) -> str:
        value = statistics.median(own) / statistics.median(other)
        return f"{statistics.median(own):8.0f} {value:6.2f}"

    pauses = sorted(subject.pauses_ms)
    shown = f"{'-':>8} {'-':>8}"
    if pauses:
        high = pauses[min(len(pauses) - 1, len(pauses) * 99 // 100)]
        shown = f"{statistics.median(pauses):8.1f} {high:8.1f}"
    clone = f"{statistics.median(subject.clone_ms):8.1f}" if subject.clone_ms else "       -"
    return (
        f"{subject.name:18} {ratio(subject.plain, base.plain)} "
        f"{ratio(subject.held, base.held)} {shown} {clone}"
    )


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=int, default=30)
    parser.add_argument("--root", default="/var/tmp")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--files", nargs="*", type=int, default=[])
    parser.add_argument("--file-size", type=int, default=4096)
    chosen = parser.parse_args()
    subjects = [s for s in SUBJECTS if not chosen.only or s.name in ("ext4", *chosen.only)]
    if chosen.files:
        files_table(subjects[1:], chosen.files, chosen.file_size, chosen.root)
        return
    for number in range(chosen.rounds):
        for subject in subjects:
            # a fresh folder each time: ext4 is slow where many files were deleted
            root = Path(tempfile.mkdtemp(prefix="laz-drivers-", dir=chosen.root))
            os.chmod(root, 0o755)
            try:
                measure(subject, root, chosen.seconds, chosen.scale)
            finally:
                shutil.rmtree(root)
            print(f"round {number + 1}: {subject.name}: {subject.plain[-1]:.0f} tps", flush=True)
    print(f"\n{'':18} {'alone':>15} {'with snapshots':>15} {'pause, ms':>17} {'clone':>8}")
    columns = ("tps", "ratio", "tps", "ratio", "median", "p99", "ms")
    widths = (8, 6, 8, 6, 8, 8, 8)
    titles = (f"{title:>{width}}" for title, width in zip(columns, widths, strict=True))
    print(f"{'':18} {' '.join(titles)}")
    for subject in subjects:
        print(_row(subject, subjects[0]))
    if chosen.json:
        chosen.json.write_text(
            json.dumps(
                [
                    {
                        "subject": s.name,
                        "plain_tps": s.plain,
                        "held_tps": s.held,
                        "pauses_ms": s.pauses_ms,
                        "clone_ms": s.clone_ms,
                    }
                    for s in subjects
                ],
                indent=1,
            )
        )


if __name__ == "__main__":
    main()

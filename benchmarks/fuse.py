"""The FUSE union against the kernel's overlay and fuse-overlayfs, alternating in one run.

Rows are median times of one operation and their ratios.  ``--cpu N`` pins client and server
to one CPU: placement alone moves metadata timings two- to fourfold.  ``--metric cpu`` counts
the CPU time of client and server instead of the clock, which a busy machine disturbs less.

The rows of many files (``--files``) work in a new folder each round and should lie on tmpfs
(``--folder /dev/shm``): ext4 creates files up to 15 times slower where as many were removed in
the last seconds, whoever asks.

``--pgbench SECONDS`` runs a PostgreSQL on each instead, with 2, 8 and 16 clients in turns, and
prints transactions a second.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import os
import random
import resource
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from database import database, pgbench

from lazarette.fuse.client import UnionMount
from lazarette.fuse.spec import UnionSpec

ROUNDS = 5
CLIENTS = (2, 8, 16)
SCALE = 20


@dataclass
class Contender:
    """One mounted union."""

    name: str
    base: Path
    pid: int = 0

    @property
    def root(self) -> Path:
        return self.base / "merged"

    def cpu_ns(self) -> int:
        paths = glob.glob(f"/proc/{self.pid}/task/*/schedstat") if self.pid else []
        return sum(int(Path(path).read_text().split()[0]) for path in paths)


def folders(base: Path, name: str) -> Contender:
    contender = Contender(name, base / name)
    for part in ("lower", "upper", "work", "merged"):
        (contender.base / part).mkdir(parents=True)
    lower = contender.base / "lower"
    for number in range(2000):
        path = lower / f"d{number % 50}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 1000)
    (lower / "big").write_bytes(random.Random(1).randbytes(64 << 20))
    return contender


@contextlib.contextmanager
def lazarette(base: Path, passthrough: bool) -> Iterator[Contender]:
    contender = folders(base, "lazarette" if passthrough else "lazarette-plain")
    part = contender.base
    union = UnionMount(
        UnionSpec(
            mountpoint=str(contender.root),
            control=str(part / "control"),
            lowers=[str(part / "lower")],
            upper=str(part / "upper"),
            work=str(part / "work"),
            passthrough=passthrough,
        )
    )
    contender.pid = union.start().pid
    try:
        yield contender
    finally:
        union.stop(lazy=True)


@contextlib.contextmanager
def other(base: Path, name: str, command: list[str]) -> Iterator[Contender]:
    contender = folders(base, name)
    part = contender.base
    options = f"lowerdir={part / 'lower'},upperdir={part / 'upper'},workdir={part / 'work'}"
    if command[0] != "mount":
        options += ",allow_other"
    device = ["none"] if command[0] == "mount" else []
    arguments = [*command, "-o", options, *device, str(contender.root)]
    subprocess.run(arguments, check=True, capture_output=True)
    if command[0] != "mount":
        found = subprocess.check_output(["pgrep", "-f", str(contender.root)])
        contender.pid = int(found.split()[0])
    try:
        yield contender
    finally:
        subprocess.run(["umount", "-l", str(contender.root)], check=True)


Work = Callable[[Path], Callable[[int], object]]


def miss(root: Path) -> Callable[[int], object]:
    return lambda _: os.path.lexists(f"{root}/d1/no{time.perf_counter_ns()}")


def setattr_(root: Path) -> Callable[[int], object]:
    path = root / "times"
    path.touch()
    return lambda number: os.utime(path, (number, number))


def open_close(root: Path) -> Callable[[int], object]:
    return lambda number: os.close(os.open(root / "d1" / "f1", os.O_RDONLY))


def create_unlink(root: Path) -> Callable[[int], object]:
    def once(_: int) -> None:
        os.close(os.open(root / "new", os.O_CREAT | os.O_WRONLY))
        os.unlink(root / "new")

    return once


def rename(root: Path) -> Callable[[int], object]:
    (root / "r0").touch()
    return lambda number: os.rename(root / f"r{number % 2}", root / f"r{(number + 1) % 2}")


def warm_stat(root: Path) -> Callable[[int], object]:
    return lambda number: os.stat(root / "d1" / f"f{1 + 50 * (number % 20)}")


def small_reads(root: Path) -> Callable[[int], object]:
    def once(number: int) -> None:
        with open(root / "d2" / f"f{2 + 50 * (number % 20)}", "rb") as stream:
            stream.read()

    return once


def walk(root: Path) -> Callable[[int], object]:
    return lambda _: sum(len(names) for _, _, names in os.walk(root))


def random_writes(root: Path) -> Callable[[int], object]:
    fd = os.open(root / "big", os.O_RDWR)
    page, rng = b"p" * 8192, random.Random(3)
    return lambda _: os.pwrite(fd, page, rng.randrange(8000) * 8192)


def random_reads(root: Path) -> Callable[[int], object]:
    fd, rng = os.open(root / "big", os.O_RDONLY), random.Random(3)
    return lambda _: os.pread(fd, 8192, rng.randrange(8000) * 8192)


def write_fsync(root: Path) -> Callable[[int], object]:
    fd = os.open(root / "log", os.O_CREAT | os.O_RDWR)

    def once(number: int) -> None:
        os.pwrite(fd, b"l" * 8192, number * 8192)
        os.fdatasync(fd)

    return once


def sequential(root: Path) -> Callable[[int], object]:
    block = bytes(1 << 20)

    def once(_: int) -> None:
        with open(root / "stream", "wb", buffering=0) as stream:
            for _ in range(32):
                stream.write(block)

    return once


def untar(root: Path) -> Callable[[int], object]:
    archive = root.parent / "files.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(root.parent / "lower" / "d3", "d3")
        for number in range(10):
            tar.add(root.parent / "lower" / f"d{number}", f"t/d{number}")

    def once(number: int) -> None:
        target = root / f"tar{time.perf_counter_ns()}"
        target.mkdir()
        subprocess.run(["tar", "xf", str(archive), "-C", str(target)], check=True)

    return once


ROWS: list[tuple[str, Work, int]] = [
    ("lookup miss", miss, 300),
    ("setattr", setattr_, 300),
    ("open+close", open_close, 300),
    ("create+unlink", create_unlink, 100),
    ("rename", rename, 100),
    ("untar 440 files", untar, 1),
    ("warm stat", warm_stat, 2000),
    ("warm walk of 2,000 files", walk, 2),
    ("open, read 1 kB, close", small_reads, 300),
    ("8 kB random read", random_reads, 2000),
    ("8 kB random write", random_writes, 2000),
    ("8 kB write+fdatasync", write_fsync, 20),
    ("32 MiB sequential write", sequential, 1),
]


def many_files(contender: Contender, tag: str, count: int, cpu: bool) -> dict[str, float]:
    """Microseconds a file of each step in the life of ``count`` files."""
    root = contender.root
    folder = root / tag
    folder.mkdir()
    old = [str(folder / f"f{number}") for number in range(count)]
    new = [str(folder / f"g{number}") for number in range(count)]

    def create(_: int) -> None:
        for path in old:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))

    def rename(_: int) -> None:
        for path, target in zip(old, new, strict=True):
            os.rename(path, target)

    def unlink(_: int) -> None:
        for path in new:
            os.unlink(path)

    def tar(_: int) -> None:
        subprocess.run(["tar", "xf", root.parent / "many.tar", "-C", folder], check=True)

    def remove(_: int) -> None:
        subprocess.run(["rm", "-r", folder], check=True)

    times = {}
    for name, step in (
        ("create", create),
        ("rename", rename),
        ("unlink", unlink),
        ("tar x", tar),
        ("rm -r", remove),
    ):
        times[f"{name} of {count} files"] = measure(contender, step, 1, cpu) / count
    return times


def pack_many(archive: Path, count: int) -> None:
    """An archive of ``count`` small files, a hundred to a folder."""
    with tarfile.open(archive, "w") as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"d{number // 100}/file{number}")
            info.size = 500 + 37 * (number % 100)
            tar.addfile(info, io.BytesIO(bytes(info.size)))


def measure(contender: Contender, once: Callable[[int], object], count: int, cpu: bool) -> float:
    """Microseconds for one operation."""

    def now() -> int:
        if not cpu:
            return time.perf_counter_ns()
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        children = int((ended.ru_utime + ended.ru_stime) * 1e9)
        return contender.cpu_ns() + children + time.thread_time_ns()

    start = now()
    for number in range(count):
        once(number)
    return (now() - start) / count / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    parser.add_argument("--cpu", type=int, help="pin everything to this CPU")
    parser.add_argument("--metric", choices=("clock", "cpu"), default="clock")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--files", type=int, default=0, help="only the rows of so many files")
    parser.add_argument("--pgbench", type=int, default=0, help="only a database, so many seconds")
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    base = Path(tempfile.mkdtemp(prefix="laz-bench-fuse-", dir=options.folder))
    base.chmod(0o755)
    try:
        with contextlib.ExitStack() as stack:
            contenders = [
                stack.enter_context(lazarette(base, True)),
                stack.enter_context(lazarette(base, False)),
                stack.enter_context(other(base, "overlay", ["mount", "-t", "overlay"])),
            ]
            if shutil.which("fuse-overlayfs"):
                contenders.append(
                    stack.enter_context(other(base, "fuse-overlayfs", ["fuse-overlayfs"]))
                )
            if options.pgbench:
                report_databases(contenders, options.pgbench)
            elif options.files:
                report_many(contenders, options.files, options.metric == "cpu")
            else:
                report(contenders, options.metric == "cpu", options.only)
    finally:
        shutil.rmtree(base)


def heading(contenders: list[Contender]) -> None:
    head = " ".join(f"{each.name:>16}" for each in contenders)
    print(f"{'microseconds':26}{head}   lazarette's time / overlay's, fuse-overlayfs's")


def row(name: str, contenders: list[Contender], times: dict[str, list[float]]) -> None:
    medians = {key: statistics.median(values) for key, values in times.items()}
    ratios = [
        f"{medians['lazarette'] / medians[peer]:.2f}"
        for peer in ("overlay", "fuse-overlayfs")
        if peer in medians
    ]
    columns = " ".join(f"{medians[each.name]:16.1f}" for each in contenders)
    print(f"{name:26}{columns}   {', '.join(ratios)}", flush=True)


def report_databases(contenders: list[Contender], seconds: int) -> None:
    print(f"{'transactions a second':26}" + " ".join(f"{each.name:>16}" for each in contenders))
    rates: dict[int, dict[str, list[float]]] = {}
    for each in contenders:
        (each.root / "database").mkdir()
    for _ in range(ROUNDS):
        for each in contenders:
            with database(each.root / "database", SCALE, lambda pid: None) as sockets:
                for clients in CLIENTS:
                    rate = pgbench(sockets, seconds, clients=clients)
                    rates.setdefault(clients, {}).setdefault(each.name, []).append(rate)
    for clients, found in rates.items():
        row(f"{clients} clients", contenders, found)


def report_many(contenders: list[Contender], count: int, cpu: bool) -> None:
    heading(contenders)
    rows: dict[str, dict[str, list[float]]] = {}
    for each in contenders:
        pack_many(each.base / "many.tar", count)
    for turn in range(3):
        for each in contenders:
            for name, value in many_files(each, f"many{turn}", count, cpu).items():
                rows.setdefault(name, {}).setdefault(each.name, []).append(value)
    for name, times in rows.items():
        row(name, contenders, times)


def report(contenders: list[Contender], cpu: bool, only: str | None) -> None:
    heading(contenders)
    for name, work, count in ROWS:
        if only and only not in name:
            continue
        prepared = [(each, work(each.root)) for each in contenders]
        times: dict[str, list[float]] = {each.name: [] for each in contenders}
        for each, once in prepared:
            measure(each, once, count, cpu)
        for _ in range(ROUNDS):
            for each, once in prepared:
                times[each.name].append(measure(each, once, count, cpu))
        row(name, contenders, times)


if __name__ == "__main__":
    main()

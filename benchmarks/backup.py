"""Backup, restore and check beside restic, the same input, alternating.

``backup.py [--inputs DIR] [--mib N] [--files N] [--rounds N] [--only NAME,…] [--s3 ENDPOINT]``

Without ``--inputs`` it makes inputs of its own.  ``DIR`` holds ``states/db0`` (a PostgreSQL
folder), ``states/db1`` and ``states/db2`` (the same after a light and a heavy change), ``big``
and ``small``.  With ``--s3`` the repositories are in buckets of that server, whose keys are
``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``.

Each row shows medians of wall time and of CPU time (user + system, all threads), ours and
restic's, the ratios, what was added to the repository, and the most memory one run took.  CPU
time is the steadier of the two on a machine that others use.  ``RESTIC`` names the binary.
Repositories are made under ``LAZ_BENCH_DIR``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import backup_inputs
import boto3

ROOT = Path(os.environ.get("LAZ_BENCH_DIR", "/tmp/laz-bench"))
TMPFS = Path("/dev/shm") / f"laz-bench-{os.getpid()}"
RUN = [sys.executable, str(Path(__file__).with_name("backup_run.py"))]
RESTIC = os.environ.get("RESTIC", "restic")


@dataclass
class Measured:
    """Of one command over the rounds: seconds, bytes added to the repository, peak memory."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    added: list[int] = field(default_factory=list)
    peak: int = 0


def _env() -> dict[str, str]:
    # An installed program has its modules compiled.
    inherited = {key: text for key, text in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {
        **inherited,
        "RESTIC_PASSWORD": "x",
        "RESTIC_CACHE_DIR": str(ROOT / "restic-cache"),
        "LAZ_BENCH_CACHE": str(ROOT / "our-cache"),
    }


class Folders:
    """Repositories in folders."""

    def __init__(self) -> None:
        self.ours = str(ROOT / "ours")
        self.restic = str(ROOT / "restic")

    def fresh(self) -> None:
        """Two empty places."""
        for name in ("ours", "restic"):
            shutil.rmtree(ROOT / name, ignore_errors=True)
            (ROOT / name).mkdir()

    def size(self, place: str) -> int:
        """Bytes stored."""
        return sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())

    def keep(self) -> None:
        """Remember what is there."""
        for name in ("ours", "restic", "our-cache", "restic-cache"):
            shutil.rmtree(ROOT / "kept" / name, ignore_errors=True)
            shutil.copytree(ROOT / name, ROOT / "kept" / name)

    def back(self) -> None:
        """Make it again what was remembered."""
        for name in ("ours", "restic", "our-cache", "restic-cache"):
            shutil.rmtree(ROOT / name, ignore_errors=True)
            shutil.copytree(ROOT / "kept" / name, ROOT / name)


class Buckets:
    """Repositories in buckets of an S3 server."""

    def __init__(self, endpoint: str) -> None:
        self._client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        self.ours = f"s3://laz-bench-ours?endpoint={endpoint}"
        self.restic = f"s3:{endpoint}/laz-bench-restic"
        for name in ("laz-bench-ours", "laz-bench-restic"):
            self._client.create_bucket(Bucket=name)
        self._kept: dict[str, set[str]] = {}

    def _objects(self, bucket: str) -> dict[str, int]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {one["Key"]: one["Size"] for page in pages for one in page.get("Contents", [])}

    def _empty(self, but: dict[str, set[str]]) -> None:
        for bucket in ("laz-bench-ours", "laz-bench-restic"):
            for key in self._objects(bucket).keys() - but.get(bucket, set()):
                self._client.delete_object(Bucket=bucket, Key=key)

    def fresh(self) -> None:
        """Two empty places."""
        self._empty({})

    def size(self, place: str) -> int:
        """Bytes stored."""
        bucket = "laz-bench-ours" if place == self.ours else "laz-bench-restic"
        return sum(self._objects(bucket).values())

    def keep(self) -> None:
        """Remember which objects are there: none is ever changed."""
        self._kept = {
            bucket: set(self._objects(bucket)) for bucket in ("laz-bench-ours", "laz-bench-restic")
        }
        for name in ("our-cache", "restic-cache"):
            shutil.rmtree(ROOT / "kept" / name, ignore_errors=True)
            shutil.copytree(ROOT / name, ROOT / "kept" / name)

    def back(self) -> None:
        """Make it again what was remembered."""
        self._empty(self._kept)
        for name in ("our-cache", "restic-cache"):
            shutil.rmtree(ROOT / name, ignore_errors=True)
            shutil.copytree(ROOT / "kept" / name, ROOT / name)


class Bench:
    """Runs rows and prints them."""

    def __init__(self, rounds: int, places: Folders | Buckets) -> None:
        self._rounds = rounds
        self.places = places
        print(
            f"{'work':38} {'ours s':>7} {'cpu':>6} {'restic':>7} {'cpu':>6} {'wall ×':>7}"
            f" {'cpu ×':>6} {'MB ours':>8} {'restic':>7} {'peak MiB':>9} {'restic':>7}"
        )

    def fresh(self) -> None:
        """Two empty repositories."""
        for name in ("our-cache", "restic-cache"):
            shutil.rmtree(ROOT / name, ignore_errors=True)
        self.places.fresh()
        env = _env()
        subprocess.run([*RUN, "init", self.places.ours], check=True, env=env)
        subprocess.run(
            [RESTIC, "-q", "-r", self.places.restic, "init"],
            check=True,
            env=env,
            stdout=subprocess.DEVNULL,
        )

    def _measure(self, argv: list[str], into: Measured, place: str) -> None:
        before = self.places.size(place)
        began = time.perf_counter()
        running = subprocess.Popen(argv, stdout=subprocess.DEVNULL, env=_env())
        _, status, used = os.wait4(running.pid, 0)
        into.wall.append(time.perf_counter() - began)
        running.returncode = os.waitstatus_to_exitcode(status)
        if running.returncode != 0:
            raise SystemExit(f"{argv} ended with {running.returncode}")
        into.cpu.append(used.ru_utime + used.ru_stime)
        into.peak = max(into.peak, used.ru_maxrss >> 10)
        into.added.append(self.places.size(place) - before)

    def row(
        self,
        name: str,
        ours: list[str],
        restic: list[str],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Measure a command of each, alternating; ``before`` prepares a round, unmeasured."""
        one, other = Measured(), Measured()
        for number in range(self._rounds):
            before()
            pairs = [
                ([*RUN, ours[0], self.places.ours, *ours[1:]], one, self.places.ours),
                (
                    [RESTIC, "-q", "-r", self.places.restic, *restic],
                    other,
                    self.places.restic,
                ),
            ]
            for argv, into, place in pairs if number % 2 else pairs[::-1]:
                shutil.rmtree(TMPFS, ignore_errors=True)
                self._measure(argv, into, place)
        shutil.rmtree(TMPFS, ignore_errors=True)
        median = statistics.median
        wall, cpu = median(one.wall), median(one.cpu)
        their_wall, their_cpu = median(other.wall), median(other.cpu)
        print(
            f"{name:38} {wall:7.2f} {cpu:6.2f} {their_wall:7.2f} {their_cpu:6.2f}"
            f" {their_wall / wall:7.1f} {their_cpu / cpu:6.1f}"
            f" {median(one.added) / 1e6:8.1f} {median(other.added) / 1e6:7.1f}"
            f" {one.peak:9} {other.peak:7}",
            flush=True,
        )


def _make(inputs: Path, mib: int, files: int) -> None:
    backup_inputs.pages(inputs / "states" / "db0", mib << 20)
    for name, share in (("db1", 0.02), ("db2", 0.9)):
        shutil.copytree(inputs / "states" / "db0", inputs / "states" / name)
        backup_inputs.touch_pages(inputs / "states" / name, share, len(name) + int(share * 100))
    backup_inputs.big(inputs / "big", mib << 20)
    backup_inputs.small(inputs / "small", files)


def _into(live: Path, state: Path) -> None:
    """Make a folder what a state of it is, writing only where it differs, as a database does."""
    live.mkdir(exist_ok=True)
    argv = ["rsync", "-a", "--inplace", "--delete", "--no-whole-file", f"{state}/", f"{live}/"]
    subprocess.run(argv, check=True)


def _record(before: Path, after: Path) -> list[tuple[str, str, list[tuple[int, int]] | None]]:
    """What a driver's record of changes would say: path, kind, ranges of whole pages."""
    found: list[tuple[str, str, list[tuple[int, int]] | None]] = []
    names = {path.relative_to(before) for path in before.rglob("*")}
    for path in sorted(after.rglob("*")):
        name = path.relative_to(after)
        if name not in names:
            found.append((str(name), "added", None))
        elif path.is_file():
            ranges = backup_inputs.differences(before / name, path)
            if ranges or (before / name).stat().st_mtime_ns != path.stat().st_mtime_ns:
                found.append((str(name), "modified", ranges))
        names.discard(name)
    return found + [(str(name), "removed", None) for name in sorted(names)]


def _changes(bench: Bench, inputs: Path, live: Path) -> None:
    """Rows of a database that changed; its first state is in the repositories."""
    bench.places.keep()
    states = inputs / "states"
    for state, name in (("db1", "light"), ("db2", "heavy")):
        record = _record(states / "db0", states / state)
        file = ROOT / f"{state}.json"
        file.write_text(json.dumps(record))
        changed = sum(length for _, _, ranges in record for _, length in ranges or ())

        def prepare(state: str = state) -> None:
            bench.places.back()
            _into(live, states / state)

        backup = ["backup", str(live)]
        mega = f"{changed / 1e6:.0f} MB"
        bench.row(f"{name} change ({mega}), re-read", backup, backup, prepare)
        by_record = ["record", str(live), str(file)]
        bench.row(f"{name} change ({mega}), by record", by_record, backup, prepare)
    bench.places.back()


def _rows(bench: Bench, inputs: Path, name: str) -> None:
    folder = inputs / name
    if name == "db":
        folder = ROOT / "live"
        _into(folder, inputs / "states" / "db0")
    backup = ["backup", str(folder)]
    bench.row(f"full, {name}", backup, backup, bench.fresh)
    bench.row(f"unchanged, {name}, walked", backup, backup)
    (ROOT / "none.json").write_text("[]")
    by_record = ["record", str(folder), str(ROOT / "none.json")]
    bench.row(f"unchanged, {name}, by record", by_record, backup)
    bench.row(
        f"restore, {name}, into tmpfs",
        ["restore", str(TMPFS)],
        ["restore", "latest", "--target", str(TMPFS)],
    )
    bench.row(f"check reading all, {name}", ["check"], ["check", "--read-data"])
    if name == "db":
        _changes(bench, inputs, folder)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="db,big,small")
    parser.add_argument("--s3")
    options = parser.parse_args()
    ROOT.mkdir(parents=True, exist_ok=True)
    inputs: Path = options.inputs or ROOT / "in"
    if not inputs.exists():
        _make(inputs, options.mib, options.files)
    version = subprocess.run([RESTIC, "version"], check=True, capture_output=True, text=True)
    print(f"{version.stdout.strip()}; load {os.getloadavg()[0]:.1f}")
    bench = Bench(options.rounds, Buckets(options.s3) if options.s3 else Folders())
    for name in options.only.split(","):
        _rows(bench, inputs, name)


if __name__ == "__main__":
    main()

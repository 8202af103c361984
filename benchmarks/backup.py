"""Backup and restore beside restic, the same input, alternating.

``backup.py [MIB [FILES [ROUNDS]]]``; 512 MiB, 20,000 files and 3 rounds unless said.

Each row shows medians of wall time and of CPU time (user + system, all threads), ours and
restic's, and the ratio.  CPU time is the steadier of the two on a machine that others use.
Needs ``restic`` in the path.  Inputs and repositories are made under ``LAZ_BENCH_DIR``.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import backup_inputs

ROOT = Path(os.environ.get("LAZ_BENCH_DIR", "/tmp/laz-bench"))
TMPFS = Path("/dev/shm/laz-bench")
RUN = [sys.executable, str(Path(__file__).with_name("backup_run.py"))]


@dataclass
class Measured:
    """Times of one command over the rounds, seconds, and bytes it added to the repository."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    added: list[int] = field(default_factory=list)


def _measure(argv: list[str], into: Measured, repo: Path) -> None:
    before = _size(repo)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=_env())
    into.wall.append(time.perf_counter() - began)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    into.cpu.append(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)
    into.added.append(_size(repo) - before)


def _env() -> dict[str, str]:
    return {
        **os.environ,
        "RESTIC_PASSWORD": "x",
        "RESTIC_CACHE_DIR": str(ROOT / "restic-cache"),
        "LAZ_BENCH_CACHE": str(ROOT / "our-cache"),
    }


def _size(repo: Path) -> int:
    return sum(path.stat().st_size for path in repo.rglob("*") if path.is_file())


class Bench:
    """Runs rows and prints them."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self.ours = ROOT / "ours"
        self.restic = ROOT / "restic"
        print(
            f"{'work':44} {'ours s':>8} {'cpu':>6} {'restic s':>9} {'cpu':>6}"
            f" {'wall ×':>7} {'cpu ×':>6} {'MB ours':>8} {'restic':>7}"
        )

    def fresh(self) -> None:
        """Two empty repositories."""
        for name in ("ours", "restic", "our-cache", "restic-cache"):
            shutil.rmtree(ROOT / name, ignore_errors=True)
        self.ours.mkdir()
        env = _env()
        subprocess.run([*RUN, "init", str(self.ours)], check=True, env=env)
        subprocess.run(["restic", "-q", "-r", str(self.restic), "init"], check=True, env=env)

    def row(
        self,
        name: str,
        ours: list[str],
        restic: list[str],
        before: Callable[[int], None],
    ) -> None:
        """Measure a command of each, alternating; ``before`` prepares a round, unmeasured."""
        one, other = Measured(), Measured()
        for number in range(self._rounds):
            before(number)
            pairs = [
                ([*RUN, ours[0], str(self.ours), *ours[1:]], one, self.ours),
                (["restic", "-q", "-r", str(self.restic), *restic], other, self.restic),
            ]
            for argv, into, repo in pairs if number % 2 else pairs[::-1]:
                shutil.rmtree(TMPFS, ignore_errors=True)
                _measure(argv, into, repo)
        shutil.rmtree(TMPFS, ignore_errors=True)
        median = statistics.median
        wall, cpu = median(one.wall), median(one.cpu)
        their_wall, their_cpu = median(other.wall), median(other.cpu)
        print(
            f"{name:44} {wall:8.2f} {cpu:6.2f} {their_wall:9.2f} {their_cpu:6.2f}"
            f" {their_wall / wall:7.1f} {their_cpu / cpu:6.1f}"
            f" {median(one.added) / 1e6:8.1f} {median(other.added) / 1e6:7.1f}",
            flush=True,
        )


def _nothing(number: int) -> None:
    del number


def main() -> None:
    mib, files, rounds = (
        int(a) for a in (sys.argv[1:] + ["512", "20000", "3"][len(sys.argv) - 1 :])
    )
    inputs = ROOT / "in"
    if not inputs.exists():
        backup_inputs.pages(inputs / "pages", mib << 20)
        backup_inputs.big(inputs / "big", mib << 20)
        backup_inputs.small(inputs / "small", files)
    bench = Bench(rounds)
    for name in ("pages", "big", "small"):
        folder = str(inputs / name)
        backup = ["backup", folder]
        bench.row(f"full, {name}", backup, backup, lambda _: bench.fresh())
        bench.row(f"unchanged, {name}, walked", backup, backup, _nothing)
        (ROOT / "none.json").write_text("[]")
        bench.row(
            f"unchanged, {name}, by record",
            ["record", folder, str(ROOT / "none.json")],
            backup,
            _nothing,
        )
        target = str(TMPFS)
        bench.row(
            f"restore, {name}, into tmpfs",
            ["restore", target],
            ["restore", "latest", "--target", target],
            _nothing,
        )
        bench.row(f"check reading all, {name}", ["check"], ["check", "--read-data"], _nothing)
        if name == "pages":
            _changes(bench, inputs / name)


def _changes(bench: Bench, folder: Path) -> None:
    record = ROOT / "changed.json"

    seeds = itertools.count(1)

    def touch(share: float) -> Callable[[int], None]:
        def prepare(number: int) -> None:
            del number
            touched = backup_inputs.touch_pages(folder, share, next(seeds))
            record.write_text(json.dumps(touched))

        return prepare

    backup = ["backup", str(folder)]
    bench.row("light change (2 % of pages), walked", backup, backup, touch(0.02))
    by_record = ["record", str(folder), str(record)]
    bench.row("light change (2 % of pages), by record", by_record, backup, touch(0.02))
    bench.row("heavy change (90 % of pages), walked", backup, backup, touch(0.9))


if __name__ == "__main__":
    main()

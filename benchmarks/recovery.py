"""Time until a restored database answers, beside restic, from the same S3 server.

    .venv/bin/python benchmarks/recovery.py [--gib 1,4] [--rounds 3] [--seconds 60] [--json FILE]

For each size a PostgreSQL with the tables of pgbench is stopped and backed up by both to one
server.  Then, on a second daemon that has nothing but the image and the repository's address,
alternating: an instant restore and the start of a container on it, and ``restic restore`` and
the start of a container on that folder, each until a row read by its key is the right one; and
an instant restore by a host that has done one before.
While the last instant volume fills, ``pgbench -S`` runs on it for ``--seconds``; once it is whole,
it runs in turns on it and on the volume that was never restored, and again when the volume
is an ordinary one.  At the end branches are made, until a file of theirs was read.

``RESTIC`` names the binary (0.18 or later).  Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

from protection import server
from tests.support.daemon import Daemon
from tests.support.postgres import Postgres, archive
from tests.support.s3 import S3Server
from tests.support.waiting import until

RESTIC = os.environ.get("RESTIC", "restic")
ROWS = 100_000
BYTES_A_SCALE = 15 << 20
WINDOW_S = 5
TURN_S = 10
PATIENCE_S = 3600.0


@dataclass
class Found:
    """What was measured of one size; times in seconds, rates in queries a second."""

    gib: float
    load: float = 0.0
    instant: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    restic: list[float] = field(default_factory=list)
    fill: float = 0.0
    filling: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    settled: list[float] = field(default_factory=list)
    never: list[float] = field(default_factory=list)
    branch: list[float] = field(default_factory=list)


def selects(database: Postgres, seconds: int, *more: str) -> str:
    """Run ``pgbench -S`` inside the container; what it says."""
    command = ("pgbench", "-n", "-S", "-M", "prepared", "-c", "2", "-j", "2", "-T", str(seconds))
    done = database.daemon.laz(
        *("exec", "-u", "postgres", database.name, *command, *more, "postgres"),
        timeout=seconds + 300,
    )
    return (done.stdout + done.stderr).decode()


def rate(database: Postgres) -> float:
    """Queries a second over one turn."""
    found = re.search(r"tps = ([\d.]+)", selects(database, TURN_S))
    assert found
    return float(found[1])


def windows(database: Postgres, seconds: int) -> list[float]:
    """Queries a second, window by window."""
    said = selects(database, seconds, "-P", str(WINDOW_S))
    return [float(one) for one in re.findall(r"progress: [\d.]+ s, ([\d.]+) tps", said)]


class Bench:
    """One size: two hosts, a store, and the same data in two repositories there."""

    def __init__(self, gib: float, folder: Path, store: S3Server) -> None:
        self.found = Found(gib)
        self.folder = folder
        self.store = store
        self.first, self.second = Daemon(folder / "one"), Daemon(folder / "two")
        self.chosen = random.Random(5)
        self.scale = max(1, round(gib * (1 << 30) / BYTES_A_SCALE))
        self.bucket = store.make_bucket()
        self._target = folder / "restic-target"

    def prepare(self) -> None:
        """Make the database, back it up twice, and set the other host up."""
        self.first.start()
        self.original = Postgres.run(self.first)
        for words in (("-i", "-q", "-s", str(self.scale)), ("-n", "-c", "2", "-t", "2000")):
            assert self.original.pgbench(*words).wait() == 0
        self.first.laz("stop", "-t", "120", self.original.name, timeout=200)
        url, kit = self.store.url(self.bucket, "ours"), str(self.folder / "kit")
        self.first.laz("repo", "init", "--kit-file", kit, url, env=self.store.environment)
        self.first.laz("backup", "run", "pgdata", timeout=PATIENCE_S)
        self.source = Path(self._mountpoint())
        self.run_restic("init")
        self.run_restic("backup", str(self.source))
        self.second.start()
        self.second.laz("load", "-q", "-i", str(archive()))
        self.second.laz("repo", "add", "--kit", kit, url, env=self.store.environment)
        self.first.laz("start", self.original.name)
        self.original.wait()

    def _mountpoint(self) -> str:
        shown = json.loads(self.first.laz("volume", "inspect", "pgdata").stdout)
        return str(shown[0]["Mountpoint"])

    def run_restic(self, *words: str) -> None:
        """Run restic as on a host that never did: without a cache."""
        cache = self.folder / "restic-cache"
        shutil.rmtree(cache, ignore_errors=True)
        subprocess.run(
            [RESTIC, "-q", "-r", f"s3:{self.store.endpoint}/{self.bucket}/restic", *words],
            check=True,
            stdout=subprocess.DEVNULL,
            env={
                **os.environ,
                **self.store.environment,
                "RESTIC_PASSWORD": "x",
                "RESTIC_CACHE_DIR": str(cache),
            },
        )

    # ---- until the first answer

    def measure(self, rounds: int) -> Postgres:
        """Restore in turns; the database on the last instant volume."""
        self.found.load = os.getloadavg()[0]
        kept: Postgres | None = None
        for number in range(rounds):
            for ours in (True, False) if number % 2 else (False, True):
                if ours:
                    self._remove(kept)
                    shutil.rmtree(self.second.root / "data" / "cache", ignore_errors=True)
                    self._remove(self._first_answer(self.found.instant, self._instant))
                    kept = self._first_answer(self.found.again, self._instant)
                else:
                    self._first_answer(self.found.restic, self._by_restic)
                    self.second.laz("rm", "-f", "their")
                    shutil.rmtree(self._target)
        assert kept is not None
        return kept

    def _remove(self, database: Postgres | None) -> None:
        if database is not None:
            self.second.laz("rm", "-f", database.name)
            self.second.laz("volume", "rm", database.volume)

    def _first_answer(self, times: list[float], restore: Callable[[], Postgres]) -> Postgres:
        row = self.chosen.randrange(1, ROWS * self.scale)
        question = f"SELECT abalance FROM pgbench_accounts WHERE aid = {row}"
        right = self.original.sql(question)
        began = time.monotonic()
        database = restore()
        assert database.sql(question) == right, "a wrong answer"
        times.append(time.monotonic() - began)
        return database

    def _instant(self) -> Postgres:
        self.second.laz("restore", "pgdata@latest", "--as", "new", "--instant")
        return Postgres.start(self.second, "new", "new")

    def _by_restic(self) -> Postgres:
        self._target.mkdir()
        self.run_restic("restore", f"latest:{self.source}", "--target", str(self._target))
        owner = self.source.stat()
        os.chown(self._target, owner.st_uid, owner.st_gid)
        self._target.chmod(0o700)
        return Postgres.start(self.second, str(self._target), "their")

    # ---- while it fills, and afterwards

    def rates(self, database: Postgres, seconds: int) -> None:
        """Rates on the instant volume while it fills, whole, and as an ordinary one."""
        began = time.monotonic()
        self.found.filling = windows(database, seconds)
        until(lambda: self._fill(database)["whole"], "it does not become whole", PATIENCE_S)
        self.found.fill = time.monotonic() - began
        self._in_turns(database, self.found.whole)
        self.second.laz("stop", "-t", "120", database.name, timeout=200)
        until(lambda: not self._fill(database), "it does not become ordinary", PATIENCE_S)
        self.second.laz("start", database.name)
        database.wait()
        self._in_turns(database, self.found.settled)

    def _fill(self, database: Postgres) -> dict[str, object]:
        every = cast(list[dict[str, object]], self.second.json("volume", "fill"))
        return next((one for one in every if one["volume"] == database.volume), {})

    def _in_turns(self, database: Postgres, rates: list[float]) -> None:
        for one in (database, self.original):
            selects(one, TURN_S)
        for _ in range(3):
            rates.append(rate(database))
            self.found.never.append(rate(self.original))

    # ---- branches

    def branches(self, rounds: int) -> None:
        """Make branches of the remote point, and read a file of each."""
        for number in range(rounds):
            name = f"branch{number}"
            began = time.monotonic()
            self.second.laz("branch", "pgdata@latest", name)
            shown = self.second.root / "exec" / "fills" / name / "merged"
            assert (shown / "PG_VERSION").read_text().strip().isdigit()
            self.found.branch.append(time.monotonic() - began)
            self.second.laz("volume", "rm", name)


def measured(gib: float, options: argparse.Namespace) -> Found:
    """Everything of one size."""
    folder = Path(tempfile.mkdtemp(prefix="laz-recovery-", dir=options.folder))
    try:
        with server() as store:
            bench = Bench(gib, folder, store)
            try:
                bench.prepare()
                database = bench.measure(options.rounds)
                print(f"first answers: {bench.found.instant} s, restic: {bench.found.restic} s")
                bench.rates(database, options.seconds)
                bench.branches(options.rounds)
            finally:
                bench.second.end()
                bench.first.end()
            return bench.found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def row(found: Found) -> str:
    """One line of the table."""
    middle = statistics.median
    instant, restic, final = middle(found.instant), middle(found.restic), middle(found.whole)
    in_time = found.filling[: 60 // WINDOW_S]
    never = middle(found.never)
    return (
        f"{found.gib:5.1f} {found.load:5.1f} {instant:9.2f} {middle(found.again):7.2f}"
        f" {restic:9.1f} {instant / restic:7.3f}"
        f" {found.fill:7.0f} {max(in_time) / final:9.2f} {final / never:7.2f}"
        f" {middle(found.settled) / never:8.2f} {middle(found.branch):8.2f}"
    )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", default="1,4", help="sizes, with commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="where hosts and data are, while it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    version = subprocess.run([RESTIC, "version"], check=True, capture_output=True, text=True)
    print(version.stdout.strip())
    print(
        f"{'GiB':>5} {'load':>5} {'instant s':>9} {'again s':>7} {'restic s':>9} {'ratio':>7}"
        f" {'fill s':>7} {'60s/final':>9} {'whole':>7} {'ordinary':>8} {'branch s':>8}",
        flush=True,
    )
    every = []
    for size in options.gib.split(","):
        every.append(measured(float(size), options))
        print(row(every[-1]), flush=True)
    first = [statistics.median(one.instant) for one in every]
    print(f"the slowest first answer took {max(first) / min(first):.2f} × the fastest")
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in every], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

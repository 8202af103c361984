"""What protection costs a busy database: pgbench in a container, a backup every ten seconds.

    .venv/bin/python benchmarks/protection.py [--seconds 600] [--reference 60] [--every 10s]
        [--clients 4] [--scale 10] [--restores 10] [--seed 1] [--driver NAME] [--json FILE]

A daemon of its own runs PostgreSQL; pgbench runs inside its container for the whole time: first
``--reference`` seconds without a policy, then ``--seconds`` with a policy to a real S3 server, then
the reference again, so that a machine that becomes slower or faster meanwhile shows.  Then
snapshots chosen at random are restored into new volumes, PostgreSQL is started on each, and the
sums that every transaction of pgbench keeps equal must be equal.

Printed: transactions a second and their ratio, runs and missed runs, the writers' pause, bytes sent
per byte changed, processor time of daemon and jobs, and what the restored databases said.  Ends
with 1 when a run was missed or a restored database is wrong.  Needs root.
"""

from __future__ import annotations

import argparse
import fcntl
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

from tests.support import s3
from tests.support.daemon import Daemon
from tests.support.postgres import Postgres

NS = 1e9
INVARIANT = (
    "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT coalesce(sum(delta), 0) FROM"
    " pgbench_history) AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(tbalance)"
    " FROM pgbench_tellers) AND (SELECT sum(bbalance) FROM pgbench_branches) ="
    " (SELECT sum(abalance) FROM pgbench_accounts)"
)


@dataclass
class Load:
    """How one stretch of pgbench went."""

    tps: float
    latency_ms: float


@contextmanager
def server() -> Iterator[s3.S3Server]:
    """An S3 server that ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="laz-soak-s3-"))
    try:
        with open(folder / "users", "w") as users:
            yield s3.join(folder, users.fileno())
    finally:
        with open(folder / "users", "w") as users:
            fcntl.flock(users, fcntl.LOCK_SH)
        time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)


def bench(database: Postgres, seconds: int, clients: int) -> Load:
    """Run pgbench inside the container."""
    done = database.daemon.laz(
        "exec",
        "-u",
        "postgres",
        database.name,
        *("pgbench", "-n", "-M", "prepared", "-c", str(clients), "-j", "2"),
        *("-T", str(seconds), "postgres"),
        timeout=seconds + 120,
    ).stdout.decode()
    tps = re.search(r"tps = ([\d.]+)", done)
    latency = re.search(r"latency average = ([\d.]+)", done)
    assert tps and latency, done
    return Load(float(tps[1]), float(latency[1]))


def processor_ns(daemon: Daemon) -> int:
    """Processor time of the daemon and of the children it has reaped."""
    assert daemon.process is not None
    stat = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, stat[11:15])) * (10**9 // os.sysconf("SC_CLK_TCK"))


def percentile(values: list[float], share: float) -> float:
    """The smallest value that ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def runs_of(daemon: Daemon) -> list[dict]:
    """All runs of the volume, the oldest first."""
    told = subprocess.run(
        [
            *("curl", "-s", "--unix-socket", str(daemon.socket)),
            "http://d/lazarette/v1/runs?volume=pgdata&limit=100000",
        ],
        capture_output=True,
        check=True,
    ).stdout
    return cast(list[dict], json.loads(told))[::-1]


def skipped(daemon: Daemon) -> int:
    """Runs skipped because the one before still went on."""
    told = subprocess.run(
        [
            *("curl", "-s", "--unix-socket", str(daemon.socket)),
            "http://d/lazarette/v1/metrics",
        ],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    found = re.search(r'lazarette_skipped_runs\{[^}]*volume="pgdata"[^}]*\} ([\d.]+)', told)
    return int(float(found[1])) if found else 0


def restored(database: Postgres, snapshot: str, number: int) -> str:
    """What a restored database says of its invariant: ``t`` when it holds."""
    daemon, volume, name = database.daemon, f"restored-{number}", f"restored-{number}"
    daemon.laz("restore", f"pgdata@{snapshot}", "--as", volume, timeout=600)
    try:
        copy = Postgres.start(daemon, volume, name)
        said = copy.sql(INVARIANT)
        copy.check()
        return said
    except AssertionError as wrong:
        return str(wrong).splitlines()[0]
    finally:
        daemon.laz("rm", "-f", name, check=False)
        daemon.laz("volume", "rm", volume, check=False)


def soak(options: argparse.Namespace, daemon: Daemon, store: s3.S3Server, kit: Path) -> dict:
    """The whole benchmark; what was measured."""
    chosen = random.Random(options.seed)
    bucket = store.make_bucket()
    daemon.laz(
        "repo", "init", "--kit-file", str(kit), store.url(bucket, "host"), env=store.environment
    )
    if options.driver:
        daemon.laz("volume", "create", "-d", options.driver, "pgdata")
    database = Postgres.run(daemon)
    database.daemon.laz(
        *("exec", "-u", "postgres", database.name),
        *("pgbench", "-i", "-q", "-s", str(options.scale), "postgres"),
        timeout=300,
    )
    bench(database, min(options.reference, 10), options.clients)  # warms up
    before = bench(database, options.reference, options.clients)
    daemon.laz("backup", "run", "pgdata", timeout=300)
    busy, began = processor_ns(daemon), time.monotonic()
    first = len(runs_of(daemon))
    daemon.laz("policy", "set", "pgdata", "--every", options.every, "--keep", "last=1000")
    during = bench(database, options.seconds, options.clients)
    took = time.monotonic() - began
    daemon.laz("policy", "rm", "pgdata")
    busy = processor_ns(daemon) - busy
    after = bench(database, options.reference, options.clients)
    runs = runs_of(daemon)[first:]
    left_out = skipped(daemon)
    gaps = [(later["started_ns"] - earlier["started_ns"]) / NS for earlier, later in pairwise(runs)]
    good = [run for run in runs if run["outcome"] in ("ok", "warnings")]
    pauses = [run["pause_ns"] / 1e6 for run in good]
    sent = sum(run["result"]["bytes_sent"] for run in good)
    changed = sum(run["result"]["bytes_read"] for run in good)
    reference = (before.tps + after.tps) / 2
    database.daemon.laz("stop", "-t", "30", database.name)
    picked = chosen.sample(good, min(options.restores, len(good)))
    said = [
        restored(database, run["snapshot"], number) for number, run in enumerate(picked, start=1)
    ]
    return {
        "load": os.getloadavg(),
        "tps_before": before.tps,
        "tps_protected": during.tps,
        "tps_after": after.tps,
        "throughput_ratio": during.tps / reference,
        "latency_ms": (before.latency_ms, during.latency_ms, after.latency_ms),
        "runs": len(runs),
        "failed": len(runs) - len(good),
        "skipped": left_out,
        "longest_gap_s": max(gaps, default=0.0),
        "pause_ms_p50": statistics.median(pauses),
        "pause_ms_p99": percentile(pauses, 0.99),
        "run_s_p50": statistics.median(run["result"]["duration_ns"] / NS for run in good),
        "run_s_max": max((run["ended_ns"] - run["started_ns"]) / NS for run in good),
        "bytes_sent": sent,
        "bytes_changed": changed,
        "sent_per_changed": sent / max(changed, 1),
        "processor_share": busy / NS / took,
        "restored_well": sum(one == "t" for one in said),
        "restored": said,
    }


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--reference", type=int, default=60)
    parser.add_argument("--every", default="10s")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--scale", type=int, default=10)
    parser.add_argument("--restores", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--driver", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="laz-soak-"))
    daemon = Daemon(folder / "host")
    try:
        with server() as store:
            daemon.start()
            try:
                found = soak(options, daemon, store, folder / "kit")
            finally:
                daemon.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, value in found.items():
        print(f"{name:>18}  {value:.3f}" if isinstance(value, float) else f"{name:>18}  {value}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    missed = found["failed"] or found["skipped"]
    return 1 if missed or found["restored_well"] < len(found["restored"]) else 0


if __name__ == "__main__":
    sys.exit(main())

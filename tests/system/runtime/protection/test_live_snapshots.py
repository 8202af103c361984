"""A busy PostgreSQL on a ``fuse`` volume, a snapshot every five seconds, and some of them started.

``LAZ_SOAK_SECONDS`` says for how long; 600, with twenty snapshots started, for the whole test.
``LAZ_SEED`` chooses which.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.postgres import SUMS, Postgres, Writer, lacks

SECONDS = int(os.environ.get("LAZ_SOAK_SECONDS", "20"))
_EVERY_S = 5.0
_STARTED = max(3, min(20, SECONDS // 30))


@pytest.mark.slow
@pytest.mark.timeout(max(300, SECONDS + 60 * _STARTED))
def test_snapshots_of_a_busy_database_start_and_are_right(daemon: Daemon) -> None:
    daemon.laz("volume", "create", "-d", "fuse", "pgdata")
    database = Postgres.run(daemon, initdb="--data-checksums")
    daemon.laz("exec", "-u", "postgres", "db", "pgbench", "-i", "-q", "-s", "5", "postgres")
    load = database.pgbench("-n", "-c", "4", "-T", str(SECONDS + 3000))
    writer = Writer(database)
    writer.start()
    taken: dict[str, int] = {}
    pauses: list[float] = []
    began = time.monotonic()
    try:
        while (due := began + _EVERY_S * (len(taken) + 1)) <= began + SECONDS:
            time.sleep(max(0.0, due - time.monotonic()))
            name = f"s{len(taken)}"
            taken[name] = time.time_ns()
            made = cast(dict, daemon.json("volume", "snapshot", "--name", name, "pgdata"))
            pauses.append(made["snapshots"][0]["pause_ns"] / 1e6)
        took = time.monotonic() - began
        assert load.poll() is None
    finally:
        writer.finish()
        load.kill()
        load.wait()
    print(
        f"{len(taken)} snapshots in {took:.0f} s, {len(writer.acknowledged)} rows acknowledged;"
        f" paused for {statistics.median(pauses):.1f} ms, at most {max(pauses):.1f}"
    )
    daemon.laz("stop", "db")
    chosen = random.Random(os.environ.get("LAZ_SEED", "6"))
    for name in chosen.sample(sorted(taken), min(_STARTED, len(taken))):
        daemon.laz("volume", "clone", f"pgdata@{name}", name)
        copy = Postgres.start(daemon, name, name)
        assert copy.sql(SUMS) == "t", name
        assert lacks(copy, writer.last_before(taken[name])) == 0, name
        copy.check()
        assert copy.sql("SELECT sum(checksum_failures) FROM pg_stat_database") == "0", name
        daemon.laz("rm", "-f", name)
        daemon.laz("volume", "rm", name)

"""The main job, end to end: a database in a container, to S3, back on an empty host."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.postgres import Postgres
from tests.support.s3 import S3Server


class Writer(threading.Thread):
    """Commits one row after another and notes when each was acknowledged."""

    def __init__(self, database: Postgres) -> None:
        super().__init__()
        self.database = database
        self.acknowledged: list[tuple[int, int]] = []
        self._stop_asked = threading.Event()

    def run(self) -> None:
        number = 0
        while not self._stop_asked.is_set():
            number += 1
            self.database.sql(f"INSERT INTO acknowledged VALUES ({number})")
            self.acknowledged.append((number, time.time_ns()))

    def finish(self) -> None:
        self._stop_asked.set()
        self.join()

    def before(self, instant_ns: int) -> list[int]:
        return [number for number, at in self.acknowledged if at < instant_ns]


@pytest.mark.slow
def test_database_comes_back_on_an_empty_host(
    tmp_path: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    url, kit = s3_server.url(s3_bucket, "host"), tmp_path / "kit"
    first = Daemon(tmp_path / "one")
    first.start()
    try:
        database = Postgres.run(first)
        database.sql("CREATE TABLE acknowledged (id bigint PRIMARY KEY)")
        writer = Writer(database)
        writer.start()
        try:
            first.laz("repo", "init", "--kit-file", str(kit), url, env=s3_server.environment)
            full = cast(list[dict], first.json("backup", "run", "pgdata"))[0]
            light = cast(list[dict], first.json("backup", "run", "pgdata"))[0]
        finally:
            writer.finish()
        assert full["outcome"] == light["outcome"] == "ok"
        assert light["consistency"] == "crash"
        assert light["pause_ns"] < 2e9
        assert light["result"]["bytes_read"] < full["result"]["bytes_read"] / 2
    finally:
        first.end()
    shutil.rmtree(first.root)

    second = Daemon(tmp_path / "two")
    second.start()
    try:
        report = _recover(second, url, kit, s3_server)
        assert report["outcome"] == "ok", report
        recovered = Postgres(second, "pgdata", "db", database.port)
        recovered.wait()
        wanted = writer.before(light["instant_ns"])
        there = recovered.sql("SELECT id FROM acknowledged ORDER BY id").split()
        assert [int(row) for row in there][: len(wanted)] == wanted
        recovered.check()
    finally:
        second.end()


def _recover(daemon: Daemon, url: str, kit: Path, server: S3Server) -> dict:
    done = daemon.laz("recover", url, "--kit", str(kit), "--json", env=server.environment)
    return cast(dict, json.loads(done.stdout))

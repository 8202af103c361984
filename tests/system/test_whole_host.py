"""The drill: a compose project of three services comes back on an empty host in another network.

The second host has nothing but the bucket's address and the recovery kit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.images import busybox_archive
from tests.support.netns import cable, new_namespace
from tests.support.postgres import archive
from tests.support.proxy import FaultProxy
from tests.support.s3 import S3Server
from tests.support.site import HostDaemon
from tests.support.waiting import until

from lazarette.runtime.networks.namespaces import NetNamespace

COMPOSE = Path(sys.executable).with_name("docker-compose")
_HERE, _THERE = "198.51.100.9", "198.51.100.10"
_PROJECT = """
name: shop
services:
  web:
    image: busybox
    init: true
    command: sh -c "mkdir /www; echo hello > /www/index.html; exec httpd -f -p 80 -h /www"
    depends_on: [app]
  app:
    image: busybox
    init: true
    command: sh -c "while :; do echo xxxxxxxx | nc db 5432 && echo up >> /data/seen; sleep 1; done"
    volumes: [files:/data]
    depends_on: [db]
    labels: {tier: middle}
  db:
    image: postgres
    environment: {POSTGRES_HOST_AUTH_METHOD: trust}
    volumes: [rows:/var/lib/postgresql/data]
volumes:
  rows:
    labels: {lazarette.backup: "@daily"}
  files:
"""


@pytest.fixture
def elsewhere() -> Iterator[NetNamespace]:
    """A network namespace that reaches this one through a cable."""
    made = new_namespace()
    with ExitStack() as stack:
        stack.callback(made.close)
        cable(stack.enter_context(NetNamespace.current()), _HERE, made, _THERE)
        yield made


def _compose(daemon: Daemon, file: Path, *arguments: str) -> None:
    done = subprocess.run(
        [str(COMPOSE), "-f", str(file), *arguments],
        env={**os.environ, "DOCKER_HOST": daemon.host},
        capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()


def _sql(daemon: Daemon, statement: str) -> str:
    command = ("exec", "-u", "postgres", "shop-db-1", "psql", "-XqAt", "-c", statement)
    return daemon.laz(*command, check=False).stdout.decode().strip()


def _recover(daemon: Daemon, url: str, kit: Path, server: S3Server, *more: str) -> dict:
    command = ("recover", url, "--kit", str(kit), "--json", *more)
    done = daemon.laz(*command, env=server.environment, check=False, timeout=600)
    return cast(dict, json.loads(done.stdout)) if done.returncode in (0, 3) else {}


def _results(report: dict) -> dict[tuple[str, str], str]:
    return {(one["kind"], one["name"]): one["result"] for one in report["items"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_services_come_back(
    tmp_path: Path, s3_server: S3Server, s3_bucket: str, elsewhere: NetNamespace
) -> None:
    if not COMPOSE.exists() or os.geteuid() != 0:
        pytest.skip("docker-compose is not installed, or not root")
    kit, file = tmp_path / "kit", tmp_path / "compose.yaml"
    file.write_text(_PROJECT)
    first = Daemon(tmp_path / "one")
    first.start()
    try:
        for image in (archive(), busybox_archive()):
            first.laz("load", "-q", "-i", str(image), timeout=300)
        _compose(first, file, "up", "-d", "--quiet-pull")
        first.laz("volume", "create", "alone")
        until(lambda: _sql(first, "SELECT 1") == "1", "the database does not answer")
        _sql(first, "CREATE TABLE rows AS SELECT generate_series(1, 1000) AS id")
        until(
            lambda: first.laz("exec", "shop-app-1", "cat", "/data/seen", check=False).stdout,
            "the services do not see each other",
        )
        url = s3_server.url(s3_bucket, "host")
        first.laz("repo", "init", "--kit-file", str(kit), url, env=s3_server.environment)
        first.laz("policy", "set", "shop_files", "--every", "24h", "--keep", "last=5")
        first.laz("run", "--rm", "-v", "alone:/a", "busybox", "touch", "/a/file")
        first.laz("backup", "run", "shop_rows", "shop_files", "alone", timeout=300)
        wanted = _sql(first, "SELECT sum(id) FROM rows")
    finally:
        first.end()

    second = HostDaemon(tmp_path / "two", where=elsewhere)
    second.start()
    try:
        with FaultProxy(s3_server.endpoint, address=_HERE) as way:
            there = url.replace(s3_server.endpoint, way.endpoint)
            listed = _recover(second, there, kit, s3_server, "--dry-run")
            assert set(_results(listed)) == {
                ("volume", "alone"), ("volume", "shop_files"), ("volume", "shop_rows"),
                ("policy", "shop_files"), ("network", "shop_default"),
                *(("container", f"shop-{one}-1") for one in ("db", "app", "web")),
            }  # fmt: skip
            assert not second.laz("volume", "ls", "-q").stdout
            assert not _recover(second, there, kit, s3_server, "--project", "nosuch")

            alone = _results(_recover(second, there, kit, s3_server, "--volume", "alone"))
            assert alone == {("volume", "alone"): "usable, filling"}
            done = _recover(second, there, kit, s3_server, "--project", "shop")
            results = _results(done)
            assert done["outcome"] == "ok", done
            assert ("volume", "alone") not in results
            order = [one["name"] for one in done["items"] if one["kind"] == "container"]
            assert order == ["shop-db-1", "shop-app-1", "shop-web-1"]
            assert {results[("container", name)] for name in order} == {"started"}

            until(lambda: _sql(second, "SELECT sum(id) FROM rows") == wanted, "rows are missing")
            before = second.laz("exec", "shop-app-1", "wc", "-l", "/data/seen").stdout
            assert int(before.split()[0]) > 0
            page = ("exec", "shop-app-1", "wget", "-q", "-O", "-", "http://web/")
            until(
                lambda: second.laz(*page, check=False).stdout == b"hello\n",
                "the service without a volume does not answer by its name",
            )
            until(
                lambda: second.laz("exec", "shop-app-1", "wc", "-l", "/data/seen").stdout != before,
                "the application does not reach its database",
            )
            labels = json.loads(second.laz("inspect", "shop-app-1").stdout)[0]["Config"]["Labels"]
            assert labels["tier"] == "middle"
            rules = cast(list[dict], second.json("policy", "show"))
            assert {one["volume"]: one["schedule"] for one in rules} == {
                "shop_files": "every 1d", "shop_rows": "TZ=UTC @daily",
            }  # fmt: skip
            until(
                lambda: all(
                    one["whole"] for one in cast(list[dict], second.json("volume", "fill"))
                ),
                "the data do not arrive",
            )
            again = _recover(second, there, kit, s3_server)
            assert again["outcome"] == "warnings"
            assert {value for (kind, _), value in _results(again).items() if kind != "network"} == {
                "exists, left as it is"
            }
    finally:
        second.end()

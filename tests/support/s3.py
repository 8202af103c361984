"""A real S3 server (SeaweedFS) for tests: one a test run, shared by all its workers.

The first worker that needs it starts it through a small supervisor (this file run as a
program).  Every worker holds a shared lock on ``users`` while it lives; the supervisor
waits for the exclusive lock, which it gets when the last worker is gone, killed ones
included, and then ends the server and removes its data.

``LAZ_TEST_S3_ENDPOINT`` names another server that runs already, such as Ceph's gateway; it is
used with the keys of ``LAZ_TEST_S3_ACCESS_KEY`` and ``LAZ_TEST_S3_SECRET_KEY``.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from lazarette.backup.stores.s3place import Credentials

ACCESS_KEY = os.environ.get("LAZ_TEST_S3_ACCESS_KEY", "testaccess")
SECRET_KEY = os.environ.get("LAZ_TEST_S3_SECRET_KEY", "testsecretkey0123456789")
ENDPOINT = os.environ.get("LAZ_TEST_S3_ENDPOINT")
_START_TIMEOUT = 60.0


@dataclass(frozen=True)
class S3Server:
    """Where the server is and who may use it."""

    endpoint: str
    credentials: Credentials

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs in its environment to use the server."""
        return {
            "AWS_ACCESS_KEY_ID": self.credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, bucket: str, prefix: str = "") -> str:
        """A store's URL."""
        return f"s3://{bucket}/{prefix}".rstrip("/") + f"?endpoint={self.endpoint}"

    def client(self):
        """A plain boto3 client, to look behind the store's back; close it."""
        return _session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.credentials.access_key,
            aws_secret_access_key=self.credentials.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 3}),
        )

    def make_bucket(self, **options: object) -> str:
        """A new bucket of a unique name."""
        name = f"laz-{secrets.token_hex(8)}"
        with closing(self.client()) as client:
            client.create_bucket(Bucket=name, **options)
        return name

    def remove_bucket(self, name: str) -> None:
        """Empty and remove a bucket."""
        with closing(self.client()) as client:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
                keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
                if keys:
                    client.delete_objects(Bucket=name, Delete={"Objects": keys, "Quiet": True})
            client.delete_bucket(Bucket=name)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The run's server; started when first asked for, unless one was named."""
    if ENDPOINT:
        yield S3Server(ENDPOINT, Credentials(ACCESS_KEY, SECRET_KEY))
        return
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "s3"
    folder.mkdir(exist_ok=True)
    with open(folder / "users", "w") as users:
        yield join(folder, users.fileno())


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> Iterator[str]:
    """The name of an empty bucket of the test's own."""
    name = s3_server.make_bucket()
    yield name
    s3_server.remove_bucket(name)


@functools.cache
def _session() -> boto3.session.Session:
    return boto3.session.Session()


def join(folder: Path, users: int) -> S3Server:
    """Become a user of the folder's server, starting it if there is none."""
    with open(folder / "start", "w") as start:
        fcntl.flock(start, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)
        ready = folder / "ready.json"
        if not ready.exists():
            _start(folder)
        endpoint = json.loads(ready.read_text())["endpoint"]
    return S3Server(endpoint, Credentials(ACCESS_KEY, SECRET_KEY))


def _start(folder: Path) -> None:
    ready = folder / "ready.json"
    with open(folder / "supervisor.log", "ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    end = time.monotonic() + _START_TIMEOUT
    while not ready.exists():
        code = supervisor.poll()
        if code is not None or time.monotonic() > end:
            said = (folder / "supervisor.log").read_text(errors="replace")
            pytest.fail(f"the S3 server did not start (code {code}): {said[-2000:]}")
        time.sleep(0.05)
    # It outlives this worker on purpose; whoever is init's child is reaped by init.
    supervisor.returncode = 0


def _free_ports(count: int) -> list[int]:
    """Ports free together with the ones 10,000 above, where the server puts its gRPC."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(11_000, 20_000)
        if port not in found and all(_is_free(each) for each in (port, port + 10_000)):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _serve(folder: Path, ports: list[int]) -> subprocess.Popen[bytes]:
    """Start the server on four ports and wait until it can store something."""
    master, volume, filer, s3 = ports
    data = folder / "data"
    data.mkdir(exist_ok=True)
    users = {
        "identities": [
            {
                "name": "tests",
                "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            }
        ]
    }
    (folder / "s3.json").write_text(json.dumps(users))
    weed = Path(sysconfig.get_path("scripts")) / "weed"
    options = {
        "dir": data,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.port": master,
        "volume.port": volume,
        "filer.port": filer,
        "s3.port": s3,
        "s3.config": folder / "s3.json",
        "master.telemetry": "false",
        "master.electionTimeout": "1s",
        "master.heartbeatInterval": "150ms",
        "master.volumeSizeLimitMB": 1024,
        "volume.max": 5000,
        "volume.minFreeSpace": 1,
        "volume.fileSizeLimitMB": 512,
        "volume.preStopSeconds": 0,
        "s3.autoCreateBucket": "false",
        "s3.allowDeleteBucketNotEmpty": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.iam": "false",
    }
    with open(folder / "server.log", "ab") as log:
        server = subprocess.Popen(
            [
                str(weed),
                f"-logdir={folder}",
                "server",
                "-filer",
                "-s3",
                *(f"-{name}={value}" for name, value in options.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={
                "PATH": os.environ.get("PATH", ""),
                "HOME": str(folder),
                # each bucket has volumes of its own; seven at once would use up the limit
                "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
                "GOMEMLIMIT": "600MiB",
            },
        )
    end = time.monotonic() + _START_TIMEOUT
    while not _answers(f"http://127.0.0.1:{s3}/healthz") or b'"Url"' not in _answers(
        f"http://127.0.0.1:{master}/dir/status"
    ):
        if server.poll() is not None or time.monotonic() > end:
            server.kill()
            server.wait()
            raise SystemExit((folder / "server.log").read_text(errors="replace")[-2000:])
        time.sleep(0.05)
    temporary = folder / "ready.tmp"
    temporary.write_text(json.dumps({"endpoint": f"http://127.0.0.1:{s3}", "pid": server.pid}))
    temporary.rename(folder / "ready.json")
    return server


def _answers(url: str) -> bytes:
    """The body of a good answer (never empty), or nothing."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.read() or b"ok"
    except (urllib.error.URLError, OSError):
        return b""


def _supervise(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ports = _free_ports(4)
    server = _serve(folder, ports)
    try:
        with open(folder / "users", "w") as users:
            fcntl.flock(users, fcntl.LOCK_EX)
            (folder / "ready.json").unlink()
    finally:
        server.kill()  # its data is of no further use, and an orderly stop takes ten seconds
        server.wait()
        shutil.rmtree(folder / "data", ignore_errors=True)
        _remove_sockets(ports)


def _remove_sockets(ports: list[int]) -> None:
    """Remove what the server binds beside its ports, and leaves when it is killed."""
    for port in (*ports, *(port + 10_000 for port in ports)):
        for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)


if __name__ == "__main__":
    _supervise(Path(sys.argv[1]))

"""Other real databases in containers, made of Debian packages once on this machine."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.daemon import Daemon
from tests.support.waiting import until

from lazarette.runtime.images.assembly import assemble
from lazarette.runtime.images.mmdebstrap import Rootfs, cached_rootfs
from lazarette.runtime.images.model import RunConfig

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MARIADB = """#!/bin/sh
set -eu
if [ ! -d /var/lib/mysql/mysql ]; then
    chown mysql:mysql /var/lib/mysql
    mariadb-install-db --user=mysql --datadir=/var/lib/mysql --skip-test-db >/dev/null
    echo "ALTER USER root@localhost IDENTIFIED BY '$MARIADB_ROOT_PASSWORD';" >/tmp/first.sql
    chmod 644 /tmp/first.sql
    set -- --init-file=/tmp/first.sql "$@"
fi
mkdir -p /run/mysqld && chown mysql /run/mysqld
exec mariadbd --user=mysql --datadir=/var/lib/mysql --skip-networking "$@"
"""
_REDIS = """#!/bin/sh
cd /data && exec redis-server --dir /data --appendonly no --save '' "$@"
"""


@dataclass(frozen=True)
class Image:
    """One image: its name, what it is made of, how it starts."""

    name: str
    packages: Sequence[str]
    entry: str = ""
    command: Sequence[str] = ()

    def archive(self) -> Path:
        """The image as a docker archive, made once on this machine."""
        wanted = Rootfs(tuple(self.packages))
        what = json.dumps([wanted.key(), self.name, self.entry, list(self.command)])
        name = f"{self.name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}.tar"
        path = Path(tempfile.gettempdir()) / "lazarette-tests" / name
        path.parent.mkdir(exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                self._make(wanted, path)
        return path

    def _make(self, wanted: Rootfs, path: Path) -> None:
        root, scripts = cached_rootfs(wanted), path.with_suffix(".scripts")
        scripts.write_bytes(self._scripts())
        config = RunConfig(env=[_PATH], cmd=list(self.command))
        if self.entry:
            config.entrypoint = ["/entry"]
        fresh = path.with_suffix(".new")
        with fresh.open("wb") as target:
            layers = [(root, "packages"), (scripts, "entry point")]
            assemble(
                target,
                layers,
                config=config,
                tags=[f"{self.name}:latest"],
                created="2026-01-02T03:04:05Z",
            )
        fresh.rename(path)
        os.unlink(scripts)

    def _scripts(self) -> bytes:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            entry = tarfile.TarInfo("entry")
            entry.size, entry.mode = len(self.entry.encode()), 0o755
            tar.addfile(entry, io.BytesIO(self.entry.encode()))
        return packed.getvalue()


MARIADB = Image("mariadb", ["mariadb-server"], _MARIADB)
REDIS = Image("redis", ["redis-server", "redis-tools"], _REDIS)
SQLITE = Image("sqlite", ["sqlite3"], command=["sleep", "100000"])


@dataclass(frozen=True)
class Database:
    """A container of one of the images, spoken to by its own client."""

    daemon: Daemon
    name: str
    client: Sequence[str]
    alive: str

    @classmethod
    def start(
        cls,
        daemon: Daemon,
        image: Image,
        name: str,
        mount: str,
        client: Sequence[str],
        alive: str,
        env: Mapping[str, str] | None = None,
    ) -> Database:
        """Start it on a volume, and wait until it answers ``alive``."""
        options = [word for key, value in (env or {}).items() for word in ("-e", f"{key}={value}")]
        daemon.laz("run", "-d", "--name", name, "-v", mount, *options, f"{image.name}:latest")
        made = cls(daemon, name, client, alive)
        until(lambda: made.try_ask(alive) is not None, f"{name} does not answer")
        return made

    def try_ask(self, statement: str) -> str | None:
        """What it answers; None when it does not."""
        done = self.daemon.laz("exec", self.name, *self.client, statement, check=False)
        return done.stdout.decode().strip() if done.returncode == 0 else None

    def ask(self, statement: str) -> str:
        """What it answers."""
        return self.daemon.laz("exec", self.name, *self.client, statement).stdout.decode().strip()

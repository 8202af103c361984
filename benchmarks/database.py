"""A PostgreSQL under pgbench, for benchmarks of what lies beneath it.

Needs root and a PostgreSQL server (``postgresql-15`` or later).
"""

from __future__ import annotations

import glob
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lazarette.storage import process

AS_POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")


def _binaries() -> Path:
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"))
    if not found:
        sys.exit("no PostgreSQL server; apt-get install postgresql-15")
    return Path(found[-1]).parent


@contextmanager
def database(folder: Path, scale: int, started: Callable[[int], object]) -> Iterator[Path]:
    """A server on a data folder, filled by pgbench if it is new; gives the folder of its socket.

    Args:
        folder: below which the data is.
        scale: of pgbench: 100,000 accounts each.
        started: called with the server's process before it serves.
    """
    programs = _binaries()
    data = folder / "data"
    fresh = not data.exists()
    sockets = Path(tempfile.mkdtemp(prefix="laz-database-"))
    shutil.chown(sockets, "postgres")
    if fresh:
        data.mkdir(mode=0o700)
        shutil.chown(data, "postgres", "postgres")
        process.run(
            [*AS_POSTGRES, str(programs / "initdb"), "-k", "-D", str(data)], timeout=None, cwd="/"
        )
    settings = {
        "listen_addresses": "",
        "unix_socket_directories": str(sockets),
        "shared_buffers": "256MB",
        "max_wal_size": "1GB",
        "checkpoint_timeout": "30s",
    }
    flags = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    server = process.spawn([*AS_POSTGRES, str(programs / "postgres"), "-D", str(data), *flags])
    started(server.pid)
    try:
        ready = [str(programs / "pg_isready"), "-q", "-h", str(sockets)]
        while process.run(ready, check=False).code:
            time.sleep(0.1)
        if fresh:
            process.run(
                [
                    *(*AS_POSTGRES, str(programs / "pgbench"), "-h", str(sockets)),
                    *("-i", "-q", "-s", str(scale), "postgres"),
                ],
                timeout=None,
                cwd="/",
            )
        yield sockets
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
        shutil.rmtree(sockets, ignore_errors=True)


def pgbench(
    sockets: Path, seconds: int, meanwhile: Callable[[], None] = lambda: None, clients: int = 8
) -> float:
    """Transactions a second; ``meanwhile`` is called until the end."""
    programs = _binaries()
    with tempfile.TemporaryFile() as out:
        run = process.spawn(
            [
                *(*AS_POSTGRES, str(programs / "pgbench"), "-h", str(sockets)),
                *("-c", str(clients), "-j", "2", "-T", str(seconds), "postgres"),
            ],
            stdout=out.fileno(),
        )
        while run.poll() is None:
            meanwhile()
            time.sleep(0.05)
        out.seek(0)
        match = re.search(rb"tps = ([\d.]+)", out.read())
    if match is None:
        raise SystemExit("pgbench failed")
    return float(match[1])

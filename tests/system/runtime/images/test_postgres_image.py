"""The PostgreSQL image behaves as people know it from Docker's (needs Debian's mirror once)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.daemon import Daemon
from tests.support.postgres import IMAGE, archive

from lazarette.runtime.images.mmdebstrap import host_suite
from lazarette.storage.errors import LazaretteError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("postgres-image")]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("postgres")
    try:
        host_suite()
    except LazaretteError as other:
        pytest.skip(str(other))
    image = archive()
    one = Daemon(root / "lazd")
    one.start()
    try:
        one.docker("load", "-i", str(image))
        yield one
    finally:
        one.end()


@pytest.fixture
def name(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[str]:
    one = request.node.name.replace("[", "-").replace("]", "")
    yield one
    daemon.docker("rm", "-f", "-v", one, check=False)


def wait_ready(daemon: Daemon, name: str, user: str = "postgres") -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        probe = daemon.docker(
            "exec", name, "pg_isready", "-h", "127.0.0.1", "-U", user, check=False
        )
        if probe.returncode == 0:
            return
        time.sleep(0.2)
    logs = daemon.docker("logs", name, check=False)
    raise AssertionError(f"not ready: {(logs.stdout + logs.stderr).decode()[-3000:]}")


def sql(daemon: Daemon, name: str, query: str, *arguments: str) -> str:
    done = daemon.docker("exec", name, "psql", "-At", *arguments, "-c", query)
    return done.stdout.decode().strip()


def test_no_password_is_refused(daemon: Daemon, name: str) -> None:
    done = daemon.docker("run", "--name", name, IMAGE, check=False)
    assert done.returncode == 1
    assert b"You must specify POSTGRES_PASSWORD to a non-empty value" in done.stderr


def test_variables_scripts_restart_and_stop(daemon: Daemon, name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("it's secret\n")
    (tmp_path / "init").mkdir()
    (tmp_path / "init/1.sql").write_text("CREATE TABLE made (at int);")
    (tmp_path / "init/2.sh").write_text('psql -U "$POSTGRES_USER" "$POSTGRES_DB" -c "TABLE made"')
    daemon.docker(
        "run", "-d", "--name", name, "--shm-size", "64m",
        "-v", f"{tmp_path}/secret:/run/secret:ro",
        "-v", f"{tmp_path}/init:/docker-entrypoint-initdb.d:ro",
        "-e", "POSTGRES_PASSWORD_FILE=/run/secret",
        "-e", "POSTGRES_USER=bob",
        "-e", "POSTGRES_DB=shop",
        "-e", "POSTGRES_INITDB_ARGS=--locale=C --encoding='UTF8'",
        IMAGE, "-c", "max_connections=17",
    )  # fmt: skip
    wait_ready(daemon, name, "bob")
    login = ("-U", "bob", "-d", "shop")
    assert sql(daemon, name, "SHOW data_checksums", *login) == "on"
    assert sql(daemon, name, "SHOW max_connections", *login) == "17"
    assert sql(daemon, name, "SHOW data_directory", *login) == "/var/lib/postgresql/data"
    assert sql(daemon, name, "SELECT count(*) FROM made", *login) == "0"
    assert sql(daemon, name, "INSERT INTO made VALUES (1) RETURNING at", *login).startswith("1")
    url = "postgresql://bob:it%27s%20secret@localhost/shop"
    assert sql(daemon, name, "SELECT 1", url) == "1"
    daemon.docker("stop", "-t", "60", name)
    # SIGINT must stop it: after SIGKILL the code is 137
    state = daemon.docker("inspect", "-f", "{{.State.ExitCode}}", name).stdout.strip()
    assert state == b"0"
    daemon.docker("start", name)
    wait_ready(daemon, name, "bob")
    assert sql(daemon, name, "SELECT count(*) FROM made", *login) == "1"
    logs = daemon.docker("logs", name)
    assert b"Skipping initialization" in logs.stdout + logs.stderr


def test_any_user_may_run_it(daemon: Daemon, name: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o777)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o001 == 0:
            parent.chmod(parent.stat().st_mode | 0o011)
    daemon.docker(
        "run", "-d", "--name", name, "--user", "1234:5678", "-v", f"{tmp_path}/data:/data",
        "-e", "PGDATA=/data/pg", "-e", "POSTGRES_HOST_AUTH_METHOD=trust", IMAGE,
    )  # fmt: skip
    wait_ready(daemon, name)
    assert sql(daemon, name, "SELECT 1", "-h", "127.0.0.1", "-U", "postgres") == "1"
    assert (tmp_path / "data/pg/PG_VERSION").stat().st_uid == 1234


def test_other_programs_run_without_a_database(daemon: Daemon, name: str) -> None:
    done = daemon.docker("run", "--rm", "--name", name, IMAGE, "postgres", "--version")
    assert done.stdout.startswith(b"postgres (PostgreSQL)")
    done = daemon.docker("run", "--rm", "--name", name, IMAGE, "id", "-u", "postgres")
    assert done.stdout == b"999\n"

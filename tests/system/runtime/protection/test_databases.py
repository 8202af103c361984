"""Profiles of other databases, with their real servers: held, released, restored, whole.

PostgreSQL is in ``test_holding``; MongoDB has no Debian package, so its profile is not tried here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from tests.support.daemon import Daemon
from tests.support.databases import MARIADB, REDIS, SQLITE, Database
from tests.support.waiting import until


@pytest.fixture
def host(daemon: Daemon, tmp_path: Path) -> Daemon:
    daemon.laz("repo", "init", "--kit-file", str(tmp_path / "kit"), str(tmp_path / "repo"))
    return daemon


class Busy(threading.Thread):
    """Does something again and again, and counts."""

    def __init__(self, work: Callable[[int], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._end = threading.Event()
        self.count = 0

    def run(self) -> None:
        while not self._end.is_set():
            self.count += 1
            self._work(self.count)

    def __enter__(self) -> Busy:
        self.start()
        until(lambda: self.count > 3)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()


@pytest.fixture
def backup(host: Daemon) -> Iterator[Callable[[str, str], dict]]:
    """Back a volume up by a profile; the run."""

    def run(volume: str, profile: str) -> dict:
        host.laz("policy", "set", volume, "--cron", "@yearly", "--consistency", profile)
        return cast(list[dict], host.json("backup", "run", volume))[0]

    yield run


def restored(host: Daemon, volume: str) -> str:
    host.laz("restore", f"{volume}@latest", "--as", f"{volume}-back")
    return f"{volume}-back"


@pytest.mark.slow
def test_mariadb(host: Daemon, backup: Callable[[str, str], dict]) -> None:
    host.laz("load", "-q", "-i", str(MARIADB.archive()))
    client = ("sh", "-c", 'MYSQL_PWD=s exec mariadb -uroot -N -B -e "$0"')
    env = {"MARIADB_ROOT_PASSWORD": "s"}

    def start(name: str, volume: str) -> Database:
        mount = f"{volume}:/var/lib/mysql"
        return Database.start(host, MARIADB, name, mount, client, "SELECT 1", env)

    database = start("db", "mydata")
    database.ask(
        "CREATE DATABASE t; CREATE TABLE t.a (n int PRIMARY KEY) ENGINE=InnoDB;"
        " CREATE TABLE t.b (n int PRIMARY KEY) ENGINE=InnoDB"
    )
    pair = "START TRANSACTION; INSERT INTO t.a VALUES ({0}); INSERT INTO t.b VALUES ({0}); COMMIT"
    with Busy(lambda n: database.ask(pair.format(n))) as writer:
        done = backup("mydata", "auto")
        after = writer.count
        until(lambda: writer.count > after + 2, "writers are still locked out")
    assert (done["outcome"], done["consistency"]) == ("ok", "application"), done
    copy = start("copy", restored(host, "mydata"))
    a, b = copy.ask("SELECT count(*) FROM t.a; SELECT count(*) FROM t.b").split()
    assert a == b
    assert int(a) >= 3
    assert copy.ask("CHECK TABLE t.a, t.b").count("status\tOK") == 2
    drill = cast(dict, host.json("backup", "drill", "mydata"))
    assert drill["outcome"] == "ok", drill


@pytest.mark.slow
def test_redis(host: Daemon, backup: Callable[[str, str], dict]) -> None:
    """Nobody is held: what the server wrote down by itself is whole."""
    host.laz("load", "-q", "-i", str(REDIS.archive()))
    client = ("sh", "-c", 'echo "$0" | redis-cli --no-raw | cat')

    def start(name: str, volume: str) -> Database:
        return Database.start(host, REDIS, name, f"{volume}:/data", client, "PING")

    database = start("cache", "rdata")
    until(lambda: "PONG" in database.ask("PING"))
    set_both = "EVAL \"redis.call('SET','a',ARGV[1]) redis.call('SET','b',ARGV[1])\" 0 {}"
    with Busy(lambda n: database.ask(set_both.format(n))):
        done = backup("rdata", "auto")
    assert (done["outcome"], done["consistency"]) == ("ok", "application"), done
    copy = start("copy", restored(host, "rdata"))
    until(lambda: "PONG" in copy.ask("PING"))
    a, b = copy.ask("GET a"), copy.ask("GET b")
    assert a == b
    assert int(a.strip('"')) >= 3
    drill = cast(dict, host.json("backup", "drill", "rdata"))
    assert drill["outcome"] == "ok", drill


@pytest.mark.slow
@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite(host: Daemon, backup: Callable[[str, str], dict], journal: str) -> None:
    host.laz("load", "-q", "-i", str(SQLITE.archive()))
    client = ("sqlite3", "-cmd", ".timeout 30000", "/data/app.db")

    def start(name: str, volume: str) -> Database:
        return Database.start(host, SQLITE, name, f"{volume}:/data", client, "SELECT 1")

    database = start("app", "ldata")
    tables = "CREATE TABLE a (n INTEGER PRIMARY KEY); CREATE TABLE b (n INTEGER PRIMARY KEY)"
    database.ask(f"PRAGMA journal_mode={journal}; {tables}")
    pair = "BEGIN IMMEDIATE; INSERT INTO a VALUES ({0}); INSERT INTO b VALUES ({0}); COMMIT"
    with Busy(lambda n: database.ask(pair.format(n))) as writer:
        done = backup("ldata", "sqlite")
        after = writer.count
        until(lambda: writer.count > after + 2, "writers are still locked out")
    assert (done["outcome"], done["consistency"]) == ("ok", "application"), done
    copy = start("copy", restored(host, "ldata"))
    assert copy.ask("PRAGMA integrity_check") == "ok"
    a, b = copy.ask("SELECT count(*) FROM a; SELECT count(*) FROM b").split()
    assert a == b
    assert int(a) >= 3


@pytest.mark.slow
def test_mysql_writers_go_on_when_the_daemon_dies_in_between(
    host: Daemon, backup: Callable[[str, str], dict]
) -> None:
    """The read lock belongs to a session that ends with the daemon, at the latest by itself."""
    host.laz("load", "-q", "-i", str(MARIADB.archive()))
    client = ("sh", "-c", 'MYSQL_PWD=s exec mariadb -uroot -N -B -e "$0"')
    mount, env = "mydata:/var/lib/mysql", {"MARIADB_ROOT_PASSWORD": "s"}
    database = Database.start(host, MARIADB, "db", mount, client, "SELECT 1", env)
    database.ask("CREATE DATABASE t; CREATE TABLE t.a (n int PRIMARY KEY)")
    locked = "SELECT count(*) FROM information_schema.processlist WHERE user = 'root'"
    host.laz("policy", "set", "mydata", "--cron", "@yearly", "--consistency", "mysql")
    asking = threading.Thread(
        target=lambda: host.laz("backup", "run", "mydata", check=False), daemon=True
    )
    asking.start()
    asking.join(0.4)
    host.kill()
    host.start()
    asking.join(60)
    until(lambda: database.try_ask(locked) == "1", "a session of the dead daemon lives on")
    database.ask("INSERT INTO t.a VALUES (1)")

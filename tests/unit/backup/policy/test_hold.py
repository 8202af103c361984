from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import pytest

from lazarette.backup.policy.access import Ended, Session, User, in_stop_order
from lazarette.backup.policy.hold import Holder, HoldLimits, HookFailed, ProfileFailed
from lazarette.backup.policy.model import ConsistencyRule, HoldMode, Hook
from lazarette.backup.policy.outcome import Consistency
from lazarette.backup.policy.profiles import (
    POSTGRES,
    PROFILES,
    keeps_database,
    profile_for,
    profile_named,
)
from lazarette.backup.policy.quiesce import Quiesced
from lazarette.backup.policy.sqlitelock import SqliteBusy, SqliteLocks
from lazarette.storage.clock import FakeClock, SystemClock
from lazarette.storage.errors import InternalError, InvalidArgument
from lazarette.storage.state import State

WEB = User("1", "web", "nginx", {"com.docker.compose.depends_on": "db:service_started:true"})
DB = User("2", "db", "postgres:16")


class Died(BaseException):
    """The daemon was killed."""


class Client(Session):
    """A database client that answers as told."""

    def __init__(self, world: World, answers: list[str]) -> None:
        self._world = world
        self._lines = [answer.encode() + b"\n" for answer in answers]
        self.closed = False

    async def send(self, data: bytes) -> None:
        self._world.did("send " + data.decode().split()[0])

    async def read_line(self) -> bytes:
        await asyncio.sleep(0)
        return self._lines.pop(0) if self._lines else b""

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._world.did("close")


class World:
    """Containers in memory: what was done to them, and death at a chosen step."""

    def __init__(self, *users: User) -> None:
        self._users = users
        self.paused: set[str] = set()
        self.stopped: set[str] = set()
        self.log: list[str] = []
        self.codes: dict[str, int] = {}
        self.answers = ["lazarette-ready", "START WAL", "LABEL: x", "lazarette-done"]
        self.death = -1
        self.client: Client | None = None

    def did(self, what: str) -> None:
        self.death -= 1
        if self.death == 0:
            raise Died(f"before {what}")
        self.log.append(what)

    def did_and_died(self) -> None:
        self.death -= 1
        if self.death == 0:
            raise Died("after")

    async def users(self, volumes: Sequence[str]) -> Sequence[User]:
        return self._users

    async def execute(self, container: str, argv: Sequence[str], timeout: float) -> Ended:
        self.did(f"{container}: {argv[-1][:40]}")
        self.did_and_died()
        return Ended(self.codes.get(argv[0], 0), stderr=b"first\nit broke")

    async def session(self, container: str, argv: Sequence[str]) -> Session:
        self.client = Client(self, list(self.answers))
        return self.client

    async def execute_on_host(self, argv: Sequence[str], timeout: float) -> Ended:
        return await self.execute("host", argv, timeout)

    async def pause(self, container: str) -> None:
        self.did("pause " + container)
        self.paused.add(container)
        self.did_and_died()

    async def unpause(self, container: str) -> None:
        self.did("unpause " + container)
        self.paused.discard(container)
        self.did_and_died()

    async def stop(self, container: str) -> int:
        self.did("stop " + container)
        self.stopped.add(container)
        self.did_and_died()
        return self.codes.get("stop " + container, 0)

    async def start(self, container: str) -> None:
        self.did("start " + container)
        self.stopped.discard(container)
        self.did_and_died()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    made = State(tmp_path / "state.db")
    yield made
    made.close()


def holder(world: World, state: State, longest: float = 20.0) -> Holder:
    clock = SystemClock()
    return Holder(world, Quiesced(state, clock), clock, HoldLimits(2.0, longest))


async def hold(
    world: World, state: State, rule: ConsistencyRule, *, atomic: bool = True
) -> Consistency:
    async with holder(world, state).still(1, ["v"], [], rule) as held:
        world.did("snapshot")
    return held.consistency(atomic=atomic)


async def test_the_default_touches_nobody(state: State) -> None:
    world = World(WEB, DB)
    assert await hold(world, state, ConsistencyRule()) is Consistency.CRASH
    assert await hold(world, state, ConsistencyRule(), atomic=False) is Consistency.NONE
    assert world.log == ["snapshot"] * 2


async def test_stopping_honours_dependencies(state: State) -> None:
    world = World(DB, WEB)
    rule = ConsistencyRule(mode=HoldMode.STOP)
    assert await hold(world, state, rule, atomic=False) is Consistency.APPLICATION
    assert world.log == ["stop 1", "stop 2", "snapshot", "start 2", "start 1"]
    world.codes["stop 2"] = 137
    assert await hold(world, state, rule, atomic=False) is Consistency.NONE
    assert await hold(world, state, rule) is Consistency.CRASH


async def test_pausing_leaves_those_paused_by_others(state: State) -> None:
    world = World(DB, User("3", "old", paused=True))
    rule = ConsistencyRule(mode=HoldMode.PAUSE)
    assert await hold(world, state, rule, atomic=False) is Consistency.CRASH
    assert world.log == ["pause 2", "snapshot", "unpause 2"]


async def test_a_session_is_held_over_the_snapshot(state: State) -> None:
    world = World(DB)
    async with holder(world, state).still(1, ["v"], [], ConsistencyRule("auto")) as held:
        world.did("snapshot")
    assert held.consistency(atomic=True) is Consistency.APPLICATION
    assert held.consistency(atomic=False) is Consistency.NONE
    assert held.documents == {"backup_label": b"START WAL\nLABEL: x\n"}
    assert world.log == ["send SELECT", "snapshot", "send \\if", "close"]
    assert held.held_ns == 0


async def test_a_session_that_breaks_is_never_overstated(state: State) -> None:
    world = World(DB)
    world.answers = ["lazarette-ready", "START WAL"]
    async with holder(world, state).still(1, ["v"], [], ConsistencyRule("postgres")) as held:
        pass
    assert held.consistency(atomic=True) is Consistency.CRASH
    assert "ended early" in held.warnings[0]
    world.answers = []
    with pytest.raises(ProfileFailed):
        await hold(world, state, ConsistencyRule("postgres"))
    assert world.client is not None
    assert world.client.closed


async def test_not_every_user_has_a_profile(state: State) -> None:
    assert await hold(World(DB, WEB), state, ConsistencyRule("auto")) is Consistency.CRASH


async def test_hooks(state: State) -> None:
    rule = ConsistencyRule(
        "hooks",
        before=(Hook(("flush",), "web"), Hook(("sync",))),
        after=(Hook(("resume",), "web"), Hook(("log",))),
    )
    world = World(WEB)
    assert await hold(world, state, rule) is Consistency.APPLICATION
    assert world.log == ["web: flush", "host: sync", "snapshot", "web: resume", "host: log"]
    world = World(WEB)
    world.codes["sync"] = 1
    with pytest.raises(HookFailed, match="it broke"):
        await hold(world, state, rule)
    assert world.log == ["web: flush", "host: sync", "web: resume", "host: log"]
    world = World(WEB)
    world.codes["resume"] = 1
    async with holder(world, state).still(1, ["v"], [], rule) as held:
        pass
    assert any("it broke" in warning for warning in held.warnings)
    assert Quiesced(state, FakeClock()).held_runs() == []


async def test_what_is_held_too_long_is_released(state: State) -> None:
    world = World(DB)
    rule = ConsistencyRule(mode=HoldMode.PAUSE)
    async with holder(world, state, longest=0.1).still(1, ["v"], [], rule) as held:
        await asyncio.sleep(0.4)
        assert world.paused == set()
    assert held.consistency(atomic=False) is Consistency.NONE
    assert world.log == ["pause 2", "unpause 2"]


async def test_a_failing_snapshot_releases(state: State) -> None:
    world = World(DB)
    with pytest.raises(InternalError):
        async with holder(world, state).still(1, ["v"], [], ConsistencyRule(mode=HoldMode.PAUSE)):
            raise InternalError("no snapshot")
    assert world.paused == set()


RULES = {
    "pause": ConsistencyRule(mode=HoldMode.PAUSE),
    "stop": ConsistencyRule(mode=HoldMode.STOP),
    "mongodb": ConsistencyRule("mongodb"),
    "hooks": ConsistencyRule(
        before=(Hook(("before",), "web"),), after=(Hook(("after",), "web"), Hook(("last",)))
    ),
    "postgres": ConsistencyRule("postgres"),
}


@pytest.mark.parametrize("name", RULES)
async def test_death_at_every_moment(state: State, name: str) -> None:
    """A11: killed at each step of a run, and once more while that is being put right."""
    rule = RULES[name]
    for death in range(1, 40):
        for second in (0, 1, 2, 3):
            world = World(DB, WEB)
            world.death = death
            try:
                await hold(world, state, rule)
            except Died:
                pass
            else:
                assert death > 4
                return
            begun = list(world.log)
            world.death = second
            quiesced = Quiesced(state, FakeClock())
            try:
                reports = await quiesced.release_all(world)
            except Died:
                world.death = -1
                reports = await Quiesced(state, FakeClock()).release_all(world)
            assert world.paused == world.stopped == set()
            assert Quiesced(state, FakeClock()).held_runs() == []
            if name == "mongodb" and any(
                "fsyncLock" in each or "const e" in each for each in begun
            ):
                assert world.log[-1].startswith(("2:", "1:"))
            for hook in ("web: after", "host: last"):
                known = sum("not known" in each for each in chain(*reports.values()))
                assert world.log.count(hook) <= 1
                if name == "hooks" and begun and not known:
                    assert world.log.count(hook) == 1


def test_profiles_are_found_by_image() -> None:
    def found(image: str, **labels: str) -> str:
        user = User("1", "x", image, {f"lazarette.{name}": word for name, word in labels.items()})
        profile = profile_for("auto", user)
        return profile.name if profile else ""

    assert found("postgres:16") == "postgres"
    assert found("registry:5000/bitnami/postgresql@sha256:00") == "postgres"
    assert found("timescale/timescaledb-ha:pg16") == "postgres"
    assert found("mariadb") == "mysql"
    assert found("mongo:7") == "mongodb"
    assert found("redis:alpine") == found("valkey/valkey") == "redis"
    assert found("prometheuscommunity/postgres-exporter") == ""
    assert found("mongo-express") == found("nginx") == ""
    assert found("mine", consistency="mariadb") == "mysql"
    assert found("postgres", consistency="crash") == ""
    with pytest.raises(InvalidArgument):
        profile_named("oracle")
    assert set(PROFILES) == {"postgres", "mysql", "mongodb", "redis", "sqlite"}
    assert POSTGRES.begin.endswith("\n")


def test_volumes_of_databases_are_told_by_image_or_place() -> None:
    assert keeps_database("postgres:17", "/srv/anything")
    assert keeps_database("me/shop", "/var/lib/postgresql/data")
    assert not keeps_database("me/shop", "/var/lib/postgresql/data/sub")
    assert not keeps_database("nginx", "/data")
    assert not keeps_database("", "/x")


def test_shell_scripts_of_profiles_parse() -> None:
    scripts = [
        argv[2]
        for profile in PROFILES.values()
        for argv in (
            profile.check,
            getattr(profile, "argv", ()),
            getattr(profile, "before", ()),
            getattr(profile, "after", ()),
        )
        if argv
    ]
    assert len(scripts) >= 8
    for script in scripts:
        subprocess.run(["sh", "-n", "-c", script], check=True)


def test_circles_of_dependencies_end() -> None:
    one = User("1", "a", labels={"com.docker.compose.depends_on": "b:x:y"})
    two = User("2", "b", labels={"com.docker.compose.depends_on": "a:x:y"})
    assert len(in_stop_order([two, one])) == 2


SHELL = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=20, isolation_level=None)
for line in sys.stdin:
    print(db.execute(line).fetchall(), flush=True)
"""


class Database:
    """A program that has a database open, as a container would: locks are between processes."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SHELL, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self._in.close()
        self._process.wait(30)
        self._out.close()

    def tell(self, sql: str) -> None:
        self._in.write(sql + "\n")
        self._in.flush()

    def answers(self, seconds: float) -> bool:
        return bool(select.select([self._out], [], [], seconds)[0])

    def run(self, sql: str) -> str:
        self.tell(sql)
        return self._out.readline().strip()


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_sqlite_writers_wait_and_readers_go_on(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "deep" / "app.db"
    path.parent.mkdir()
    with Database(path) as writer, Database(path) as reader:
        assert writer.run(f"PRAGMA journal_mode={mode}") == f"[('{mode}',)]"
        writer.run("CREATE TABLE t (x)")
        with SqliteLocks(os.fsencode(tmp_path), SystemClock()) as locks:
            assert locks.databases == 1
            writer.tell("INSERT INTO t VALUES (1)")
            assert reader.run("SELECT count(*) FROM t") == "[(0,)]"
            assert not writer.answers(0.3)
        assert writer.answers(20)
        assert reader.run("SELECT count(*) FROM t") == "[(1,)]"


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_sqlite_locks_wait_for_a_transaction(tmp_path: Path, mode: str) -> None:
    with Database(tmp_path / "app.db") as db:
        db.run(f"PRAGMA journal_mode={mode}")
        db.run("CREATE TABLE t (x)")
        db.run("BEGIN IMMEDIATE")
        with pytest.raises(SqliteBusy), SqliteLocks(os.fsencode(tmp_path), SystemClock(), 0.1):
            pass
        db.run("COMMIT")
        with SqliteLocks(os.fsencode(tmp_path), SystemClock(), 0.1):
            pass


def test_sqlite_search_follows_no_links(tmp_path: Path) -> None:
    volume, other = tmp_path / "volume", tmp_path / "other.db"
    volume.mkdir()
    with Database(other) as db:
        db.run("CREATE TABLE t (x)")
    (volume / "link.db").symlink_to(other)
    (volume / "folder").symlink_to(tmp_path)
    (volume / "text").write_text("x" * 1000)
    with SqliteLocks(os.fsencode(volume), SystemClock()) as locks:
        assert locks.databases == 0

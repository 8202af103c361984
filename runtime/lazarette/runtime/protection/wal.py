"""PostgreSQL's log of volumes whose policy says so: taken from the volume, stored, let go of.

The database's archive command is a small script in the volume (``files/keep-wal.sh``).  It
copies each finished segment into a folder beside the data and answers only when that is on
disk.  Every few seconds what lies there is stored in the repository, see
:mod:`lazarette.backup.recovery.wal`, and only then removed; while the store is away it waits.

A token in the volume tells whether it was set back meanwhile (a restore, a rollback, another
host's volume): then what the database writes is another history, and a new chain begins.

What is in the volume is the container's to write: it is reached by open folders, no symlink is
followed, and segments are copied out before anything reads them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import msgspec

from lazarette.backup import beneath
from lazarette.backup.jobs.model import LOG_PREFIX, BackupJob, Request
from lazarette.backup.policy.model import Policy
from lazarette.backup.recovery import wal
from lazarette.backup.recovery.wal import READY, NoCluster, Segment, Stored
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.errors import WrongState
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.protection import watching
from lazarette.runtime.protection.fencing import Fencing
from lazarette.runtime.protection.fills import FillService
from lazarette.runtime.protection.holding import EngineAccess
from lazarette.runtime.protection.jobs import JobRunner
from lazarette.runtime.protection.policies import PolicyBook
from lazarette.runtime.protection.repositories import RepositoryBook, repository_of
from lazarette.storage.clock import NANOSECONDS, Clock
from lazarette.storage.errors import (
    Conflict,
    DamagedData,
    InternalError,
    LazaretteError,
    NotFound,
    Unavailable,
    VolumeNotFound,
)
from lazarette.storage.state import State
from lazarette.storage.volumes.manager import VolumeManager

log = logging.getLogger(__name__)

_LOOK_S = 5.0
_ROTATE_NS = 60 * NANOSECONDS
_MOST_AT_ONCE = 64
_LARGEST = 1 << 30
_SQL_S, _FLUSH_S = 20.0, 60.0
_SCRIPT, _TOKEN = b"keep", b"token"
_COMMAND = f'sh {wal.FOLDER.decode()}/{_SCRIPT.decode()} "%p" "%f"'
_PSQL = (
    "sh",
    "-c",
    'exec psql -X -q -A -t -v ON_ERROR_STOP=1 -U "${POSTGRES_USER:-postgres}" -d postgres -c "$1"',
    "psql",
)
_SEEN = (
    "SELECT current_setting('archive_mode'), current_setting('archive_command'),"
    " coalesce(current_setting('archive_library', true), ''),"
    " current_setting('archive_timeout') = '0'"
)
_WAITING = "SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'"
_MIGRATIONS = (
    """
    CREATE TABLE wal (
        volume TEXT PRIMARY KEY,
        repository TEXT NOT NULL,
        token TEXT NOT NULL DEFAULT '',
        next TEXT NOT NULL DEFAULT '',
        rotated_ns INTEGER NOT NULL DEFAULT 0,
        stored_ns INTEGER NOT NULL DEFAULT 0,
        until_ns INTEGER NOT NULL DEFAULT 0,
        segment TEXT NOT NULL DEFAULT '',
        state TEXT NOT NULL DEFAULT '',
        error TEXT NOT NULL DEFAULT ''
    ) STRICT
    """,
)

OFF, ON, RESTART, IDLE, FAILED = "off", "on", "restart", "idle", "failed"


class NotKept(NotFound):
    """The log of a volume is not kept."""

    number = 332


class OwnArchiving(Conflict):
    """The database has an archive command of its own."""

    number = 333


class LogState(msgspec.Struct, frozen=True):
    """The log of one volume.

    Attributes:
        volume: whose.
        repository: where it is stored.
        state: ``on``; ``restart``, when the database must be started anew for it; ``idle``,
            when no container runs; ``failed``, with ``error``.
        stored_ns: when something was last stored; 0 for never.
        until_ns: when the last stored transaction ended; 0 for none.
        segment: the newest stored segment.
        error: what is wrong.
    """

    volume: str
    repository: str
    state: str
    stored_ns: int
    until_ns: int
    segment: str
    error: str


@dataclass
class _Waiting:
    """A folder of a volume where segments wait."""

    descriptor: int
    names: Sequence[str]


class WalService:
    """Keeps the logs of databases.

    Args:
        volumes: the volumes.
        containers: where the databases run.
        fills: volumes that are not all here are left alone.
        book: which volumes' logs are wanted.
        repositories: where they are stored.
        fencing: whether this host may continue a history.
        jobs: starts the processes that store.
        scratch: folder for segments on their way.
        state: the daemon's database.
        clock: time.

    Attributes:
        passive: whether a volume follows another host's.
    """

    def __init__(
        self,
        volumes: VolumeManager,
        containers: ContainerManager,
        fills: FillService,
        book: PolicyBook,
        repositories: RepositoryBook,
        fencing: Fencing,
        jobs: JobRunner,
        scratch: Path,
        state: State,
        clock: Clock,
    ) -> None:
        self._volumes = volumes
        self._containers = containers
        self._access = EngineAccess(containers)
        self._fills = fills
        self._book = book
        self._repositories = repositories
        self._fencing = fencing
        self._jobs = jobs
        self._scratch = scratch
        self._state = state
        self._clock = clock
        self._locks: dict[str, asyncio.Lock] = {}
        self._asked: dict[str, int] = {}
        self._bare: dict[str, int] = {}
        self._watcher: asyncio.Task[None] | None = None
        self.passive: Callable[[str], bool] = lambda volume: False
        state.migrate("wal", _MIGRATIONS)

    def start(self) -> None:
        """Begin to watch."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True, mode=0o700)
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Watch no more; what waits in volumes waits on."""
        await watching.end(self._watcher)

    def all(self) -> list[LogState]:
        """The logs that are or were kept, by volume."""
        fields = ", ".join(LogState.__struct_fields__)
        rows = self._state.rows(f"SELECT {fields} FROM wal ORDER BY volume")
        return [msgspec.convert(dict(row), type=LogState) for row in rows]

    async def flush(self, volume: str) -> int:
        """Store all that is written by now; the moment until which that is known to be so.

        Raises:
            NotKept: the log is not kept.
            Unavailable: the database does not hand it over.
        """
        self._volumes.get(volume)
        policy = self._book.of(volume)
        if policy is None or not policy.wal:
            raise NotKept(
                f"the log of volume {volume} is not kept",
                hint=f"laz policy set {volume} --every 15m --wal",
            )
        moment = self._clock.now_ns()
        users = self._running(volume)
        async with self._lock(volume):
            await self._look(volume, policy)
            if users:
                await self._sql(users, "SELECT pg_switch_wal()")
                await self._handed_over(users, volume)
            await self._store(volume, repository_of(self._repositories, policy))
        return moment

    async def freshen(self, volume: str, repository: str) -> int:
        """As :meth:`flush`, as far as that is possible now; 0 when it is not.

        Args:
            volume: whose log.
            repository: the name of that in which it is wanted.
        """
        try:
            moment = await self.flush(volume)
            kept = {one.volume: one.repository for one in self.all()}
            return moment if kept.get(volume) == repository else 0
        except (VolumeNotFound, NotKept):
            return 0
        except LazaretteError as bad:
            log.warning("the newest log of %s is not stored: %s", volume, bad)
            return 0

    def set_back(self, volume: str) -> None:
        """A volume was, or is about to be, set back: what is written next is another chain."""
        with self._state.write() as db:
            db.execute("UPDATE wal SET token = '', next = '' WHERE volume = ?", (volume,))
        self._asked.pop(volume, None)

    # ---- looking

    async def _watch(self) -> None:
        while True:
            try:
                await self._look_at_all()
            except Exception:
                log.exception("the logs of databases")
            await asyncio.sleep(_LOOK_S)

    async def _look_at_all(self) -> None:
        wanted = {
            volume: policy
            for volume, policy in (await asyncio.to_thread(self._book.all)).items()
            if policy.wal and not self.passive(volume)
        }
        for volume, policy in wanted.items():
            async with self._lock(volume):
                try:
                    await self._look(volume, policy)
                except (LazaretteError, OSError) as bad:
                    self._failed(volume, bad)
        here = {one.name: one for one in await asyncio.to_thread(self._volumes.list)}
        unwanted = here.keys() - wanted.keys()
        self._bare = {name: self._bare[name] for name in self._bare.keys() & unwanted}
        for name in unwanted:
            if here[name].users and not self.passive(name):
                await asyncio.to_thread(self._discard, name)
        for known in self.all():
            if known.volume not in wanted and known.state != OFF:
                self.set_back(known.volume)  # what it hands over from now on is not kept
                self._note(known.volume, state=OFF, error="")

    async def _look(self, volume: str, policy: Policy) -> None:
        repository = repository_of(self._repositories, policy)
        self._begin(volume, repository)
        users = self._running(volume)
        if not users:
            self._note(volume, state=IDLE, error="")
            return
        self._fills.require_ordinary(volume)
        await asyncio.to_thread(self._equip, volume)
        started = max(one.state.started_ns for one in users)
        if self._asked.get(volume) != started:
            ready = await self._ask_for(users, volume)
            self._note(volume, state=ON if ready else RESTART, error="")
            if not ready:
                return
            self._asked[volume] = started
        await self._store(volume, repository)
        self._note(volume, state=ON, error="")

    def _failed(self, volume: str, bad: LazaretteError | OSError) -> None:
        told = bad.message if isinstance(bad, LazaretteError) else str(bad)
        known = {one.volume: one.error for one in self.all()}
        if known.get(volume) != told:
            log.error("the log of %s: %s", volume, told)
        self._begin(volume, "")
        self._note(volume, state=FAILED, error=told)

    def _running(self, volume: str) -> list[Container]:
        return [one for one in self._containers.using_volume(volume) if one.state.running]

    # ---- the database

    async def _ask_for(self, users: Sequence[Container], volume: str) -> bool:
        """Set the archive command; whether the database obeys it already."""
        mode, command, library, no_timeout = (await self._sql(users, _SEEN)).split("|")
        if library or command not in ("", "(disabled)", _COMMAND):
            raise OwnArchiving(
                f"the database of volume {volume} has an archive command of its own: "
                f"{library or command}",
                hint="unset it, or take wal out of the policy",
            )
        if mode == "off":
            await self._sql(users, "ALTER SYSTEM SET archive_mode = 'on'")
        if command != _COMMAND:
            await self._sql(users, f"ALTER SYSTEM SET archive_command = '{_COMMAND}'")
        if no_timeout == "t":
            await self._sql(users, "ALTER SYSTEM SET archive_timeout = '60s'")
        await self._sql(users, "SELECT pg_reload_conf()")
        return mode != "off"

    async def _handed_over(self, users: Sequence[Container], volume: str) -> None:
        end = self._clock.monotonic_ns() + int(_FLUSH_S * NANOSECONDS)
        while await self._sql(users, _WAITING) != "0":
            if self._clock.monotonic_ns() > end:
                raise Unavailable(
                    f"the database of volume {volume} does not hand its log over",
                    hint="its own log says why the archive command fails",
                )
            await asyncio.sleep(0.1)

    async def _sql(self, users: Sequence[Container], statement: str) -> str:
        told = ""
        for one in users:
            try:
                done = await self._access.execute(one.id, (*_PSQL, statement), _SQL_S)
            except WrongState as ended:
                told = ended.message
                continue
            if done.code == 0:
                return done.stdout.decode(errors="replace").strip()
            told = done.last_words()
        raise Unavailable(f"no database answers in its container: {told}")

    # ---- the volume

    def _equip(self, volume: str) -> None:
        """Put the script and the folder for segments where the database finds them."""
        cluster = self._cluster(volume)
        try:
            owner = wal.owner_of(cluster)
            spool = wal.open_spool(cluster, owner)
        finally:
            os.close(cluster)
        try:
            script = resources.files("lazarette.runtime.protection") / "files" / "keep-wal.sh"
            wanted = script.read_bytes()
            if wal.content_of(spool, _SCRIPT) != wanted:
                wal.write_into(spool, _SCRIPT, wanted, owner, 0o700)
            if beneath.status(spool, READY) is None:
                os.mkdir(READY, 0o700, dir_fd=spool)
                os.chown(READY, *owner, dir_fd=spool)
        finally:
            os.close(spool)

    def _cluster(self, volume: str) -> int:
        """Open the folder of a mounted volume's cluster; the caller closes it."""
        root = os.open(self._volumes.get(volume).mountpoint, beneath.OPEN_DIRECTORY)
        try:
            return beneath.open_directory(root, wal.find_cluster(root))
        finally:
            os.close(root)

    def _spool(self, volume: str) -> int:
        cluster = self._cluster(volume)
        try:
            return os.open(wal.FOLDER, beneath.OPEN_DIRECTORY, dir_fd=cluster)
        finally:
            os.close(cluster)

    @contextmanager
    def _waiting(self, volume: str) -> Iterator[_Waiting]:
        spool = self._spool(volume)
        try:
            ready = os.open(READY, beneath.OPEN_DIRECTORY, dir_fd=spool)
        finally:
            os.close(spool)
        try:
            with os.scandir(ready) as listing:
                names = sorted(one.name for one in listing if wal.is_kept(one.name))
            yield _Waiting(ready, names[:_MOST_AT_ONCE])
        finally:
            os.close(ready)

    def _discard(self, volume: str) -> None:
        """Remove what a database hands over though nobody wants it: a restored one does.

        A volume where nothing can be handed over is looked at again when a user was started.
        """
        users = self._containers.using_volume(volume)
        started = max((one.state.started_ns for one in users), default=0)
        if self._bare.get(volume) == started:
            return
        try:
            with self._waiting(volume) as waiting:
                for name in waiting.names:
                    os.unlink(name, dir_fd=waiting.descriptor)
        except (wal.NoCluster, FileNotFoundError):
            self._bare[volume] = started
        except (LazaretteError, OSError) as bad:
            log.debug("what volume %s hands over is left there: %s", volume, bad)

    # ---- storing

    async def _store(self, volume: str, repository: str) -> None:
        """Store what waits; a new chain first if the volume was set back."""
        if not self._volumes.users(volume):
            return
        await asyncio.to_thread(self._fencing.require, volume, repository)
        if not await asyncio.to_thread(self._is_continued, volume):
            await self._begin_chain(volume, repository)
        while await self._store_some(volume, repository):
            pass
        await asyncio.to_thread(self._rotate, volume)

    async def _store_some(self, volume: str, repository: str) -> bool:
        batch = self._scratch / secrets.token_hex(8)
        batch.mkdir(mode=0o700)
        try:
            segments = await asyncio.to_thread(self._copy_out, volume, batch)
            if not segments:
                return False
            await self._ship(volume, repository, batch, Stored(segments=segments), 0)
            until = max(one.last_ns for one in segments)
            known = next(one for one in self.all() if one.volume == volume)
            self._note(
                volume,
                stored_ns=self._clock.now_ns(),
                until_ns=max(until, known.until_ns),
                segment=segments[-1].name,
            )
            await asyncio.to_thread(self._let_go, volume, [one.name for one in segments])
            return True
        finally:
            await asyncio.to_thread(shutil.rmtree, batch, True)

    def _copy_out(self, volume: str, batch: Path) -> list[Segment]:
        with self._waiting(volume) as waiting:
            return [_copied(waiting.descriptor, name, batch) for name in waiting.names]

    def _let_go(self, volume: str, names: Sequence[str]) -> None:
        with self._waiting(volume) as waiting:
            for name in names:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=waiting.descriptor)

    async def _ship(
        self, volume: str, repository: str, folder: Path, stored: Stored, instant_ns: int
    ) -> None:
        job = BackupJob(
            root=str(folder),
            volume=LOG_PREFIX + volume,
            host=socket.gethostname(),
            instant_ns=instant_ns,
            meta=stored.text(),
        )
        access = self._repositories.get(repository).access
        done = await self._jobs.run(Request(job, access, str(self._repositories.cache)))
        if done.failure is not None:
            raise done.failure.error()
        if done.outcome != "ok":
            told = "; ".join(done.warnings) or done.outcome
            raise InternalError(f"the log of {volume} was not stored whole: {told}")

    # ---- whether the volume was set back

    def _is_continued(self, volume: str) -> bool:
        spool = self._spool(volume)
        try:
            found = wal.content_of(spool, _TOKEN).decode(errors="replace")
        finally:
            os.close(spool)
        row = self._state.row("SELECT token, next FROM wal WHERE volume = ?", (volume,))
        return row is not None and bool(found) and found in (row["token"], row["next"])

    async def _begin_chain(self, volume: str, repository: str) -> None:
        """Say in the repository that from now on it is another history.

        It begins when the database was started: nothing before that is of this one.  The very
        first one begins now: what was written before the archive command was set is not kept.
        """
        row = self._state.row("SELECT stored_ns, rotated_ns FROM wal WHERE volume = ?", (volume,))
        first = row is None or not row["rotated_ns"]
        users = self._running(volume)
        started = max((one.state.started_ns for one in users), default=0)
        instant = self._clock.now_ns() if first or not started else started
        folder = self._scratch / secrets.token_hex(8)
        folder.mkdir(mode=0o700)
        try:
            (folder / "begins").write_text(f"{wal.when(instant)}\n")
            await self._ship(volume, repository, folder, Stored(begins=True), instant)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, True)
        await asyncio.to_thread(self._rotate, volume, True)
        log.info("a chain of the log of %s begins", volume)

    def _rotate(self, volume: str, now: bool = False) -> None:
        """Change the token now and then, so that older states of the volume have another."""
        row = self._state.row("SELECT rotated_ns FROM wal WHERE volume = ?", (volume,))
        moment = self._clock.now_ns()
        age = moment - (int(row["rotated_ns"]) if row is not None else 0)
        if not now and 0 <= age < _ROTATE_NS:
            return
        fresh = secrets.token_hex(16)
        self._note(volume, next=fresh)
        spool = self._spool(volume)
        try:
            seen = os.fstat(spool)
            wal.write_into(spool, _TOKEN, fresh.encode(), (seen.st_uid, seen.st_gid))
        finally:
            os.close(spool)
        self._note(volume, token=fresh, next="", rotated_ns=moment)

    # ---- records

    def _lock(self, volume: str) -> asyncio.Lock:
        return self._locks.setdefault(volume, asyncio.Lock())

    def _begin(self, volume: str, repository: str) -> None:
        """Make a volume's record; a log that goes elsewhere from now on begins anew there."""
        with self._state.write() as db:
            db.execute(
                "INSERT OR IGNORE INTO wal (volume, repository) VALUES (?, ?)",
                (volume, repository),
            )
            if repository:
                db.execute(
                    "UPDATE wal SET repository = ?, token = '', next = ''"
                    " WHERE volume = ? AND repository != ?",
                    (repository, volume, repository),
                )

    def _note(self, volume: str, **values: str | int) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._state.write() as db:
            db.execute(f"UPDATE wal SET {columns} WHERE volume = ?", (*values.values(), volume))


def _copied(folder: int, name: str, batch: Path) -> Segment:
    """Copy one waiting file out of a volume.

    Raises:
        DamagedData: it is nothing that PostgreSQL hands over.
    """
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    with open(source, "rb") as opened:
        seen = os.fstat(opened.fileno())
        if not stat.S_ISREG(seen.st_mode) or seen.st_size > _LARGEST:
            raise DamagedData(f"{name} in the folder of finished segments is none")
        content = opened.read(_LARGEST)
    (batch / name).write_bytes(content)
    last = wal.last_end_ns(content) if len(name) == 24 else 0
    return Segment(name, hashlib.sha256(content).hexdigest(), len(content), last)


__all__ = ["LogState", "NoCluster", "WalService"]

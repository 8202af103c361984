"""Instant volumes: mounted at once, filled from the repository while they are used.

Below the volume's root stands a folder ``.lazarette-fill`` with the local tree and its
presence maps; users of the volume are given the mount of a FUSE server over it instead of
the root.  States::

    filling ──▶ whole ──▶ settled
               (all data here)   nobody uses it any more: the tree is moved up into the
                                 volume's root, which is then ordinary

A *lazy* one is not filled: what it does not change stays in the repository, and what it reads
in a cache on disk that all volumes of one repository share, until it is told to become whole.

A fill is written down before its server starts.  Killing the daemon ends neither the
server nor the fill; a killed server is replaced at the next look.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lazarette.backup.recovery.source import facts_of
from lazarette.backup.repository.snapshots import SnapshotRecord
from lazarette.fuse import jsontext
from lazarette.fuse.client import Mount
from lazarette.fuse.filler import Progress as FillProgress
from lazarette.fuse.latesource import FACTS, Facts
from lazarette.fuse.mount import is_mounted
from lazarette.fuse.spec import LazySpec
from lazarette.runtime.protection import watching
from lazarette.runtime.protection.repositories import RepositoryBook
from lazarette.storage.beneath import names, open_folder, opened, remove_path
from lazarette.storage.copying import renew_metadata
from lazarette.storage.errors import (
    InternalError,
    InUse,
    LazaretteError,
    Unavailable,
    VolumeNotFound,
)
from lazarette.storage.state import State
from lazarette.storage.volumes.manager import VolumeManager

log = logging.getLogger(__name__)

FOLDER = ".lazarette-fill"
_TREE = "tree"
_SOURCE = "lazarette.backup.recovery.source:open_source"
_USER = "fill"
_LOOK_S = 1.0
_MIGRATIONS = (
    """
    CREATE TABLE fills (
        volume TEXT PRIMARY KEY,
        repository TEXT NOT NULL,
        snapshot TEXT NOT NULL,
        rate INTEGER NOT NULL,
        whole INTEGER NOT NULL DEFAULT 0
    ) STRICT
    """,
    "ALTER TABLE fills ADD COLUMN lazy INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE fills ADD COLUMN source TEXT NOT NULL DEFAULT ''",
)
CACHE_BYTES = 10 << 30


class StillFilling(Unavailable):
    """The volume's data have not all arrived."""

    number = 376
    exit_code = 55


@dataclass(frozen=True)
class Fill:
    """One volume that is not ordinary yet.

    Attributes:
        volume: its name.
        repository: where its data come from.
        snapshot: which state.
        rate: limit in bytes a second; 0 for none.
        whole: all data are here.
        lazy: data come only when they are read.
        source: the volume whose state it is.
    """

    volume: str
    repository: str
    snapshot: str
    rate: int
    whole: bool
    lazy: bool = False
    source: str = ""


class FillService:
    """Fills volumes.

    Args:
        volumes: the volumes.
        repositories: where from.
        state: the daemon's database.
        run_root: folder of mount points and control sockets.
        patience: seconds a read of what is not here waits for the store before it fails.

    Attributes:
        replaced: called, in the loop, with a volume whose server died and was replaced: its
            users still have the mount of the dead one.
    """

    def __init__(
        self,
        volumes: VolumeManager,
        repositories: RepositoryBook,
        state: State,
        run_root: Path,
        patience: float,
    ) -> None:
        self.replaced: Callable[[str], Awaitable[None]] = _nothing
        self._volumes = volumes
        self._repositories = repositories
        self._state = state
        self._run_root = run_root
        self._patience = patience
        self._watcher: asyncio.Task[None] | None = None
        self._died: list[str] = []
        self._postponing = 0
        # Between looking whether a server answers and starting one, nobody else may do so.
        self._serving = threading.Lock()
        state.migrate("fills", _MIGRATIONS)

    # ---- what the rest of the daemon asks

    def of(self, volume: str) -> Fill | None:
        """The fill of a volume; None for an ordinary one."""
        row = self._state.row("SELECT * FROM fills WHERE volume = ?", (volume,))
        return None if row is None else _fill(dict(row))

    def all(self) -> list[Fill]:
        """Every volume that is not ordinary yet."""
        return [_fill(dict(row)) for row in self._state.rows("SELECT * FROM fills")]

    def require_ordinary(self, volume: str) -> None:
        """Refuse what only an ordinary volume can do.

        Raises:
            StillFilling: it is not one yet.
        """
        found = self.of(volume)
        if found is not None:
            raise StillFilling(
                f"volume {volume} is still being restored",
                hint="laz volume fill shows how far; once whole, restart its containers",
            )

    def content(self, volume: str, root: Path) -> Path:
        """Where a volume's content stands below its root, or below a snapshot of it.

        Raises:
            StillFilling: it is not all there.
        """
        found = self.of(volume)
        if found is None:
            return root
        if not found.whole:
            raise StillFilling(
                f"volume {volume} is still being restored, its backup must wait",
                hint=f"laz volume fill {volume}{' --start' if found.lazy else ''}",
            )
        return root / FOLDER / _TREE

    def progress(self, volume: str) -> FillProgress | None:
        """How far a fill is; None when its server does not answer."""
        found = self.of(volume)
        if found is None:
            return None
        try:
            return jsontext.decode(self._mount(found).call("progress"), type=FillProgress)
        except OSError:
            return None

    # ---- life

    def begin(
        self,
        volume: str,
        repository: str,
        record: SnapshotRecord,
        rate: int = 0,
        *,
        lazy: bool = False,
    ) -> None:
        """Make an empty volume show a snapshot at once, and begin to fill it unless ``lazy``.

        Raises:
            InternalError: the FUSE server does not start; the volume is as it was.
        """
        fill = Fill(volume, repository, record.id, rate, False, lazy, record.volume)
        with self._serving:
            with self._state.write() as db:
                db.execute(
                    "INSERT INTO fills (volume, repository, snapshot, rate, lazy, source)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (volume, repository, record.id, rate, int(lazy), record.volume),
                )
            try:
                self._serve(fill, facts_of(record))
            except OSError as bad:
                self._abandon(fill)
                raise InternalError(f"volume {volume} cannot be shown: {bad}") from bad

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Volumes are shown meanwhile, but filled only afterwards: what is urgent goes first."""
        self._postponing += 1
        try:
            yield
        finally:
            self._postponing -= 1

    def complete(self, volume: str, rate: int = 0) -> None:
        """Begin to fill a lazy volume, or give a fill that runs another limit.

        Raises:
            VolumeNotFound: the volume is an ordinary one, or there is none.
        """
        with self._serving:
            if self.of(volume) is None:
                raise VolumeNotFound(f"volume {volume} is not being restored", hint="laz volume ls")
            with self._state.write() as db:
                db.execute("UPDATE fills SET lazy = 0, rate = ? WHERE volume = ?", (rate, volume))
            found = self.of(volume)
            assert found is not None
            self._serve(found)

    def remove(self, volume: str, force: bool = False) -> None:
        """Remove a volume, ordinary or not; see :meth:`VolumeManager.remove`.

        Raises:
            InUse: somebody uses it.
        """
        with self._serving:
            fill = self.of(volume)
            if fill is not None and self._volumes.users(volume) in ((), (_USER,)):
                try:
                    self._mount(fill).stop()
                except OSError as busy:
                    raise InUse(
                        f"remove {volume}: volume is in use: {busy.strerror}",
                        hint="end what looks into it first",
                    ) from busy
                self._volumes.redirect(volume, None)
                self._volumes.unmount(volume, _USER)
            self._volumes.remove(volume, force)
            if fill is not None:
                self._forget(fill)

    async def start(self) -> None:
        """Show again what an earlier daemon showed; call before containers are resumed."""
        here = {volume.name for volume in await asyncio.to_thread(self._volumes.list)}
        for fill in self.all():
            if fill.volume not in here:  # its removal had come so far
                self._forget(fill)
                continue
            merged = self._run_root / fill.volume / "merged"
            mounted = is_mounted(str(merged))  # not after a reboot
            try:
                adopted = await asyncio.to_thread(self._serve, fill)
            except (OSError, LazaretteError) as bad:
                log.error("volume %s cannot be shown: %s", fill.volume, bad)
                continue
            if mounted and not adopted:
                self._died.append(fill.volume)
        self._watcher = asyncio.create_task(self._watch())

    async def resumed(self) -> None:
        """Containers are known again: tell of servers that died while no daemon ran."""
        died, self._died = self._died, []
        for volume in died:
            try:
                await self._tell(volume)
            except (OSError, LazaretteError) as bad:
                log.error("users of volume %s are not brought back: %s", volume, bad)

    async def stop(self) -> None:
        """Watch no more; servers and fills go on."""
        await watching.end(self._watcher)

    def unmount_all(self) -> None:
        """End all servers, each whatever becomes of others, for an engine that ends for good."""
        with ExitStack() as ending:
            for fill in self.all():
                ending.callback(self._unmount, fill)

    def _unmount(self, fill: Fill) -> None:
        mount = self._mount(fill)
        try:
            mount.stop()
        except OSError as busy:
            log.warning("volume %s is in use at the end: %s", fill.volume, busy)
            with suppress(OSError):
                mount.stop(lazy=True)
        self._volumes.redirect(fill.volume, None)

    # ---- how

    def _mount(self, fill: Fill) -> Mount:
        place = self._run_root / fill.volume
        root = self._volumes.get(fill.volume).mountpoint
        return Mount(
            LazySpec(
                mountpoint=str(place / "merged"),
                control=str(place / "control"),
                store=str(root / FOLDER),
                source=_SOURCE,
                arguments={
                    "access": str(self._repositories.file(fill.repository)),
                    "snapshot": fill.snapshot,
                    "cache": str(self._repositories.cache),
                    "blocks": str(CACHE_BYTES if fill.lazy else 0),
                },
                deadline=self._patience,
                reads=self._reads(fill),
                log=str(place / "log"),
            )
        )

    def _reads(self, fill: Fill) -> str:
        """The file that remembers what is read first of a volume's states."""
        name = hashlib.sha256(f"{fill.repository}/{fill.source}".encode()).hexdigest()
        return str(self._repositories.cache / "reads" / name)

    def _serve(self, fill: Fill, facts: Facts | None = None) -> bool:
        """Have a server for it; whether there was one already.

        Args:
            fill: the volume.
            facts: of its source, for one that begins.
        """
        self._volumes.mount(fill.volume, _USER)
        root = self._volumes.get(fill.volume).mountpoint  # mount gives what is shown
        (root / FOLDER).mkdir(mode=0o700, exist_ok=True)
        if facts is not None:
            facts.save(root / FOLDER / FACTS)
        merged = self._run_root / fill.volume / "merged"
        with suppress(OSError):  # a dead server's mount point cannot even be looked at
            merged.mkdir(parents=True, exist_ok=True)
        mount = self._mount(fill)
        adopted = mount.ensure()
        self._volumes.redirect(fill.volume, merged)
        if not fill.whole and not fill.lazy and not self._postponing:
            mount.call("fill", bytes_per_second=float(fill.rate))
        return adopted

    def _abandon(self, fill: Fill) -> None:
        with suppress(OSError):
            self._mount(fill).stop(lazy=True)
        self._volumes.redirect(fill.volume, None)
        self._volumes.unmount(fill.volume, _USER)
        self._forget(fill)

    def _forget(self, fill: Fill) -> None:
        with self._state.write() as db:
            db.execute("DELETE FROM fills WHERE volume = ?", (fill.volume,))
        shutil.rmtree(self._run_root / fill.volume, ignore_errors=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            for fill in self.all():
                try:
                    if await asyncio.to_thread(self._look, fill.volume):
                        await self._tell(fill.volume)
                except (OSError, LazaretteError) as bad:
                    log.warning("fill of volume %s: %s", fill.volume, bad)

    async def _tell(self, volume: str) -> None:
        log.warning("the server of volume %s had died", volume)
        await self.replaced(volume)

    def _look(self, volume: str) -> bool:
        """Replace a dead server, note a whole volume, settle one nobody uses.

        Returns:
            Whether a server was replaced.
        """
        with self._serving:
            fill = self.of(volume)
            return fill is not None and self._advance(fill)

    def _advance(self, fill: Fill) -> bool:
        if fill.whole and self._volumes.users(fill.volume) == (_USER,):
            self.settle(fill)
            return False
        seen = self.progress(fill.volume)
        if seen is None:
            return not self._serve(fill)
        if not fill.whole and not fill.lazy:
            if seen.complete:
                with self._state.write() as db:
                    db.execute("UPDATE fills SET whole = 1 WHERE volume = ?", (fill.volume,))
                log.info("volume %s is whole", fill.volume)
            elif not seen.filling and not self._postponing:
                self._serve(fill)
        return False

    def settle(self, fill: Fill) -> None:
        """Make a whole volume that nobody uses ordinary; repeatable after a crash.

        Raises:
            OSError: EBUSY, when somebody looks into it just now.
        """
        self._mount(fill).stop()
        self._volumes.redirect(fill.volume, None)
        root = self._volumes.get(fill.volume).mountpoint
        move_up(root)
        self._volumes.unmount(fill.volume, _USER)
        self._forget(fill)
        log.info("volume %s is an ordinary one now", fill.volume)


def move_up(root: Path) -> None:
    """Move the content of the fill's tree into the volume's root; repeatable.

    The root gets the tree's own owner, mode, times and attributes last.
    """
    inside = os.fsencode(_TREE)
    with ExitStack() as held:
        folder = held.enter_context(opened(root / FOLDER))
        target = held.enter_context(opened(root))
        above = held.enter_context(opened(root.parent))
        status = os.stat(inside, dir_fd=folder, follow_symlinks=False)
        source = open_folder(folder, inside)
        held.callback(os.close, source)
        for name in names(source):
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
        os.fsync(target)
        renew_metadata(folder, inside, status, above, os.fsencode(root.name))
    remove_path(root / FOLDER)
    with opened(root.parent) as above:
        os.utime(root.name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=above)


def _fill(row: dict[str, object]) -> Fill:
    flags = {name: bool(row[name]) for name in ("whole", "lazy")}
    return msgspec.convert({**row, **flags}, type=Fill)


async def _nothing(volume: str) -> None:
    """What is done for nobody."""

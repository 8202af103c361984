"""Folders of ``RUN --mount=type=cache``: they outlive builds and are shared by their id."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from lazarette.runtime.builds.mounts import Sharing, StepMount
from lazarette.storage import beneath
from lazarette.storage.clock import Clock
from lazarette.storage.errors import Cancelled, InUse
from lazarette.storage.layers.overlay import space_of
from lazarette.storage.refresh import copy_tree


@dataclass(frozen=True)
class CacheFolder:
    """A cache mount: its id, folder, bytes, when it was made and last used."""

    id: str
    folder: Path
    size: int
    created_ns: int
    used_ns: int


class CacheMounts:
    """All of them, in one folder.

    Args:
        root: the folder; made if absent.
        clock: dates uses.
    """

    def __init__(self, root: Path, clock: Clock) -> None:
        self._root = root
        self._clock = clock
        self._changed = threading.Condition()
        self._users: Counter[Path] = Counter()
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def used(self, mount: StepMount, initial: Path | None, cancelled: Event) -> Iterator[Path]:
        """The folder of a mount, for the length of the block.

        Args:
            mount: its id, sharing, and the mode and owner of a new folder.
            initial: folder whose content a new one begins with.
            cancelled: stops waiting for a locked one.
        """
        holder = self._take(mount, cancelled)
        try:
            data = holder / "data"
            if not data.exists():
                self._fill(mount, holder, initial)
            now = self._clock.now_ns()
            os.utime(holder, ns=(now, now))
            yield data
        finally:
            with self._changed:
                self._users[holder] -= 1
                self._changed.notify_all()

    def _take(self, mount: StepMount, cancelled: Event) -> Path:
        name = hashlib.sha256(mount.id.encode("utf-8", "surrogateescape")).hexdigest()
        with self._changed:
            holder = self._root / name
            if mount.sharing is Sharing.PRIVATE:
                number = 0
                while self._users[holder]:
                    number += 1
                    holder = self._root / f"{name}-{number}"
            while mount.sharing is Sharing.LOCKED and self._users[holder]:
                if cancelled.is_set():
                    raise Cancelled(f"waiting for cache {mount.id}: cancelled")
                self._changed.wait(0.2)
            self._users[holder] += 1
            holder.mkdir(mode=0o700, exist_ok=True)
            return holder

    def _fill(self, mount: StepMount, holder: Path, initial: Path | None) -> None:
        (holder / "id").write_text(mount.id, errors="surrogateescape")
        fresh = holder / "data.new"
        beneath.remove_path(fresh)
        fresh.mkdir()
        if initial is not None and initial.is_dir():
            with beneath.opened(initial) as source, beneath.opened(fresh) as target:
                copy_tree(source, target)
        os.chown(fresh, mount.uid, mount.gid)
        fresh.chmod(0o755 if mount.mode is None else mount.mode)
        fresh.rename(holder / "data")

    def all(self) -> list[CacheFolder]:
        """Every folder, sorted by id."""
        found: list[CacheFolder] = []
        for holder in self._root.iterdir():
            data = holder / "data"
            if not data.is_dir():
                continue
            status = holder.stat()
            found.append(
                CacheFolder(
                    (holder / "id").read_text(errors="surrogateescape"),
                    holder,
                    space_of(data).bytes,
                    (holder / "id").stat().st_mtime_ns,
                    status.st_mtime_ns,
                )
            )
        return sorted(found, key=lambda folder: folder.id)

    def remove(self, folder: CacheFolder) -> None:
        """Delete one.

        Raises:
            InUse: a step uses it.
        """
        with self._changed:
            if self._users[folder.folder]:
                raise InUse(f"removing cache {folder.id}: a build uses it")
            beneath.remove_path(folder.folder)

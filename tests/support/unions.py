"""Unions mounted for a test, stopped and cleaned up after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lazarette.fuse import mount
from lazarette.fuse.client import Mount, UnionMount
from lazarette.fuse.spec import UnionSpec
from lazarette.fuse.syscalls import ended


@dataclass
class Union:
    """One union below ``base``: lower layers ``l0`` (top) to ``lN``, upper, work, mount."""

    base: Path
    spec: UnionSpec
    mounted: UnionMount = field(init=False)

    def __post_init__(self) -> None:
        self.mounted = UnionMount(self.spec)

    @property
    def root(self) -> Path:
        return Path(self.spec.mountpoint)

    @property
    def upper(self) -> Path:
        assert self.spec.upper is not None
        return Path(self.spec.upper)

    def lower(self, index: int = 0) -> Path:
        return Path(self.spec.lowers[index])

    def remount(self) -> None:
        self.mounted.stop()
        self.mounted.start()

    def log(self) -> str:
        path = self.base / "log"
        return path.read_text() if path.exists() else ""


def prepare(base: Path, lowers: int = 1, **options: object) -> Union:
    """Folders and spec of a union that is not yet mounted."""
    paths = [base / f"l{index}" for index in range(lowers)]
    upper, work, root = base / "upper", base / "work", base / "merged"
    for folder in (*paths, upper, work, root):
        folder.mkdir(parents=True, exist_ok=True)
    spec = UnionSpec(
        mountpoint=str(root),
        control=str(base / "c"),
        lowers=[str(path) for path in paths],
        upper=str(upper),
        work=str(work),
        log=str(base / "log"),
    )
    return Union(base, msgspec.structs.replace(spec, **options))


@contextmanager
def serving(union: Union) -> Iterator[Union]:
    """Mount for a while; the server's log must stay empty."""
    union.mounted.start()
    try:
        yield union
    finally:
        if mount.is_mounted(union.spec.mountpoint):
            union.mounted.stop(lazy=False)
        assert union.log() == ""


def kill_mount(mounted: Mount) -> None:
    """SIGKILL a server and, before it, the standby that would go on: the mount is dead then."""
    status = mounted.status()
    if status.standby:
        kill(status.standby)
    kill(status.pid)


def kill(pid: int) -> None:
    """SIGKILL a process and wait until it is gone."""
    fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        ended(fd, 30)
    finally:
        os.close(fd)

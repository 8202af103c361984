"""Volumes in memory.

The filesystem stays mounted until the volume is removed, whoever uses it, so its content
lives as long as the host is up.  After a restart of the host it is empty; until somebody
mounts it anew it then counts as missing rather than as empty (case A36).  Snapshots are in
memory too: what was meant never to reach a disk does not.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from lazarette.storage import beneath, mounts
from lazarette.storage.clock import Clock
from lazarette.storage.errors import InvalidArgument, NoSpace, SourceMissing
from lazarette.storage.syscalls import MountAttr
from lazarette.storage.volumes.contract import (
    ChangeSource,
    SnapshotKind,
    VolumeCapabilities,
    VolumeUsage,
)
from lazarette.storage.volumes.options import check_options, parse_size
from lazarette.storage.volumes.record import VolumeRecord
from lazarette.storage.volumes.tree import TreeVolumeDriver

_OPTIONS = ("device", "gid", "mode", "o", "size", "type", "uid")
_PLAIN = ("gid", "mode", "size", "uid")


def docker_options(options: Mapping[str, str]) -> dict[str, str]:
    """Options with those of Docker's ``o=size=100m,uid=1000`` taken apart.

    Raises:
        InvalidArgument: one of them is not known.
    """
    plain = {key: value for key, value in options.items() if key in _PLAIN}
    for part in filter(None, options.get("o", "").split(",")):
        key, _, value = part.partition("=")
        if key not in _PLAIN:
            raise InvalidArgument(
                f"option o: {key!r} is not known", hint=f"valid: {', '.join(_PLAIN)}"
            )
        plain[key] = value
    return plain


def _check_limit(name: str, limit: int | None) -> None:
    """Refuse a limit beyond the host's memory (V12)."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if limit is not None and limit > memory:
        raise NoSpace(
            f"the volume {name}: {limit} bytes are more than the host's memory, {memory}",
            hint="ask for less, or take a driver that keeps volumes on a disk",
        )


class TmpfsVolumeDriver(TreeVolumeDriver):
    """Volumes in memory; content is lost when the host restarts.

    Args:
        root: the driver's folder.
        clock: for the instants of snapshots and measured pauses.
    """

    def __init__(self, root: Path, clock: Clock) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._lost: set[str] = set()
        super().__init__(root, root, clock, reflinks=False)

    @property
    def capabilities(self) -> VolumeCapabilities:
        """See :class:`VolumeCapabilities`."""
        return VolumeCapabilities(
            name="tmpfs",
            snapshot=SnapshotKind.GATED,
            clone_constant_time=False,
            resize_grow=True,
            resize_shrink=True,
            rollback=True,
            changes=ChangeSource.FILES,
            options=_OPTIONS,
            needs=("tmpfs",),
        )

    def recover(self) -> None:
        """See :meth:`VolumeDriver.recover`: mounts what a restart of the host emptied."""
        super().recover()
        for name in self.names():
            if not mounts.is_mount_point(self._shelf.location(name)):
                self._make_data(self._shelf.location(name), self._shelf.record(name).options)
                self._lost.add(name)
            for info in self.snapshots(name):
                if not mounts.is_mount_point(self._shelf.snapshot(name, info.id)):
                    self._shelf.delete_snapshot(name, info.id)

    def create(self, name: str, options: Mapping[str, str]) -> None:
        """See :meth:`VolumeDriver.create`."""
        check_options("tmpfs", options, _OPTIONS)
        plain = docker_options(options)
        limit = parse_size(plain["size"]) if "size" in plain else None
        _check_limit(name, limit)
        for key in ("uid", "gid"):
            if not plain.get(key, "0").isdecimal():
                raise InvalidArgument(f"option {key}: {plain[key]!r} is no number")
        mode = plain.get("mode", "0")
        if not mode.isdecimal() or set(mode) & set("89"):
            raise InvalidArgument(f"option mode: {mode!r} is no octal mode")
        if self._shelf.exists(name):
            return

        def fill(staged: Path) -> None:
            self._make_data(staged / "data", options)

        self._shelf.make(name, VolumeRecord(dict(options), limit), fill)

    def _make_data(self, data: Path, options: Mapping[str, str]) -> None:
        plain = docker_options(options)
        data.mkdir(exist_ok=True)
        wanted = [("source", "lazarette"), ("mode", plain.get("mode", "0755"))]
        if "size" in plain:
            wanted.append(("size", str(parse_size(plain["size"]))))
        wanted += [(key, plain[key]) for key in ("uid", "gid") if key in plain]
        mounts.mount("tmpfs", data, wanted)

    def mount(self, name: str) -> Path:
        """See :meth:`VolumeDriver.mount`."""
        self._lost.discard(name)
        return super().mount(name)

    def _check_source(self, name: str) -> None:
        self._shelf.folder(name)
        location = self._shelf.location(name)
        if name in self._lost or not mounts.is_mount_point(location):
            raise SourceMissing(
                f"the volume {name} was in memory and the host restarted: its content is gone",
                hint="mount it again, or restore it from a backup",
            )

    def _stage_snapshot(self, name: str, snapshot: str) -> Path:
        # a mount point cannot be renamed: a snapshot is made in its place, and the record
        # that is written last tells it from a leftover
        target = self._shelf.snapshots_folder(name) / snapshot
        if target.exists():
            self._shelf.discard(target)
        target.mkdir(mode=0o700)
        mounts.mount("tmpfs", target, [("source", "lazarette"), ("size", "0")])
        return target

    def _place_snapshot(self, staged: Path, target: Path) -> None:
        mounts.change(target, add=MountAttr.READ_ONLY)

    def rollback(self, name: str, snapshot: str) -> None:
        """See :meth:`VolumeDriver.rollback`: a filled copy is mounted in place of the old one."""
        origin = self._shelf.snapshot(name, snapshot)
        self._shelf.refuse_if_mounted(name, "rolling back")
        staged = self._shelf.stage()
        self._make_data(staged / "data", self._shelf.record(name).options)
        self._copy(origin, staged / "data")
        data = self._shelf.location(name)
        mounts.unmount(data, detach=True)
        mounts.move(staged / "data", data)
        self._lost.discard(name)
        beneath.remove_path(staged)

    def usage(self, name: str) -> VolumeUsage:
        """See :meth:`VolumeDriver.usage`: what the filesystem itself says."""
        self._check_source(name)
        space = os.statvfs(self._shelf.location(name))
        used = (space.f_blocks - space.f_bfree) * space.f_frsize
        return VolumeUsage(used, used, self._shelf.record(name).limit)

    def resize(self, name: str, size: int) -> None:
        """See :meth:`VolumeDriver.resize`.

        Raises:
            NoSpace: the content is larger.
        """
        now = self._shelf.record(name)
        _check_limit(name, size)
        try:
            mounts.reconfigure(self._shelf.location(name), [("size", str(size))])
        except mounts.MountFailed as refused:
            cause = refused.__cause__
            if isinstance(cause, OSError) and cause.errno == errno.EINVAL:
                raise NoSpace(f"resizing {name} to {size} bytes: it holds more") from refused
            raise
        self._shelf.update(name, VolumeRecord({**now.options, "size": str(size)}, size))

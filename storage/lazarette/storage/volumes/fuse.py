"""Volumes behind our own server in user space, over a disk with reflinks.

The server hands reads and writes of file content to the kernel (passthrough), so a database
runs at nearly the speed of the disk; everything else goes through it.  It outlives this
process; a dead one is replaced when its volume is mounted again.

A snapshot of a volume in use is made by the server: it knows which files may have changed
since the copy was begun, so that only those are looked at while writers are held.  It cannot
hold writers by itself, because what the kernel writes for it never reaches it.

Layout: as :mod:`lazarette.storage.volumes.shelf` says, and in a volume's folder ``work``
(the server's own), ``merged`` (where it is mounted) and ``fuse.sock`` (its control socket):
all move along when the volume is renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from lazarette.fuse.client import UnionMount
from lazarette.fuse.spec import UnionSpec
from lazarette.fuse.syscalls import ended
from lazarette.storage import beneath, mounts
from lazarette.storage.syscalls import syncfs
from lazarette.storage.volumes.contract import (
    ChangeSource,
    SnapshotKind,
    VolumeCapabilities,
)
from lazarette.storage.volumes.making import SnapshotMaking
from lazarette.storage.volumes.overlay import OverlayVolumeDriver

_STOP_SECONDS = 30.0


class ServedMaking(SnapshotMaking):
    """A snapshot that the server of a mounted volume makes.

    Args:
        union: the server's mount.
        upper: where it keeps the content.
        staged: an empty folder on the same filesystem.
    """

    def __init__(self, union: UnionMount, upper: Path, staged: Path) -> None:
        self._union = union
        self._upper = upper
        self._target = str(staged / "made")
        super().__init__(staged / "made" / "upper")

    def prepare(self) -> None:
        """Write back what is dirty, and let the server clone everything."""
        self._write_back()
        with beneath.opened(self._upper) as upper:
            syncfs(upper)
        self._union.prepare(self._target)

    def take(self) -> None:
        """Let the server clone what changed since."""
        self._write_back()
        self._union.take(self._target)

    def settle(self) -> None:
        """Let the server make the snapshot durable."""
        self._union.settle(self._target)

    def _write_back(self) -> None:
        # what was stored through a mapping may be with the kernel's side of the server still
        with beneath.opened(self._union.spec.mountpoint) as root:
            syncfs(root)


class FuseVolumeDriver(OverlayVolumeDriver):
    """Volumes served in user space, kept native or in an xfs pool file.

    Args:
        root: the driver's folder.
        clock: for the instants of snapshots and measured pauses.
        pool_size: fixed size of a pool file, bytes; by default it grows by itself.
    """

    @property
    def capabilities(self) -> VolumeCapabilities:
        """See :class:`VolumeCapabilities`."""
        return VolumeCapabilities(
            name="fuse",
            snapshot=SnapshotKind.GATED,
            clone_constant_time=False,
            resize_grow=True,
            resize_shrink=False,
            rollback=True,
            changes=ChangeSource.FILES,
            options=super().capabilities.options,
            needs=("fuse", "xfs with reflinks", "loop devices (on a host without reflinks)"),
        )

    def _union(self, name: str) -> UnionMount:
        folder, upper = self._shelf.folder(name), self._content(name)
        return UnionMount(
            UnionSpec(
                mountpoint=str(folder / "merged"),
                control=str(folder / "fuse.sock"),
                upper=str(upper),
                work=str(upper.parent / "work"),
                allow_other=True,
            )
        )

    def _prepare(self, staged: Path, options: Mapping[str, str]) -> None:
        super()._prepare(staged, options)
        (staged / "work").mkdir(mode=0o700)
        (staged / "merged").mkdir(mode=0o755)

    def _making(self, name: str, staged: Path) -> SnapshotMaking:
        mounted = mounts.is_mount_point(self.location(name))
        if self._sized(name) or not mounted or not self._union(name).alive():
            return super()._making(name, staged)
        return ServedMaking(self._union(name), self._content(name), staged)

    def close(self) -> None:
        """See :meth:`VolumeDriver.close`; ends the servers of volumes that nobody uses."""
        with ExitStack() as ending:
            ending.callback(super().close)
            for name in self.names():
                ending.callback(self._stop, name)

    def location(self, name: str) -> Path:
        """See :meth:`VolumeDriver.location`; empty while the volume is not mounted."""
        return self._shelf.location(name).parent / "merged"

    def mount(self, name: str) -> Path:
        """See :meth:`VolumeDriver.mount`.

        Raises:
            MountFailed: the server does not start.
        """
        self._shelf.folder(name)
        self._attach(name)
        union = self._union(name)
        if not mounts.is_mount_point(self.location(name)) or not union.alive():
            try:
                union.ensure()
            except OSError as refused:
                raise mounts.MountFailed(
                    f"mounting the volume {name}: {refused.strerror}"
                ) from refused
        return super().mount(name)

    def unmount(self, name: str) -> None:
        """See :meth:`VolumeDriver.unmount`."""
        if self.exists(name):
            self._stop(name)
        super().unmount(name)

    def _stop(self, name: str) -> None:
        """Unmount by where the volume is now, which its server need not know, and wait."""
        location = self.location(name)
        if not mounts.is_mount_point(location):
            return
        with self._union(name).processes() as serving:
            mounts.detach_beneath(location)
            try:
                mounts.unmount(location)
            except mounts.MountFailed:
                # a stray open file: the server ends when that is closed
                mounts.unmount(location, detach=True)
            else:
                for process in serving:
                    ended(process, _STOP_SECONDS)

    def remove(self, name: str) -> None:
        """See :meth:`VolumeDriver.remove`."""
        if self.exists(name):
            self._stop(name)
        super().remove(name)

    def rollback(self, name: str, snapshot: str) -> None:
        """See :meth:`VolumeDriver.rollback`; the server starts afresh on the other content."""
        self._shelf.snapshot(name, snapshot)
        self._shelf.refuse_if_mounted(name, "rolling back")
        self._stop(name)
        super().rollback(name, snapshot)
        work = self._shelf.folder(name) / "work"
        beneath.remove_path(work)
        work.mkdir(mode=0o700)

"""Volumes behind our own server in user space, over a disk with reflinks.

The server hands reads and writes of file content to the kernel (passthrough), so a database
runs at nearly the speed of the disk; everything else goes through it.  It outlives this
process; a dead one is replaced when its volume is mounted again.

Layout: as :mod:`lazarette.storage.volumes.shelf` says, and in a volume's folder ``work``
(the server's own), ``merged`` (where it is mounted) and ``fuse.sock`` (its control socket):
all move along when the volume is renamed.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from pathlib import Path

from lazarette.fuse.client import UnionMount
from lazarette.fuse.spec import UnionSpec
from lazarette.storage import beneath, mounts
from lazarette.storage.syscalls import syncfs
from lazarette.storage.volumes.contract import (
    ChangeSource,
    SnapshotKind,
    VolumeCapabilities,
)
from lazarette.storage.volumes.overlay import OverlayVolumeDriver

_STOP_SECONDS = 30.0


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
            resize_grow=False,
            resize_shrink=False,
            rollback=True,
            changes=ChangeSource.FILES,
            needs=("fuse", "xfs with reflinks", "loop devices (on a host without reflinks)"),
        )

    def _union(self, name: str) -> UnionMount:
        folder = self._shelf.folder(name)
        return UnionMount(
            UnionSpec(
                mountpoint=str(folder / "merged"),
                control=str(folder / "fuse.sock"),
                upper=str(folder / "data"),
                work=str(folder / "work"),
                allow_other=True,
            )
        )

    def _prepare(self, staged: Path, options: Mapping[str, str]) -> None:
        super()._prepare(staged, options)
        (staged / "work").mkdir(mode=0o700)
        (staged / "merged").mkdir(mode=0o755)

    def _settle(self, name: str) -> None:
        # what was stored through a mapping is with the kernel's side of the server still
        if mounts.is_mount_point(self.location(name)):
            with beneath.opened(self.location(name)) as root:
                syncfs(root)

    def close(self) -> None:
        """See :meth:`VolumeDriver.close`; ends the servers of volumes that nobody uses."""
        for name in self.names():
            self._stop(name)
        super().close()

    def location(self, name: str) -> Path:
        """See :meth:`VolumeDriver.location`; empty while the volume is not mounted."""
        return self._shelf.location(name).parent / "merged"

    def mount(self, name: str) -> Path:
        """See :meth:`VolumeDriver.mount`.

        Raises:
            MountFailed: the server does not start.
        """
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
        try:
            server = os.pidfd_open(self._union(name).status().pid)
        except OSError:
            mounts.unmount(location, detach=True)  # the server is dead
            return
        try:
            mounts.detach_beneath(location)
            try:
                mounts.unmount(location)
            except mounts.MountFailed:
                # a stray open file: the server ends when that is closed
                mounts.unmount(location, detach=True)
            else:
                select.select([server], [], [], _STOP_SECONDS)
        finally:
            os.close(server)

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
        work = self._shelf.folder(name) / "work"
        super().rollback(name, snapshot)
        beneath.remove_path(work)
        work.mkdir(mode=0o700)

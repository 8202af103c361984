"""Volumes that are folders of the host.

With the option ``device`` the folder is somebody else's: it must exist, ``remove``
forgets it and never deletes it, and it is neither rolled back nor limited.  Without it the
driver makes a plain folder of its own, for hosts on which nothing better works.

Only containers can be held by a gate, other programs on the host cannot, so snapshots are
labelled ``UNSAFE``: good files, not one instant.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lazarette.storage import extents
from lazarette.storage.clock import Clock
from lazarette.storage.errors import InvalidArgument, SourceMissing, Unsupported
from lazarette.storage.volumes.contract import (
    ChangeSource,
    SnapshotKind,
    VolumeCapabilities,
)
from lazarette.storage.volumes.making import CopyMaking, SnapshotMaking
from lazarette.storage.volumes.options import check_options
from lazarette.storage.volumes.record import VolumeRecord
from lazarette.storage.volumes.tree import TreeVolumeDriver

_OPTIONS = ("device", "o", "type")


class BindVolumeDriver(TreeVolumeDriver):
    """Host folders as volumes.

    Args:
        root: the driver's folder; snapshots are kept there.
        clock: for the instants of snapshots and measured pauses.
    """

    def __init__(self, root: Path, clock: Clock) -> None:
        root.mkdir(parents=True, exist_ok=True)
        super().__init__(root, root, clock, reflinks=extents.reflinks_work(root))

    @property
    def capabilities(self) -> VolumeCapabilities:
        """See :class:`VolumeCapabilities`."""
        return VolumeCapabilities(
            name="bind",
            snapshot=SnapshotKind.UNSAFE,
            clone_constant_time=False,
            resize_grow=False,
            resize_shrink=False,
            rollback=False,
            changes=ChangeSource.FILES,
            clone=False,
            of_host=True,
            options=_OPTIONS,
        )

    def create(self, name: str, options: Mapping[str, str]) -> None:
        """See :meth:`VolumeDriver.create`.

        ``type`` and ``o`` are taken as Docker's local driver writes them (``none``, ``bind``).
        """
        check_options("bind", options, _OPTIONS)
        device = options.get("device", "")
        if device and not os.path.isabs(device):
            raise InvalidArgument(
                f"creating the volume {name}: the device {device!r} is no absolute path"
            )
        if options.get("type", "none") not in ("none", "", "bind"):
            raise InvalidArgument(f"creating the volume {name}: the type must be none or bind")
        if self._shelf.exists(name):
            return

        def fill(staged: Path) -> None:
            if not device:
                self._make_data(staged / "data", options)

        self._shelf.make(name, VolumeRecord(dict(options)), fill)

    def location(self, name: str) -> Path:
        """See :meth:`VolumeDriver.location`: the host's folder itself."""
        own = self._shelf.location(name)
        if not self._shelf.exists(name):
            return own
        device = self._shelf.record(name).options.get("device", "")
        return Path(device) if device else own

    def _making(self, name: str, staged: Path) -> SnapshotMaking:
        # the folder may be on any filesystem: nothing can be said of its change times
        return CopyMaking(self._content(name), staged)

    def _content(self, name: str) -> Path:
        return self.location(name)

    def mount(self, name: str) -> Path:
        """See :meth:`VolumeDriver.mount`.

        Raises:
            SourceMissing: the host's folder is gone.
        """
        self._check_source(name)
        return super().mount(name)

    def _check_source(self, name: str) -> None:
        self._shelf.folder(name)
        location = self.location(name)
        if not location.is_dir():
            raise SourceMissing(
                f"the volume {name}: its folder {location} is not there",
                hint="mount or make it, then try again",
            )

    def clone(self, source: str, snapshot: str | None, name: str) -> None:
        """Refused: a clone of a bind volume goes into another driver; the manager does that."""
        raise Unsupported(f"cloning {source}: the driver bind cannot hold the clone {name}")

    def rollback(self, name: str, snapshot: str) -> None:
        """Refused: the folder is not ours to replace."""
        raise Unsupported(
            f"rolling back {name}: it is a folder of the host",
            hint="export the snapshot and copy from it",
        )

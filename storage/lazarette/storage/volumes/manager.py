"""All that can be done with named volumes; what the engine and the backup service talk to.

Life and use of volumes are :class:`lazarette.storage.volumes.store.VolumeStore`'s; here are
snapshots, clones, rollback, whole contents and space.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from lazarette.storage import steps
from lazarette.storage.changes import Change
from lazarette.storage.errors import (
    Conflict,
    InUse,
    NameTaken,
    Unsupported,
)
from lazarette.storage.volumes import content
from lazarette.storage.volumes.contract import (
    OpenGate,
    SnapshotInfo,
    VolumeCapabilities,
    VolumeDriver,
    WriteGate,
)
from lazarette.storage.volumes.names import check_name
from lazarette.storage.volumes.store import (
    ANONYMOUS_LABEL,
    Pruned,
    Volume,
    VolumeStore,
    WrongDriver,
)

__all__ = ["ANONYMOUS_LABEL", "Pruned", "Volume", "VolumeManager", "WrongDriver"]


class VolumeManager(VolumeStore):
    """All named volumes of a host, with their snapshots and contents.

    Args:
        state: the daemon's database.
        drivers: by name; one is asked for only when it is needed.
        clock: for creation times and pauses.
        default: name of the driver taken when none is asked for; ``"local"`` and ``""``
            stand for it, as tools made for Docker send them.
        databases: name of the driver that suits databases best; by default the same.
    """

    # ---- snapshots

    def snapshot(
        self, names: Sequence[str], gate: WriteGate, snapshot: str | None = None
    ) -> dict[str, SnapshotInfo]:
        """Take one snapshot of several volumes at one instant, across drivers too.

        Writers are held only while the drivers act.  If one driver fails, what the others
        made is deleted again.

        Args:
            names: the volumes.
            gate: holds their writers.
            snapshot: id of the snapshot; a fresh one by default.
        """
        identity = snapshot or secrets.token_hex(8)
        wanted = sorted(set(names))
        with self._held(*wanted), ExitStack() as stack:
            groups: dict[str, list[str]] = {}
            for name in wanted:
                groups.setdefault(self.get(name).driver, []).append(name)
            for driver, members in groups.items():
                for name in members:
                    stack.enter_context(
                        self._book.operation("snapshot", driver, name, snapshot=identity)
                    )
            return self._snapshot_groups(groups, identity, gate)

    def _snapshot_groups(
        self, groups: Mapping[str, Sequence[str]], snapshot: str, gate: WriteGate
    ) -> dict[str, SnapshotInfo]:
        if len(groups) == 1:
            ((driver, members),) = groups.items()
            if len(members) == 1:
                return {members[0]: self.driver(driver).snapshot(members[0], snapshot, gate)}
            return self.driver(driver).snapshot_group(members, snapshot, gate)
        made: dict[str, SnapshotInfo] = {}
        started = self._clock.monotonic_ns()
        held = OpenGate()  # the manager itself holds the real one meanwhile
        try:
            gate.close()
            try:
                for driver, members in groups.items():
                    made.update(self.driver(driver).snapshot_group(members, snapshot, held))
            finally:
                gate.open()
        except BaseException:
            for driver, members in groups.items():
                for name in members:
                    self.driver(driver).delete_snapshot(name, snapshot)
            raise
        pause = self._clock.monotonic_ns() - started
        return {name: replace(info, pause_ns=pause) for name, info in made.items()}

    def snapshots(self, name: str) -> Sequence[SnapshotInfo]:
        """The snapshots of a volume, oldest first."""
        return self._of(name).snapshots(name)

    def view(self, name: str, snapshot: str) -> Path:
        """A snapshot as a read-only folder, until :meth:`release_view`."""
        with self._held(name):
            return self._of(name).view(name, snapshot)

    def release_view(self, name: str, snapshot: str) -> None:
        """Let go of a view."""
        with self._held(name):
            self._of(name).release_view(name, snapshot)

    def delete_snapshot(self, name: str, snapshot: str) -> None:
        """Delete a snapshot; nothing happens if it is not there."""
        with self._held(name):
            self._of(name).delete_snapshot(name, snapshot)

    def clone(
        self,
        source: str,
        snapshot: str | None,
        name: str,
        labels: Mapping[str, str] | None = None,
        driver: str = "",
    ) -> Volume:
        """Make a volume that starts as another one is, or was at a snapshot.

        Args:
            source: the volume to start from.
            snapshot: one of its snapshots, or None for its present state.
            name: of the new volume.
            labels: of the new volume.
            driver: of the new volume; by default the same, or the host's default where the
                source's driver has no clones.  Another driver costs a copy.

        Raises:
            NameTaken: the name exists.
        """
        check_name(name)
        with self._held(source, name):
            origin = self.get(source)
            if self._book.has(name):
                raise NameTaken(f"clone {source}: a volume {name} exists already")
            own = self.driver(origin.driver)
            fallback = own if own.capabilities.clone else self.driver("")
            target = self.driver(driver) if driver else fallback
            kind = target.capabilities.name
            with self._book.operation("clone", kind, name):
                if target is own and own.capabilities.clone:
                    own.clone(source, snapshot, name)
                    options = origin.options
                else:
                    options = {}
                    target.create(name, options)
                    self._copy_into(own, source, snapshot, target.mount(name))
                    target.unmount(name)
                steps.reached("volume.clone.made")
                self._add(name, kind, options, labels or {}, False)
        return self.get(name)

    def _copy_into(
        self, driver: VolumeDriver, source: str, snapshot: str | None, root: Path
    ) -> None:
        if snapshot is None:
            with self._reachable(source) as origin:
                content.populate(root, origin)
            return
        try:
            content.populate(root, driver.view(source, snapshot))
        finally:
            driver.release_view(source, snapshot)

    def rollback(self, name: str, snapshot: str, user: str = "") -> str:
        """Set a volume back in place; the id of the safety snapshot taken before.

        Raises:
            InUse: somebody has it mounted, or reserved it and is not ``user``.
            SnapshotNotFound: no such snapshot.
            Unsupported: its driver cannot.
        """
        with self._held(name):
            self.require_free(name, user)
            volume = self.get(name)
            driver = self.driver(volume.driver)
            if not driver.capabilities.rollback:
                raise Unsupported(f"the driver {volume.driver} cannot roll {name} back")
            if volume.users:
                raise InUse(
                    f"rolling back {name}: volume is in use - [{', '.join(volume.users)}]",
                    hint="stop the containers that use it first",
                )
            driver.view(name, snapshot)
            driver.release_view(name, snapshot)
            self.set_back(name)
            safety = f"before-rollback-{secrets.token_hex(4)}"
            self.snapshot([name], OpenGate(), safety)
            driver.unmount(name)
            with self._book.operation("rollback", volume.driver, name, snapshot=snapshot):
                driver.rollback(name, snapshot)
                steps.reached("volume.rollback.done")
        return safety

    def capabilities(self, name: str) -> VolumeCapabilities:
        """What the driver of a volume can do.

        Raises:
            VolumeNotFound: there is no such volume.
        """
        return self._of(name).capabilities

    def changes(self, name: str, base: str, target: str) -> Iterator[Change]:
        """What differs between two snapshots of a volume.

        Raises:
            ChangesUnknown: compare everything instead.
        """
        return self._of(name).changes(name, base, target)

    # ---- whole contents

    def populate(self, name: str, source: Path | int) -> bool:
        """Fill an empty volume from a folder of an image, wholly or not at all (case A20).

        Of two callers at once one copies and the other waits, so both find everything.

        Args:
            name: the volume.
            source: the image's folder, a path or a descriptor.

        Returns:
            Whether the volume was empty and is filled now.
        """
        with self._held(name):
            volume = self.get(name)
            with self._reachable(name) as root:
                if not content.is_empty(root):
                    return False
                with self._filling(volume):
                    return content.populate(root, source)

    @contextmanager
    def _filling(self, volume: Volume) -> Iterator[None]:
        with self._book.operation("fill", volume.driver, volume.name):
            try:
                yield
            except BaseException:
                content.clear(volume.mountpoint)
                raise
            steps.reached("volume.fill.filled")

    def export(self, name: str, out: BinaryIO, snapshot: str | None = None) -> None:
        """Write a volume as a tar, as it is at one instant, or was at a snapshot.

        Raises:
            SnapshotNotFound: no such snapshot.
        """
        passing = snapshot or f"export-{secrets.token_hex(4)}"
        if snapshot is None:
            self.snapshot([name], OpenGate(), passing)
        try:
            view = self.view(name, passing)
            try:
                content.write_tar(view, out)
            finally:
                self.release_view(name, passing)
        finally:
            if snapshot is None:
                self.delete_snapshot(name, passing)

    def import_(self, name: str, stream: BinaryIO) -> int:
        """Fill an empty volume from a tar, wholly or not at all; the unpacked bytes.

        Raises:
            Conflict: the volume has content.
            InvalidArgument: the tar is hostile or broken.
            NoSpace: the volume is full.
        """
        with self._held(name):
            volume = self.get(name)
            with self._reachable(name) as root:
                if not content.is_empty(root):
                    raise Conflict(
                        f"import {name}: the volume is not empty",
                        hint="import into a new volume",
                    )
                with self._filling(volume):
                    return content.read_tar(root, stream)

    # ---- space

    def resize(self, name: str, size: int) -> None:
        """Set the size limit of a volume, bytes."""
        with self._held(name):
            self._of(name).resize(name, size)

"""The contract of volume drivers.

Vocabulary
    *volume*: a named, writable tree that outlives containers.
    *snapshot*: an immutable state of a volume at one instant, named by an id unique in it.
    *view*: a snapshot as a read-only folder.
    *clone*: a new writable volume that starts as a volume or snapshot was.
    *gate*: holds the writers of a volume for an instant (the freezer of the containers
    that use it); given by the caller, because a driver knows nothing of containers.
    *pause*: for how long writers were held, nanoseconds.

States::

    create ──▶ ready ──mount──▶ mounted (counted by user id) ──unmount──▶ ready ──▶ removed
                 └── snapshot, clone, rollback, resize, rename in either state as
                     :class:`VolumeCapabilities` says

Semantics
    V1.  Every method is idempotent, and safe under concurrent callers on different volumes;
         the manager serialises calls on one volume.
    V2.  A failed or killed ``create``, ``clone`` or ``snapshot`` leaves nothing; ``recover``
         removes leftovers at the next start.
    V3.  ``mount`` returns a folder with the volume's root as its root; the root's own owner,
         mode, times, ACL and xattrs belong to the volume and are kept.
    V4.  A snapshot is one instant over the whole volume when ``atomic`` is set; otherwise the
         gate is closed while it is made.  The pause is measured and returned.
    V5.  A snapshot never changes; its view is read-only also for root.
    V6.  ``remove`` and ``rollback`` never cross a mount point into foreign data (case A22),
         never follow a symlink, and survive open files.
    V7.  ``rollback`` refuses while mounted (``InUse``); the manager takes a safety snapshot first.
    V8.  ``changes(name, base, target)`` follows :mod:`lazarette.storage.changes`; it raises
         ``ChangesUnknown`` rather than leave anything out.
    V9.  A size limit, where the driver has one, is what the application sees as ENOSPC or
         EDQUOT; resizing needs no unmount.
    V10. Unknown options are refused with the list of those that are valid.
    V11. ``close`` lets go of what the driver itself holds (the mount of a pool, a watching
         thread); volumes stay, and another process may open the driver's folder again.
    V12. Pools and quotas never promise space the host does not have.

Example::

    driver.create("pgdata", {"size": "10g"})
    folder = driver.mount("pgdata")
    info = driver.snapshot("pgdata", "s1", gate)        # info.pause_ns
    view = driver.view("pgdata", "s1")
    for change in driver.changes("pgdata", "s0", "s1"): ...
    driver.release_view("pgdata", "s1")
    driver.delete_snapshot("pgdata", "s0")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from lazarette.storage.changes import Change


class SnapshotKind(Enum):
    """How true to one instant a snapshot is."""

    ATOMIC = "atomic"
    GATED = "gated"
    UNSAFE = "unsafe"


class ChangeSource(Enum):
    """What a driver finds changes by, and so how exact they are."""

    EXTENTS = "changed extents"
    FILES = "changed files, by comparing both snapshots"
    DIRTY_RANGES = "dirty ranges"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class VolumeCapabilities:
    """What a volume driver can do, as shown in ``docs/drivers.md``.

    Attributes:
        name: the driver's name.
        snapshot: how true its snapshots are to one instant.
        clone_constant_time: a clone costs no copy of the data.
        resize_grow: the size limit can be raised while mounted.
        resize_shrink: the size limit can be lowered while mounted.
        rollback: a volume can be set back in place.
        clone: a clone can be of the same driver; otherwise the manager copies into another.
        changes: what differences are found by.
        inodes_kept: an inode has the same number in every snapshot (see rule C6).
        of_host: its volumes are folders of the host, and their owners the host's users also
            where those of containers are others.
        options: valid option names for ``create``.
        needs: kernel features it needs.
    """

    name: str
    snapshot: SnapshotKind
    clone_constant_time: bool
    resize_grow: bool
    resize_shrink: bool
    rollback: bool
    changes: ChangeSource
    inodes_kept: bool = False
    clone: bool = True
    of_host: bool = False
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot that was made.

    Attributes:
        id: its name in the volume.
        created_ns: the instant it shows, wall clock.
        pause_ns: for how long writers were held.
        kind: how true to one instant it is.
    """

    id: str
    created_ns: int
    pause_ns: int
    kind: SnapshotKind


@dataclass(frozen=True, slots=True)
class VolumeUsage:
    """Bytes a volume refers to, and those that only it holds."""

    referenced: int
    exclusive: int
    limit: int | None = None


class WriteGate(Protocol):
    """Holds all writers of a set of volumes; closed for as short as can be.

    The implementation bounds the time by a watchdog of its own and records durably that
    the gate is closed, so that a crash cannot leave writers held.
    """

    def close(self) -> None:
        """Hold the writers; returns when all are held."""
        ...

    def open(self) -> None:
        """Let them go on; does nothing when they are not held."""
        ...


class OpenGate:
    """A gate for volumes that nobody writes."""

    def close(self) -> None:
        """Nothing to hold."""

    def open(self) -> None:
        """Nothing to let go."""


class VolumeDriver(Protocol):
    """Volumes of one kind on this host; numbered semantics in the module's text."""

    @property
    def capabilities(self) -> VolumeCapabilities:
        """What this driver can do."""
        ...

    def recover(self) -> None:
        """Undo what a killed process left half made; remount what must be mounted."""
        ...

    def close(self) -> None:
        """Let go of what the driver itself holds (V11)."""
        ...

    def create(self, name: str, options: Mapping[str, str]) -> None:
        """Make an empty volume.

        Raises:
            InvalidArgument: an option or value this driver does not know (V10).
            NoSpace: the host has no room for it.
        """
        ...

    def exists(self, name: str) -> bool:
        """Whether the volume is there."""
        ...

    def names(self) -> list[str]:
        """All volumes of this driver, sorted."""
        ...

    def location(self, name: str) -> Path:
        """Where ``mount`` makes the volume's root reachable; nothing is mounted by asking."""
        ...

    def mount(self, name: str) -> Path:
        """Make the volume's root reachable and say where; repeatable."""
        ...

    def unmount(self, name: str) -> None:
        """Let go of what ``mount`` made, once nobody uses the volume."""
        ...

    def remove(self, name: str) -> None:
        """Delete a volume with its snapshots."""
        ...

    def snapshot(self, name: str, snapshot: str, gate: WriteGate) -> SnapshotInfo:
        """Take a snapshot of a volume, mounted or not."""
        ...

    def snapshot_group(
        self, names: Sequence[str], snapshot: str, gate: WriteGate
    ) -> dict[str, SnapshotInfo]:
        """Take one snapshot of several volumes at one instant, writers held meanwhile."""
        ...

    def snapshots(self, name: str) -> list[SnapshotInfo]:
        """The snapshots of a volume, oldest first."""
        ...

    def view(self, name: str, snapshot: str) -> Path:
        """A snapshot as a read-only folder, until ``release_view``.

        Raises:
            SnapshotNotFound: no such snapshot.
        """
        ...

    def release_view(self, name: str, snapshot: str) -> None:
        """Let go of what ``view`` made."""
        ...

    def delete_snapshot(self, name: str, snapshot: str) -> None:
        """Delete a snapshot; nothing happens if it is not there."""
        ...

    def clone(self, source: str, snapshot: str | None, name: str) -> None:
        """Make a volume that starts as ``source`` is now, or was at ``snapshot``."""
        ...

    def rollback(self, name: str, snapshot: str) -> None:
        """Set an unmounted volume back to a snapshot."""
        ...

    def changes(self, name: str, base: str, target: str) -> Iterator[Change]:
        """What differs between two snapshots of a volume.

        Raises:
            ChangesUnknown: the record is lost or doubtful.
        """
        ...

    def usage(self, name: str) -> VolumeUsage:
        """Space the volume takes."""
        ...

    def resize(self, name: str, size: int) -> None:
        """Set the size limit, bytes.

        Raises:
            Unsupported: this driver has no limits, or cannot shrink.
        """
        ...

    def rename(self, name: str, new_name: str) -> None:
        """Give a volume another name; its mounts stay valid where the driver can."""
        ...

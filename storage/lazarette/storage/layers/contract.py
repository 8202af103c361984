"""The contract of layer drivers.

Vocabulary
    *layer*: an immutable tree of changes on top of a parent layer; an image is a chain.
    *active layer*: a writable one, on top of a layer or of nothing; a container's root.
    *key*: the caller's name for either, ``[a-z0-9][a-z0-9_.-]*`` of at most 128 characters.
    *diff*: the changes of a layer against its parent as an OCI layer tar (``.wh.`` names).

States::

    prepare            commit
    ──────▶ active ─────────────▶ committed ──▶ (parent of others)
              │  ▲  mount/unmount      │
              └──┴──▶ removed ◀────────┘   only while nothing is built on it

Semantics
    L1.  Every method is idempotent: repeating it after success does nothing more.
    L2.  ``prepare`` and ``apply`` leave nothing behind when they fail or are killed:
         leftovers are removed by ``recover`` at the next start.
    L3.  A committed layer never changes again.
    L4.  ``mount`` gives the merged tree; a mounted active layer is writable, a mounted
         committed layer is read-only.  Mounting twice counts; the last ``unmount`` unmounts.
         With an id map owners are those of the host, and what is written lands on disk with
         those of the container; an active layer is mounted in one of both ways at a time.
    L5.  ``remove`` of a layer that is mounted or has children is refused with ``InUse``.
    L6.  ``remove`` never crosses a mount point and never follows a symlink.
    L7.  Hard links, owners, modes, ns times, xattrs (``security.capability`` included),
         devices, holes, long names and odd bytes pass through apply, mount and diff.
    L8.  ``.wh.NAME`` hides NAME of every layer below; ``.wh..wh..opq`` hides all entries of
         its directory from below.  A name that itself begins ``.wh.`` is refused on apply.
    L9.  ``apply`` never writes outside the layer: absolute names, ``..`` and symlinked
         parents are resolved inside it or refused.
    L10. 128 layers may be stacked.
    L11. ``close`` lets go of what the driver itself holds (the mount of a pool); layers and
         their mounts stay, and another process may open the driver's folder again.

Example::

    driver.apply("base", None, tar)          # image layer from a registry
    driver.prepare("c1", "base")             # container root
    root = driver.mount("c1")
    ...                                      # the container runs
    driver.unmount("c1")
    with driver.diff("c1") as stream: ...    # docker commit
    driver.remove("c1")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from lazarette.storage.changes import Change
from lazarette.storage.idmaps import IdMap


@dataclass(frozen=True, slots=True)
class LayerCapabilities:
    """What a layer driver can do.

    Attributes:
        name: the driver's name in configuration and ``info``.
        copy_on_write: a new layer costs no copy of its parent.
        directory_rename: renaming a directory of a lower layer works (else EXDEV).
        maps_owners: ``mount`` takes an id map.
        needs: kernel features it needs, for the report when one is missing.
    """

    name: str
    copy_on_write: bool
    directory_rename: bool
    maps_owners: bool
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerUsage:
    """Space a layer takes by itself, without its parents."""

    bytes: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Applied:
    """What ``apply`` read: unpacked size in bytes and the SHA-256 of the uncompressed tar."""

    size: int
    diff_id: str


class LayerDriver(Protocol):
    """Layers on this host; numbered semantics in the module's text."""

    @property
    def capabilities(self) -> LayerCapabilities:
        """What this driver can do."""
        ...

    def recover(self) -> None:
        """Undo what a killed process left half made; called once at start."""
        ...

    def close(self) -> None:
        """Let go of what the driver itself holds (L11)."""
        ...

    def prepare(self, key: str, parent: str | None) -> None:
        """Make an active layer on a committed one, or on nothing.

        Raises:
            NotFound: no such parent.
            NameTaken: the key is taken by something else.
        """
        ...

    def apply(self, key: str, parent: str | None, stream: BinaryIO) -> Applied:
        """Make a committed layer of an OCI layer tar (uncompressed).

        Raises:
            InvalidArgument: the tar is hostile or broken (L8, L9).
            NoSpace: the disk is full.
        """
        ...

    def commit(self, key: str) -> None:
        """Turn an unmounted active layer into a committed one.

        Raises:
            InUse: it is mounted.
        """
        ...

    def mount(self, key: str, idmap: IdMap | None = None) -> Path:
        """Mount the merged tree and say where.

        Args:
            key: which layer.
            idmap: shows owners as the host's users that a container's are.

        Raises:
            InUse: it is active and mounted with other owners.
            MissingFeature: this driver, its filesystem or the kernel cannot map owners.
        """
        ...

    def unmount(self, key: str, idmap: IdMap | None = None) -> None:
        """Give back one mount that was made with the same map."""
        ...

    def diff(self, key: str) -> AbstractContextManager[BinaryIO]:
        """The layer against its parent as an OCI layer tar, streamed."""
        ...

    def changes(self, key: str) -> Iterator[Change]:
        """What differs from the parent, sorted by path (``docker diff``)."""
        ...

    def usage(self, key: str) -> LayerUsage:
        """Space the layer takes without its parents."""
        ...

    def exists(self, key: str) -> bool:
        """Whether a layer of that key is there, active or committed."""
        ...

    def keys(self) -> list[str]:
        """All keys, sorted."""
        ...

    def remove(self, key: str) -> None:
        """Delete the layer; nothing happens if it is not there.

        Raises:
            InUse: it is mounted or others are built on it.
        """
        ...


@runtime_checkable
class CommitsInPlace(Protocol):
    """An ability some drivers have: an active layer becomes what applying its own diff
    would make, without copying anything."""

    def commit_as(self, key: str, new_key: str, *, size: int, diff_id: str) -> None:
        """Commit an unmounted active layer under another key.

        Killed meanwhile, it is there under the old key or under the new one.

        Args:
            key: the active layer.
            new_key: a key that is free.
            size: what ``apply`` would report.
            diff_id: SHA-256 of the layer's diff.

        Raises:
            InUse: it is mounted.
            NameTaken: the new key is taken.
        """
        ...

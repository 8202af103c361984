"""Layers stacked by the kernel's overlay filesystem."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lazarette.storage import mounts, syscalls
from lazarette.storage.clock import Clock
from lazarette.storage.errors import MissingFeature
from lazarette.storage.idmaps import IdMap
from lazarette.storage.layers.contract import LayerCapabilities
from lazarette.storage.layers.stacked import StackedLayerDriver
from lazarette.storage.layers.stacked import space_of as space_of
from lazarette.storage.syscalls import MountAttr

_LONGEST_OPTION = 255
_CONFIGURED = (("redirect_dir", "on"), ("index", "off"), ("metacopy", "off"))


class OverlayLayerDriver(StackedLayerDriver):
    """Layers stacked by the kernel.

    Args:
        root: the driver's folder, on a filesystem that can be an upper folder of overlay
            (ext4, xfs, btrfs; not overlay itself).
        clock: unused by this driver; every driver is made alike.
    """

    def __init__(self, root: Path, clock: Clock) -> None:
        super().__init__(root)

    @property
    def capabilities(self) -> LayerCapabilities:
        """See :class:`LayerCapabilities`."""
        return LayerCapabilities(
            name="overlay",
            copy_on_write=True,
            directory_rename=True,
            maps_owners=True,
            needs=("overlay",),
        )

    def close(self) -> None:
        """See :meth:`LayerDriver.close`: there is nothing to let go."""

    def _stack(
        self,
        lower: list[Path],
        upper: Path | None,
        work: Path | None,
        target: Path,
        idmap: IdMap | None,
    ) -> None:
        stack(lower, upper, work, target, idmap)

    @contextmanager
    def _opened(self, lower: list[Path]) -> Iterator[int]:
        mount = _stacked(lower, None, None)
        try:
            folder = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
            try:
                yield folder
            finally:
                os.close(folder)
        finally:
            os.close(mount)


def stack(
    lower: list[Path],
    upper: Path | None,
    work: Path | None,
    target: Path,
    idmap: IdMap | None = None,
) -> None:
    """Mount layers on each other, the first of ``lower`` topmost.

    Raises:
        MissingFeature: owners are to be mapped and the filesystem cannot.
        MountFailed: the kernel refused, with its reason.
    """
    mount = _stacked(lower, upper, work, idmap)
    try:
        mounts.attach(mount, target)
    finally:
        os.close(mount)


def _stacked(
    lower: list[Path], upper: Path | None, work: Path | None, idmap: IdMap | None = None
) -> int:
    """A detached overlay mount."""
    options: list[tuple[str, str | bytes | None]] = [("source", "lazarette"), *_CONFIGURED]
    attributes = MountAttr.READ_ONLY if upper is None else MountAttr.NONE
    with ExitStack() as until:
        paths = [*lower, *([] if upper is None or work is None else [upper, work])]
        named = _short(until) if idmap is None else _mapped(paths, idmap, until)
        options += [("lowerdir+", named(path)) for path in lower]
        if upper is not None and work is not None:
            options += [("upperdir", named(upper)), ("workdir", named(work))]
        try:
            return mounts.filesystem("overlay", options, attributes=attributes)
        except mounts.MountFailed as refused:
            if idmap is None:
                raise
            raise MissingFeature(
                f"layers with mapped owners cannot be mounted: {refused.message}",
                hint="it needs Linux 6.15: start the container with --userns=host, or use "
                "another layer driver",
            ) from refused


def _short(until: ExitStack) -> Callable[[Path], bytes]:
    """Names a path by itself, or where that is too long for an option, by a descriptor."""

    def name(path: Path) -> bytes:
        encoded = os.fsencode(path)
        if len(encoded) <= _LONGEST_OPTION:
            return encoded
        opened = os.open(encoded, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        until.callback(os.close, opened)
        return f"/proc/self/fd/{opened}".encode()

    return name


def _mapped(paths: list[Path], idmap: IdMap, until: ExitStack) -> Callable[[Path], bytes]:
    """Names a path by a copy of the folder above all of them, its owners mapped.

    Overlay itself cannot be mapped, so its layers are.  What it makes by itself it makes as
    whoever mounts it, who must be one of the map.
    """
    above = Path(os.path.commonpath(paths))
    tree = until.enter_context(mounts.mapped(above, idmap.namespace))
    until.enter_context(syscalls.filesystem_ids(*idmap.root))
    return lambda path: os.fsencode(Path(f"/proc/self/fd/{tree}") / path.relative_to(above))

"""Layers stacked by the kernel's overlay filesystem."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazarette.storage import mounts
from lazarette.storage.clock import Clock
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
            name="overlay", copy_on_write=True, directory_rename=True, needs=("overlay",)
        )

    def close(self) -> None:
        """See :meth:`LayerDriver.close`: there is nothing to let go."""

    def _stack(
        self, lower: list[Path], upper: Path | None, work: Path | None, target: Path
    ) -> None:
        stack(lower, upper, work, target)

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


def stack(lower: list[Path], upper: Path | None, work: Path | None, target: Path) -> None:
    """Mount layers on each other, the first of ``lower`` topmost.

    Raises:
        MountFailed: the kernel refused, with its reason.
    """
    mount = _stacked(lower, upper, work)
    try:
        mounts.attach(mount, target)
    finally:
        os.close(mount)


def _stacked(lower: list[Path], upper: Path | None, work: Path | None) -> int:
    """A detached overlay mount."""
    kept: list[int] = []

    def short(path: Path) -> bytes:
        """The path itself, or where it is too long for an option, one by descriptor."""
        encoded = os.fsencode(path)
        if len(encoded) <= _LONGEST_OPTION:
            return encoded
        kept.append(os.open(encoded, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        return f"/proc/self/fd/{kept[-1]}".encode()

    options: list[tuple[str, str | bytes | None]] = [("source", "lazarette"), *_CONFIGURED]
    options += [("lowerdir+", short(path)) for path in lower]
    if upper is not None and work is not None:
        options += [("upperdir", short(upper)), ("workdir", short(work))]
    attributes = MountAttr.READ_ONLY if upper is None else MountAttr.NONE
    try:
        return mounts.filesystem("overlay", options, attributes=attributes)
    finally:
        for descriptor in kept:
            os.close(descriptor)

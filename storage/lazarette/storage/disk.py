"""A filesystem of a fixed size in a sparse file: what a volume with a size limit lies in.

The file is formatted as xfs, which can be grown while it is mounted and whose freeze
(``FIFREEZE``) leaves a clean filesystem on the disk.  It lies on a filesystem with reflinks; a
clone of it made while it is frozen is the volume at one instant.

A freeze outlives the process that ordered it.  So before one is ordered a second process is
started that thaws when the first one lets go of a pipe, dies, or takes too long.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Sequence
from pathlib import Path

from lazarette.storage import extents, loop, mounts, process, xfs
from lazarette.storage.syscalls import syncfs

MIB = 1 << 20
SMALLEST = 16 * MIB

_BLOCK = 4096
_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878
_GUARD_SECONDS = 20
_ATTEMPTS = 50
_PAUSE_SECONDS = 0.1

# below, mkfs.xfs wants to be told twice; from there on its log takes at least 64 MiB
_USUAL = 300 * MIB
_OVERHEAD_SMALL = 8 * MIB
_OVERHEAD = 80 * MIB

# clones have one UUID; a frozen filesystem needs no recovery, which a read-only disk refuses
_MKFS = ("mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=0,rmapbt=0", "-s", "size=4096")
_OPTIONS = (("discard", None), ("nouuid", None))
_READ_ONLY = (("ro", None), ("norecovery", None), ("nouuid", None))


def file_size(limit: int) -> int:
    """Size of the file that leaves ``limit`` bytes to the user."""
    overhead = _OVERHEAD_SMALL if limit + _OVERHEAD_SMALL < _USUAL else _OVERHEAD
    return (limit + overhead) // _BLOCK * _BLOCK


def make(image: Path, limit: int) -> None:
    """Make a filesystem with an empty root and room for ``limit`` bytes.

    Raises:
        MissingFeature: ``mkfs.xfs`` is not installed.
        CommandFailed: it is too old for one so small.
    """
    size = file_size(limit)
    with open(image, "xb") as made:
        os.fchmod(made.fileno(), 0o600)
        made.truncate(size)
    small = ("--unsupported",) if size < _USUAL else ()
    process.run([*_MKFS, *small, str(image)])


def mount(image: Path, target: Path, *, read_only: bool = False) -> None:
    """Mount an image at a folder; nothing happens if something is mounted there.

    Raises:
        MountFailed: it is damaged, or the kernel has no xfs.
    """
    if mounts.is_mount_point(target):
        return
    flags = os.O_RDONLY if read_only else os.O_RDWR
    backing = os.open(image, flags | os.O_CLOEXEC)
    try:
        # a filesystem that somebody still uses must be mounted from the device it is on
        if read_only or not _mount_found(backing, target):
            device, path = loop.attach(backing, os.fsencode(image.name))
            try:
                _mount_device(path, target, read_only=read_only)
            finally:
                os.close(device)
    finally:
        os.close(backing)


def _mount_found(backing: int, target: Path) -> bool:
    """Mount from the device a file is on already; False if there is none any more."""
    for attempt in range(_ATTEMPTS):
        path = loop.find(backing)
        if path is None:
            return False
        try:
            _mount_device(path, target, read_only=False)
        except mounts.MountFailed:
            # the device may have gone away meanwhile, its last user being gone
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(_PAUSE_SECONDS)
        else:
            return True
    return False


def _mount_device(path: Path, target: Path, *, read_only: bool) -> None:
    options: list[tuple[str, str | bytes | None]] = [("source", str(path))]
    options += _READ_ONLY if read_only else _OPTIONS
    mounts.mount("xfs", target, options)


def unmount(target: Path) -> None:
    """Take an image off its folder; out of sight at once where it is still in use."""
    try:
        mounts.unmount(target)
    except mounts.MountFailed:
        mounts.detach_beneath(target)
        mounts.unmount(target, detach=True)


def grow(image: Path, target: Path, limit: int) -> None:
    """Make a mounted filesystem larger; repeatable after a crash in the middle.

    Raises:
        OSError: the filesystem cannot become so large.
    """
    wanted = file_size(limit)
    with open(image, "r+b") as file:
        if os.fstat(file.fileno()).st_size < wanted:
            file.truncate(wanted)
            os.fsync(file.fileno())
        device = loop.find(file.fileno())
    if device is not None:
        loop.update_capacity(device)
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        inside = os.fstatvfs(root)
        if inside.f_blocks * inside.f_frsize < limit:
            xfs.grow(root, wanted)
            syncfs(root)
    finally:
        os.close(root)


def write_back(target: Path) -> None:
    """Write out what is dirty, so that a freeze that follows has little left to do."""
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syncfs(root)
    finally:
        os.close(root)


class Freeze:
    """Mounted filesystems that are held still: whoever writes to them waits.

    Args:
        targets: where they are mounted.
    """

    def __init__(self, targets: Sequence[Path]) -> None:
        self._targets = list(targets)
        self._guard: process.Running | None = None
        self._pipe = -1
        self._frozen: list[Path] = []

    def arm(self) -> None:
        """Start the process that thaws in our place; done before anybody waits."""
        waiting = f"timeout {_GUARD_SECONDS} cat > /dev/null"
        script = f'{waiting}; for one; do fsfreeze --unfreeze "$one"; done'
        reading, self._pipe = os.pipe()
        try:
            self._guard = process.spawn(
                ["sh", "-c", script, "sh", *map(str, self._targets)], stdin=reading
            )
        finally:
            os.close(reading)

    def freeze(self) -> None:
        """Hold them all; returns when nobody is writing any more."""
        for target in self._targets:
            _control(target, _FIFREEZE, errno.EBUSY)  # EBUSY: it is frozen already
            self._frozen.append(target)

    def thaw(self) -> None:
        """Let them go on; does nothing when they are not held."""
        while self._frozen:
            _control(self._frozen.pop(), _FITHAW, errno.EINVAL)  # EINVAL: the guard was first

    def disarm(self) -> None:
        """End the guard and wait for its end, so that it cannot thaw the next freeze."""
        self.thaw()
        if self._guard is not None:
            os.close(self._pipe)
            self._guard.wait()
            self._guard = None


def thaw(target: Path) -> None:
    """Let a filesystem go on that a crash may have left frozen."""
    _control(target, _FITHAW, errno.EINVAL)


def _control(target: Path, request: int, tolerated: int) -> None:
    root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(root, request, 0)
    except OSError as refused:
        if refused.errno != tolerated:
            raise
    finally:
        os.close(root)


def clone(image: Path, target: Path, *, sync: bool) -> None:
    """Clone an image by reflink into a new or empty file."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    source = os.open(image, os.O_RDONLY | flags)
    try:
        made = os.open(target, os.O_RDWR | os.O_CREAT | flags, 0o600)
        try:
            extents.clone_content(source, made)
            if sync:
                os.fsync(made)
        finally:
            os.close(made)
    finally:
        os.close(source)


def sync(image: Path) -> None:
    """Make a clone durable."""
    file = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)

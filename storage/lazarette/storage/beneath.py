"""Walking and removing below a folder without ever leaving it.

Every step is by descriptor and name with ``O_NOFOLLOW`` and ``RESOLVE_NO_XDEV``: a
symlink is never followed, a mount point never entered, a path longer than PATH_MAX no
trouble, and nobody can swap a folder for a link between a check and its use.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from lazarette.storage import mounts, syscalls
from lazarette.storage.errors import InUse
from lazarette.storage.mounts import AnyPath
from lazarette.storage.syscalls import Resolve

_PIECE = 3072  # of a path at a time: PATH_MAX is 4096, a name at most 255
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK


@contextmanager
def opened(path: AnyPath) -> Iterator[int]:
    """A descriptor of a folder for the length of the block; links on the way are followed."""
    descriptor = os.open(os.fsencode(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_folder(parent: int, name: bytes) -> int:
    """Open a sub-folder by its name, refusing links and mount points.

    Raises:
        OSError: ``EXDEV`` for a mount point, ``ENOTDIR`` or ``ELOOP`` for anything else that
            is not a folder.
    """
    return syscalls.openat2(parent, name, _FOLDER, resolve=Resolve.NO_XDEV | Resolve.NO_SYMLINKS)


def open_parent(root: int, path: bytes) -> tuple[int, bytes]:
    """The folder a path's last part is in, walked without links or mounts, and that part.

    Longer paths than PATH_MAX are walked in pieces.
    """
    folder_path, _, name = path.rpartition(b"/")
    folder = os.dup(root)
    while folder_path:
        piece = folder_path
        if len(piece) > _PIECE:
            piece = folder_path[: folder_path.rindex(b"/", 0, _PIECE)]
        folder_path = folder_path[len(piece) + 1 :]
        try:
            deeper = open_folder(folder, piece)
        finally:
            os.close(folder)
        folder = deeper
    return folder, name


def resolve(root: int, path: bytes, flags: int = os.O_PATH, mode: int = 0) -> int:
    """Open a path as a process whose root folder is ``root`` would, links included."""
    return syscalls.openat2(
        root, path.lstrip(b"/") or b".", flags, mode, Resolve.IN_ROOT | Resolve.NO_MAGICLINKS
    )


@dataclass(slots=True)
class Entry:
    """A directory entry met by :func:`walk`.

    Attributes:
        path: below the root, without a leading slash; ``b""`` for the root itself.
        parent: descriptor of its folder, valid until the next step; the root's own for it.
        name: its name there; ``b"."`` for the root.
        status: what ``lstat`` says.
        mount_point: something is mounted on it; it is not entered.
    """

    path: bytes
    parent: int
    name: bytes
    status: os.stat_result
    mount_point: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.status.st_mode)


def names(folder: int) -> list[bytes]:
    """The names in a folder behind a descriptor, sorted.

    btrfs lists what was there when the descriptor was opened or last wound back, so it is
    wound back first.
    """
    os.lseek(folder, 0, os.SEEK_SET)
    return sorted(os.fsencode(name) for name in os.listdir(folder))


def walk(root: int, prunes: Callable[[bytes], bool] | None = None) -> Iterator[Entry]:
    """All entries below a folder, itself first, parents before children, sorted by name.

    An entry that vanishes meanwhile is left out; a folder that something else replaces
    meanwhile is that.  Depth is bounded by open descriptors, one
    a level.

    Args:
        root: descriptor of the folder.
        prunes: says of a folder's path whether to leave out what is in it.
    """
    yield Entry(b"", root, b".", os.fstat(root))
    yield from _walk_into(root, prunes)


def _walk_into(root: int, prunes: Callable[[bytes], bool] | None) -> Iterator[Entry]:
    top = os.dup(root)
    stack: list[tuple[int, bytes, Iterator[bytes]]] = [(top, b"", iter(names(top)))]
    try:
        while stack:
            folder, path, left = stack[-1]
            name = next(left, None)
            if name is None:
                os.close(stack.pop()[0])
                continue
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                continue
            own = path + b"/" + name if path else name
            inner: int | None = None
            crossing = False
            if stat.S_ISDIR(status.st_mode) and not (prunes is not None and prunes(own)):
                try:
                    inner = open_folder(folder, name)
                except OSError as refused:
                    if refused.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                        stack[-1] = (folder, path, chain((name,), left))  # look again
                        continue
                    if refused.errno != errno.EXDEV:
                        raise
                    crossing = True
            try:
                yield Entry(own, folder, name, status, crossing)
            except GeneratorExit:
                if inner is not None:
                    os.close(inner)
                raise
            if inner is not None:
                stack.append((inner, own, iter(names(inner))))
    finally:
        for folder, _, _ in stack:
            os.close(folder)


def remove_tree(parent: int, name: bytes) -> None:
    """Delete a file or a folder with all below it; nothing happens if it is not there.

    Raises:
        InUse: a mount point is inside; everything before it in order may be gone, nothing of
            the mounted filesystem is touched.
    """
    try:
        os.unlink(name, dir_fd=parent)
        return
    except FileNotFoundError:
        return
    except OSError as refused:
        if refused.errno not in (errno.EISDIR, errno.EPERM, errno.EBUSY):
            raise
    _remove_folder(parent, name)


def _open_inside(parent: int, name: bytes) -> int:
    try:
        return open_folder(parent, name)
    except OSError as refused:
        if refused.errno == errno.EXDEV:
            raise InUse(
                f"removing {os.fsdecode(name)}: something is mounted there",
                hint="unmount it first",
            ) from refused
        raise


def _remove_folder(parent: int, name: bytes) -> None:
    first = _open_inside(parent, name)
    stack = [(name, first, _empty(first))]
    try:
        while stack:
            own, folder, deeper = stack[-1]
            if deeper:
                below = deeper.pop()
                inner = _open_inside(folder, below)
                stack.append((below, inner, _empty(inner)))
                continue
            above = stack[-2][1] if len(stack) > 1 else parent
            os.rmdir(own, dir_fd=above)
            os.close(folder)
            stack.pop()
    finally:
        for _, folder, _ in stack:
            os.close(folder)


def _empty(folder: int) -> list[bytes]:
    """Unlink what is no folder and drop empty ones; the names of folders left."""
    left: list[bytes] = []
    os.lseek(folder, 0, os.SEEK_SET)
    with os.scandir(folder) as entries:
        listed = [(os.fsencode(e.name), e.is_dir(follow_symlinks=False)) for e in entries]
    for name, is_folder in listed:
        try:
            if is_folder:
                os.rmdir(name, dir_fd=folder)
            else:
                os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            continue
        except OSError as refused:
            if is_folder and refused.errno in (errno.ENOTEMPTY, errno.EBUSY, errno.EEXIST):
                left.append(name)
            elif refused.errno == errno.EBUSY:
                raise InUse(
                    f"removing {os.fsdecode(name)}: something is mounted there",
                    hint="unmount it first",
                ) from refused
            else:
                raise
    return left


def remove_path(path: AnyPath) -> None:
    """:func:`remove_tree` by path; leftover mounts inside are detached first (case A22)."""
    encoded = os.fsencode(path).rstrip(b"/")
    mounts.unmount(encoded, detach=True)
    mounts.detach_beneath(encoded)
    folder, name = os.path.split(encoded)
    try:
        with opened(folder or b".") as parent:
            remove_tree(parent, name)
    except FileNotFoundError:
        return

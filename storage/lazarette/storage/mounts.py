"""Mounts: listing, making, binding, moving and taking off, by system calls only.

Nothing here parses a command line or starts ``mount(8)``.  Paths may be text or bytes;
targets must exist.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lazarette.storage import syscalls
from lazarette.storage.errors import InternalError, MissingFeature, NotRoot
from lazarette.storage.syscalls import AT_FDCWD, MountAttr, Propagation, Resolve

AnyPath = Path | str | bytes

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.1


class MountFailed(InternalError):
    """The kernel refused a mount; the message has its reason."""

    number = 122


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of ``/proc/self/mountinfo``; see proc_pid_mountinfo(5).

    Attributes:
        id: number of the mount.
        parent: number of the mount it is on.
        device: ``major:minor`` of its filesystem.
        root: the folder of the filesystem that is mounted.
        target: where.
        options: options of this mount.
        propagation: ``shared:1``, ``master:2`` and the like; empty for private.
        kind: type of the filesystem.
        source: what is mounted, as the filesystem says it.
        super_options: options of the filesystem.
    """

    id: int
    parent: int
    device: str
    root: bytes
    target: bytes
    options: tuple[str, ...]
    propagation: tuple[str, ...]
    kind: str
    source: bytes
    super_options: tuple[str, ...]


def _unescape(field: bytes) -> bytes:
    if b"\\" not in field:
        return field
    head, *rest = field.split(b"\\")
    return head + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)


def _parse(line: bytes) -> Mount:
    own, _, filesystem = line.partition(b" - ")
    fields = own.split(b" ")
    kind, source, super_options = filesystem.split(b" ", 2)
    return Mount(
        id=int(fields[0]),
        parent=int(fields[1]),
        device=fields[2].decode(),
        root=_unescape(fields[3]),
        target=_unescape(fields[4]),
        options=tuple(fields[5].decode().split(",")),
        propagation=tuple(field.decode() for field in fields[6:]),
        kind=kind.decode(),
        source=_unescape(source),
        super_options=tuple(os.fsdecode(super_options).split(",")),
    )


def mounts(pid: int | str = "self") -> list[Mount]:
    """All mounts a process sees, in mount order."""
    with open(f"/proc/{pid}/mountinfo", "rb") as table:
        return [_parse(line) for line in table.read().splitlines()]


def mounts_beneath(path: AnyPath) -> list[Mount]:
    """Mounts strictly below a folder, in mount order."""
    prefix = os.path.realpath(os.fsencode(path)).rstrip(b"/") + b"/"
    return [mount for mount in mounts() if mount.target.startswith(prefix)]


def is_mount_point(path: AnyPath) -> bool:
    """Whether something, a bind of the same filesystem included, is mounted at a path."""
    encoded = os.path.realpath(os.fsencode(path))
    if encoded == b"/":
        return True
    folder, name = os.path.split(encoded)
    try:
        parent = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        found = syscalls.openat2(parent, name, os.O_PATH | os.O_NOFOLLOW, resolve=Resolve.NO_XDEV)
    except FileNotFoundError:
        return False
    except OSError as refused:
        if refused.errno == errno.EXDEV:
            return True
        raise
    finally:
        os.close(parent)
    os.close(found)
    return False


@contextmanager
def _explained(action: str, target: AnyPath, context: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as refused:
        said = syscalls.context_log(context) if context is not None else ""
        reason = said or os.strerror(refused.errno or 0)
        shown = os.fsdecode(target)
        if refused.errno == errno.EPERM and os.geteuid() != 0:
            raise NotRoot(f"{action} {shown} needs root", hint="run it as root") from refused
        raise MountFailed(f"{action} {shown}: {reason}") from refused


def filesystem(
    kind: str,
    options: Sequence[tuple[str, str | bytes | None]],
    *,
    attributes: MountAttr = MountAttr.NONE,
    target: AnyPath = "",
) -> int:
    """A detached mount of a new filesystem, as a descriptor the caller closes.

    Args:
        kind: filesystem type.
        options: name and value pairs in order, None for a flag; ``source`` is one of them.
        attributes: of the mount.
        target: only for messages.

    Raises:
        MountFailed: the kernel refused, with what it said.
    """
    with _explained(f"mounting {kind} at", target):
        context = syscalls.fsopen(kind)
    try:
        with _explained(f"mounting {kind} at", target, context):
            for key, value in options:
                encoded = value.encode() if isinstance(value, str) else value
                syscalls.fsconfig(context, key.encode(), encoded)
            syscalls.fsconfig_create(context)
            return syscalls.fsmount(context, attributes)
    finally:
        os.close(context)


def mount(
    kind: str,
    target: AnyPath,
    options: Mapping[str, str | bytes | None] | Sequence[tuple[str, str | bytes | None]] = (),
    *,
    attributes: MountAttr = MountAttr.NONE,
) -> None:
    """Mount a new filesystem at a folder; see :func:`filesystem`."""
    pairs = list(options.items()) if isinstance(options, Mapping) else list(options)
    descriptor = filesystem(kind, pairs, attributes=attributes, target=target)
    try:
        attach(descriptor, target)
    finally:
        os.close(descriptor)


def reconfigure(target: AnyPath, options: Sequence[tuple[str, str | bytes | None]]) -> None:
    """Change options of the filesystem mounted at a path, while it is in use.

    Raises:
        MountFailed: the kernel refused.
    """
    with _explained("reconfiguring", target):
        context = syscalls.fspick(os.fsencode(target))
    try:
        with _explained("reconfiguring", target, context):
            for key, value in options:
                encoded = value.encode() if isinstance(value, str) else value
                syscalls.fsconfig(context, key.encode(), encoded)
            syscalls.fsconfig_reconfigure(context)
    finally:
        os.close(context)


def attach(descriptor: int, target: AnyPath) -> None:
    """Put a detached mount at a path."""
    with _explained("mounting at", target):
        syscalls.move_mount(descriptor, AT_FDCWD, os.fsencode(target))


def bind(
    source: AnyPath | int,
    target: AnyPath,
    *,
    recursive: bool = True,
    read_only: bool = False,
    recursive_read_only: bool = False,
    attributes: MountAttr = MountAttr.NONE,
    propagation: Propagation = Propagation.UNCHANGED,
    user_namespace: int | None = None,
) -> None:
    """Show a file or folder at a second place.

    Args:
        source: path, or a descriptor (``O_PATH`` is enough) of what to bind.
        target: where.
        recursive: take the mounts below along.
        read_only: make the bound mount itself read-only.
        recursive_read_only: and every mount below it (case A23).
        attributes: further attributes of the bound mount.
        propagation: of the new mounts.
        user_namespace: descriptor of a user namespace whose id map to apply.

    Raises:
        MissingFeature: one of the filesystems cannot map owners.
        MountFailed: the kernel refused.
    """
    directory, path = (source, b"") if isinstance(source, int) else (AT_FDCWD, os.fsencode(source))
    with _explained("binding to", target):
        tree = syscalls.open_tree(directory, path, clone=True, recursive=recursive)
        try:
            if user_namespace is not None:
                _map_owners(tree, target, user_namespace, recursive=recursive)
            own = attributes | (MountAttr.READ_ONLY if read_only else MountAttr.NONE)
            if own:
                syscalls.mount_setattr(tree, b"", add=own)
            if recursive_read_only:
                syscalls.mount_setattr(tree, b"", add=MountAttr.READ_ONLY, recursive=True)
            if propagation:
                syscalls.mount_setattr(tree, b"", propagation=propagation, recursive=recursive)
            syscalls.move_mount(tree, AT_FDCWD, os.fsencode(target))
        finally:
            os.close(tree)


@contextmanager
def mapped(folder: AnyPath, user_namespace: int) -> Iterator[int]:
    """A folder with its owners mapped, mounted nowhere: a descriptor to begin paths with.

    Args:
        folder: which; mounts below it are left out.
        user_namespace: descriptor of a user namespace whose id map to apply.

    Raises:
        MissingFeature: its filesystem cannot map owners.
    """
    with _explained("mapping the owners of", folder):
        tree = syscalls.open_tree(AT_FDCWD, os.fsencode(folder), clone=True, recursive=False)
    try:
        _map_owners(tree, folder, user_namespace, recursive=False)
        yield tree
    finally:
        os.close(tree)


def _map_owners(tree: int, shown: AnyPath, user_namespace: int, *, recursive: bool) -> None:
    with _explained("mapping the owners of", shown):
        try:
            syscalls.mount_setattr(
                tree,
                b"",
                add=MountAttr.IDMAP,
                user_namespace=user_namespace,
                recursive=recursive,
            )
        except OSError as refused:
            if refused.errno != errno.EINVAL:
                raise
            raise MissingFeature(
                f"the filesystem at {os.fsdecode(shown)} cannot map owners",
                hint="start the container with --userns=host, or use another driver",
            ) from refused


def move(source: AnyPath, target: AnyPath) -> None:
    """Take a mount from one place to another."""
    with _explained("moving a mount to", target):
        tree = syscalls.open_tree(AT_FDCWD, os.fsencode(source), clone=False, recursive=False)
        try:
            syscalls.move_mount(tree, AT_FDCWD, os.fsencode(target))
        finally:
            os.close(tree)


def change(
    target: AnyPath,
    *,
    add: MountAttr = MountAttr.NONE,
    remove: MountAttr = MountAttr.NONE,
    propagation: Propagation = Propagation.UNCHANGED,
    recursive: bool = False,
) -> None:
    """Change attributes or propagation of what is mounted at a path."""
    with _explained("changing the mount at", target):
        syscalls.mount_setattr(
            AT_FDCWD,
            os.fsencode(target),
            add=add,
            remove=remove,
            propagation=propagation,
            recursive=recursive,
        )


def unmount(target: AnyPath, *, detach: bool = False, patience: float = 0.0) -> None:
    """Take the topmost mount off a path; nothing happens if there is none.

    Args:
        target: where.
        detach: even if it is in use: gone from the tree at once, from the kernel when the
            last user lets go.
        patience: seconds that those who use it are given to let go.

    Raises:
        MountFailed: it is in use.
    """
    flags = syscalls.UMOUNT_NOFOLLOW | (syscalls.UMOUNT_DETACH if detach else 0)
    until, pause = time.monotonic() + patience, _FIRST_PAUSE_S
    while True:
        try:
            syscalls.umount2(os.fsencode(target), flags)
        except OSError as refused:
            if refused.errno in (errno.EINVAL, errno.ENOENT):
                return
            if refused.errno == errno.EBUSY and time.monotonic() < until:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            with _explained("unmounting", target):
                raise
        return


def users(target: AnyPath) -> list[str]:
    """Processes that keep a mount busy, by number and program, as far as can be seen."""
    wanted = os.path.realpath(os.fsencode(target))
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _uses(process, wanted):
            with suppress(OSError):
                # not its arguments, in which people leave passwords
                said = (process / "comm").read_bytes().rstrip(b"\n")
                found.append(f"{process.name} {os.fsdecode(said)}")
    return found


def _uses(process: Path, wanted: bytes) -> bool:
    links = [process / "cwd", process / "root"]
    with suppress(OSError):
        links += (process / "fd").iterdir()
    for link in links:
        with suppress(OSError):
            shown = os.readlink(os.fsencode(link))
            if shown == wanted or shown.startswith(wanted + b"/"):
                return True
    return False


def detach_beneath(path: AnyPath) -> list[bytes]:
    """Detach every mount strictly below a folder, innermost first; return their targets."""
    found = [mount.target for mount in reversed(mounts_beneath(path))]
    for target in found:
        unmount(target, detach=True)
    return found

"""Paths inside a container's root, resolved by the kernel so that they cannot leave it.

``openat2`` with ``RESOLVE_IN_ROOT`` treats the root as ``/`` for absolute names, ``..``
and symbolic links alike, and is free of races.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from lazarette.storage import beneath
from lazarette.storage.errors import InvalidArgument


def open_in_root(root: int, path: str | bytes, flags: int, mode: int = 0) -> int:
    """Open a path as a process whose root is ``root`` would.

    Args:
        root: descriptor of the root folder.
        path: absolute or relative to the root.
        flags: of ``open``; ``O_CLOEXEC`` is added.
        mode: for ``O_CREAT``.

    Raises:
        OSError: as ``open`` would.
    """
    return beneath.resolve(root, os.fsencode(path), flags, mode)


def make_folders(root: int, path: str, mode: int = 0o755, owner: tuple[int, int] = (0, 0)) -> int:
    """Make a folder and its parents inside the root; returns a descriptor of it.

    Folders that exist keep what they are.
    """
    current = os.dup(root)
    walked = ""
    try:
        for part in [p for p in path.split("/") if p not in ("", ".")]:
            walked += "/" + part
            try:
                following = open_in_root(root, walked, os.O_PATH | os.O_DIRECTORY)
            except FileNotFoundError:
                os.mkdir(part, mode, dir_fd=current)
                following = open_in_root(root, walked, os.O_PATH | os.O_DIRECTORY)
                if owner != (0, 0):
                    os.chown(part, *owner, dir_fd=current, follow_symlinks=False)
            os.close(current)
            current = following
        return current
    except BaseException:
        os.close(current)
        raise


def make_target(root: int, path: str, folder: bool) -> None:
    """Make a mount point that is missing, an empty folder or file; what is there stays."""
    try:
        os.close(open_in_root(root, path, os.O_PATH))
        return
    except FileNotFoundError:
        pass
    except OSError:
        return  # the runtime says what is wrong in its own words
    if folder:
        os.close(make_folders(root, path))
        return
    parent = make_folders(root, os.path.dirname(path))
    try:
        flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        os.close(os.open(os.path.basename(path), flags, 0o644, dir_fd=parent))
    finally:
        os.close(parent)


def read_in_root(root: int, path: str, limit: int = 1 << 20) -> str:
    """A small text file of the container; empty when it is absent or not a file."""
    try:
        fd = open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as file:
        try:
            return file.read(limit).decode(errors="surrogateescape")
        except OSError:
            return ""


@dataclass(frozen=True)
class User:
    """Whom a process runs as: ids, further groups, home folder."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def resolve_user(root: int, wanted: str, extra_groups: tuple[str, ...] = ()) -> User:
    """Look up ``user[:group]`` (names or numbers) in the container's own files.

    Raises:
        InvalidArgument: a name that is not there, or a number out of range.
    """
    name, _, group = wanted.partition(":")
    passwd = [line.split(":") for line in read_in_root(root, "etc/passwd").splitlines()]
    groups = [line.split(":") for line in read_in_root(root, "etc/group").splitlines()]
    passwd = [row for row in passwd if len(row) >= 7 and row[2].isdecimal() and row[3].isdecimal()]
    groups = [row for row in groups if len(row) >= 4 and row[2].isdecimal()]
    name = name or "0"
    row = next((r for r in passwd if r[0] == name), None)
    if row is None and name.isdecimal():
        row = next((r for r in passwd if r[2] == name), None)
    if row is not None:
        uid, gid, home, login = int(row[2]), int(row[3]), row[5] or "/", row[0]
    elif name.isdecimal():
        uid, gid, home, login = _number(name), 0, "/", ""
    else:
        raise InvalidArgument(f"unable to find user {name}: no matching entries in passwd file")
    further: list[int] = []
    if group:
        gid = _group(groups, group)
    elif login:
        further += [int(r[2]) for r in groups if login in r[3].split(",") and int(r[2]) != gid]
    further += [_group(groups, extra) for extra in extra_groups]
    return User(uid, gid, tuple(dict.fromkeys(further)), home)


def _group(groups: list[list[str]], wanted: str) -> int:
    for row in groups:
        if row[0] == wanted:
            return int(row[2])
    if wanted.isdecimal():
        return _number(wanted)
    raise InvalidArgument(f"unable to find group {wanted}: no matching entries in group file")


def _number(text: str) -> int:
    value = int(text)
    if value >= 1 << 31:
        raise InvalidArgument("uids and gids must be in range 0-2147483647")
    return value

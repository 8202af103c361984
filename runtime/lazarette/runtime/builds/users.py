"""Names of users and groups, looked up in an image's own files."""

from __future__ import annotations

from lazarette.runtime.builds.errors import StepFailed
from lazarette.runtime.builds.tree import Tree

_LIMIT = 16 << 20
_LARGEST = (1 << 32) - 2


def _rows(root: Tree, path: bytes, columns: int) -> list[list[str]]:
    try:
        text = root.read(path, _LIMIT).decode(errors="surrogateescape")
    except OSError:
        return []
    rows = [line.split(":") for line in text.splitlines()]
    return [row for row in rows if len(row) >= columns]


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and int(text) <= _LARGEST else None


def find_user(root: Tree, user: str) -> tuple[int, int]:
    """Uid and gid for ``--chown``; a number alone is both, a name has its own group.

    Raises:
        StepFailed: no such name.
    """
    number = _number(user)
    if number is not None:
        return number, number
    for row in _rows(root, b"etc/passwd", 4):
        if row[0] == user and row[2].isdecimal():
            return int(row[2]), _number(row[3]) or 0
    raise StepFailed(
        f"unable to convert uid/gid chown string to host mapping: can't find uid for"
        f" user {user}: no such user: {user}"
    )


def find_group(root: Tree, group: str) -> int:
    """Gid of a group name or number.

    Raises:
        StepFailed: no such name.
    """
    number = _number(group)
    if number is not None:
        return number
    for row in _rows(root, b"etc/group", 3):
        if row[0] == group and row[2].isdecimal():
            return int(row[2])
    raise StepFailed(
        f"unable to convert uid/gid chown string to host mapping: can't find gid for"
        f" group {group}: no such group: {group}"
    )

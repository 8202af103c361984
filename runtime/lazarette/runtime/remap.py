"""``--userns-remap``: whose subordinate ids the users of containers are on the host.

Read as dockerd reads it: a user, or ``USER:GROUP``, by name or number, that has ranges in
``/etc/subuid`` and ``/etc/subgid`` (subuid(5)); ``default`` is a user of its own, made when
it is missing.
"""

from __future__ import annotations

import grp
import pwd
from dataclasses import dataclass
from pathlib import Path

from lazarette.storage import process
from lazarette.storage.errors import InvalidArgument
from lazarette.storage.idmaps import IdMap, IdRange

DEFAULT, DEFAULT_USER = "default", "dockremap"
SUBUID, SUBGID = Path("/etc/subuid"), Path("/etc/subgid")
_FIRST, _LENGTH = 100_000, 65_536
_USERADD = ("useradd", "--system", "--user-group", "--no-create-home", "--shell", "/bin/false")


@dataclass(frozen=True)
class Remapped:
    """A user of the host and a group.

    Attributes:
        names: the user's name and number, as the files of ranges may have either.
        groups: the same of the group.
    """

    names: tuple[str, str]
    groups: tuple[str, str]


def idmap_of(text: str) -> IdMap | None:
    """The map that an option asks for; None for an empty one.

    Raises:
        InvalidArgument: no such user or group, or one without ranges.
        MissingFeature: the default user is missing and there is no ``useradd``.
    """
    if not text:
        return None
    if text == DEFAULT:
        _make_default()
        text = DEFAULT_USER
    found = find(text)
    uids = read_ranges(SUBUID, found.names)
    gids = read_ranges(SUBGID, found.groups) or read_ranges(SUBGID, found.names)
    for file, ranges in ((SUBUID, uids), (SUBGID, gids)):
        if not ranges:
            name = found.names[0]
            raise InvalidArgument(
                f"--userns-remap: {file} has no range of ids for {name}",
                hint=f"usermod --add-subuids {_free(SUBUID)} --add-subgids {_free(SUBGID)} {name}",
            )
    return IdMap(uids, gids)


def find(text: str) -> Remapped:
    """The user and group of ``USER[:GROUP]`` or ``uid[:gid]``; without group its namesake's.

    Raises:
        InvalidArgument: one of them does not exist.
    """
    parts = text.split(":")
    if len(parts) > 2 or not all(parts):
        raise InvalidArgument(f'invalid user/group specification in --userns-remap: "{text}"')
    name, number = _user(parts[0])
    wanted = parts[1] if len(parts) == 2 else (str(number) if parts[0].isdecimal() else name)
    group, gid = _group(wanted)
    return Remapped((name, str(number)), (group, str(gid)))


def _user(text: str) -> tuple[str, int]:
    try:
        entry = pwd.getpwuid(int(text)) if text.isdecimal() else pwd.getpwnam(text)
    except (KeyError, OverflowError) as unknown:
        raise InvalidArgument(f"--userns-remap: there is no user {text}") from unknown
    return entry.pw_name, entry.pw_uid


def _group(text: str) -> tuple[str, int]:
    try:
        entry = grp.getgrgid(int(text)) if text.isdecimal() else grp.getgrnam(text)
    except (KeyError, OverflowError) as unknown:
        raise InvalidArgument(f"--userns-remap: there is no group {text}") from unknown
    return entry.gr_name, entry.gr_gid


def read_ranges(file: Path, owners: tuple[str, str]) -> tuple[IdRange, ...]:
    """The ranges of an owner, one behind the other from 0 on; lines that are none are skipped.

    Args:
        file: lines of ``OWNER:FIRST:COUNT``; it need not exist.
        owners: the words that the owner may be written as.
    """
    made: list[IdRange] = []
    for owner, first, count in _lines(file):
        if owner in owners:
            made.append(IdRange(sum(each.length for each in made), first, count))
    return tuple(made)


def _lines(file: Path) -> list[tuple[str, int, int]]:
    try:
        lines = file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = [line.split(":") for line in lines]
    return [
        (row[0], int(row[1]), int(row[2]))
        for row in rows
        if len(row) == 3 and row[1].isdecimal() and row[2].isdecimal() and int(row[2])
    ]


def _make_default() -> None:
    """Make the default user and its ranges, behind all there are."""
    try:
        pwd.getpwnam(DEFAULT_USER)
    except KeyError:
        process.run([*_USERADD, DEFAULT_USER])
    for file, option in ((SUBUID, "--add-subuids"), (SUBGID, "--add-subgids")):
        if any(owner == DEFAULT_USER for owner, _, _ in _lines(file)):
            continue
        file.touch()  # usermod refuses to add to a file that is not there
        process.run(["usermod", option, _free(file), DEFAULT_USER])


def _free(file: Path) -> str:
    """The first and last of a range behind all those of a file."""
    first = max([_FIRST, *(start + count for _, start, count in _lines(file))])
    return f"{first}-{first + _LENGTH - 1}"

"""``--chmod``: octal or symbolic changes of permission bits."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass

from lazarette.runtime.builds.errors import DockerfileError

_OCTAL = re.compile(r"[0-7]{1,5}")
_CLAUSE = re.compile(r"([ugoa]*)((?:[-+=](?:[ugo]|[rwxXst]*))+)")
_ACTION = re.compile(r"([-+=])([ugo]|[rwxXst]*)")
_SHIFT = {"u": 6, "g": 3, "o": 0}
_BITS = {"r": 4, "w": 2, "x": 1}


@dataclass(frozen=True, slots=True)
class ModeChange:
    """What to do with permission bits: set them, or follow symbolic clauses."""

    octal: int | None
    clauses: tuple[tuple[str, str], ...] = ()

    def apply(self, mode: int, *, folder: bool) -> int:
        """The new permission bits of something that has ``mode``."""
        bits = stat.S_IMODE(mode)
        if self.octal is not None:
            return self.octal
        for who, actions in self.clauses:
            for action in _ACTION.finditer(actions):
                bits = _act(bits, who or "ugo", action[1], action[2], folder)
        return bits


def parse_chmod(text: str) -> ModeChange:
    """The value of ``--chmod``.

    Raises:
        DockerfileError: neither octal nor symbolic.
    """
    if _OCTAL.fullmatch(text) and int(text, 8) <= 0o7777:
        return ModeChange(int(text, 8))
    clauses: list[tuple[str, str]] = []
    for part in text.split(","):
        clause = _CLAUSE.fullmatch(part)
        if clause is None:
            raise DockerfileError(
                f"invalid chmod parameter: '{text}'. it should be octal string and between 0"
                " and 07777, or a symbolic mode"
            )
        clauses.append((clause[1].replace("a", "ugo"), clause[2]))
    return ModeChange(None, tuple(clauses))


def _act(bits: int, who: str, operator: str, letters: str, folder: bool) -> int:
    for person in dict.fromkeys(who):
        shift = _SHIFT[person]
        change = _wanted(bits, person, letters, folder)
        mask = 7 << shift
        special = {"u": stat.S_ISUID, "g": stat.S_ISGID, "o": stat.S_ISVTX}[person]
        if operator == "=":
            bits = (bits & ~mask & ~special) | change
        elif operator == "+":
            bits |= change
        else:
            bits &= ~change
    return bits


def _wanted(bits: int, person: str, letters: str, folder: bool) -> int:
    shift = _SHIFT[person]
    if letters in _SHIFT:
        return (bits >> _SHIFT[letters] & 7) << shift
    change = 0
    for letter in letters:
        if letter in _BITS:
            change |= _BITS[letter] << shift
        elif letter == "X" and (folder or bits & 0o111):
            change |= 1 << shift
        elif letter == "s" and person in "ug":
            change |= stat.S_ISUID if person == "u" else stat.S_ISGID
        elif letter == "t":
            change |= stat.S_ISVTX
    return change

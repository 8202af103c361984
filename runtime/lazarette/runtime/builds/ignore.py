"""``.dockerignore``: which paths of a folder are left out of a context.

The last line that matches decides; a line that matches a folder covers everything in it;
``!`` takes back.  ``*`` and ``?`` stop at a slash, ``**`` goes over any number of folders.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lazarette.runtime.builds.errors import ContextError


@dataclass(frozen=True, slots=True)
class Pattern:
    """One line: its cleaned text, whether it takes back, and how it matches."""

    text: str
    exception: bool
    regex: re.Pattern[str]

    @property
    def parts(self) -> tuple[str, ...]:
        """The components of the pattern."""
        return tuple(self.text.split("/"))


def read_lines(text: str) -> list[str]:
    """The patterns of a ``.dockerignore``, cleaned; comments and blank lines are left out.

    Raises:
        ContextError: a line that is only ``!``.
    """
    found: list[str] = []
    for line in text.removeprefix("\ufeff").splitlines():
        if line.startswith("#"):
            continue
        pattern = line.strip()
        if not pattern:
            continue
        exception = pattern.startswith("!")
        if exception:
            pattern = pattern[1:].strip()
            if not pattern:
                raise ContextError('illegal exclusion pattern: "!"')
        pattern = posixpath.normpath(pattern)
        pattern = pattern.lstrip("/") if len(pattern) > 1 else pattern
        found.append("!" + pattern if exception else pattern)
    return found


class Ignore:
    """Decides for paths relative to the context, without a leading slash.

    Args:
        patterns: as :func:`read_lines` gives them, or of ``--exclude``.

    Raises:
        ContextError: a pattern that is not well formed.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns: Sequence[Pattern] = tuple(_compiled(p) for p in patterns if p.strip())
        self._exceptions = [p for p in self.patterns if p.exception]

    def excludes(self, path: str) -> bool:
        """Whether the path is left out."""
        path = path.strip("/")
        if path in ("", "."):
            return False
        parts = path.split("/")
        ancestors = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        excluded = False
        for pattern in self.patterns:
            if pattern.exception != excluded:
                continue
            if any(pattern.regex.fullmatch(candidate) for candidate in ancestors):
                excluded = not pattern.exception
        return excluded

    def prunes(self, path: str | bytes) -> bool:
        """Whether the folder is left out and nothing in it can be taken back."""
        folder = os.fsdecode(path)
        if not self.excludes(folder):
            return False
        parts = folder.strip("/").split("/")
        return not any(_may_reach(pattern.parts, parts) for pattern in self._exceptions)


def _may_reach(pattern: Sequence[str], folder: Sequence[str]) -> bool:
    """Whether a pattern could match something beneath a folder."""
    for at, part in enumerate(folder):
        if at >= len(pattern) or "**" in pattern[at]:
            return True
        if not re.fullmatch(_translate(pattern[at]), part):
            return False
    return True


def _compiled(pattern: str) -> Pattern:
    exception = pattern.startswith("!")
    text = posixpath.normpath(pattern[1:] if exception else pattern).lstrip("/")
    try:
        return Pattern(text, exception, re.compile(_translate(text), re.DOTALL))
    except (re.error, ValueError) as bad:
        raise ContextError(f'syntax error in pattern "{pattern}"') from bad


def _translate(pattern: str) -> str:
    """A pattern as a regular expression for the whole path.

    Raises:
        ValueError: an unfinished character class or escape.
    """
    made: list[str] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if pattern.startswith("**", at):
            at += 2
            if pattern.startswith("/", at):
                at += 1
                made.append("(?:.*/)?")
            else:
                made.append(".*")
            continue
        at += 1
        if char == "*":
            made.append("[^/]*")
        elif char == "?":
            made.append("[^/]")
        elif char == "\\":
            if at >= len(pattern):
                raise ValueError("escape at the end")
            made.append(re.escape(pattern[at]))
            at += 1
        elif char == "[":
            text, at = _character_class(pattern, at)
            made.append(text)
        else:
            made.append(re.escape(char))
    return "".join(made)


def _character_class(pattern: str, at: int) -> tuple[str, int]:
    end = at
    negated = pattern[end : end + 1] == "^"
    end += negated
    made = ""
    while end < len(pattern) and (pattern[end] != "]" or not made):
        char = pattern[end]
        if char == "\\":
            end += 1
            if end >= len(pattern):
                raise ValueError("escape at the end")
            made += re.escape(pattern[end])
        elif char == "-" and made:
            made += "-"
        else:
            made += re.escape(char)
        end += 1
    if end >= len(pattern):
        raise ValueError("unfinished class")
    return f"[{'^' if negated else ''}{made}]", end + 1


def component_regex(pattern: str) -> re.Pattern[str]:
    """A COPY wildcard component (no slash): ``*``, ``?``, ``[…]`` and escapes.

    Raises:
        ContextError: it is not well formed.
    """
    try:
        return re.compile(_translate(pattern.replace("**", "*")), re.DOTALL)
    except (re.error, ValueError) as bad:
        raise ContextError(f'syntax error in pattern "{pattern}"') from bad

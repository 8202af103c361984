"""From the text of a Dockerfile to its statements.

The splitting into lines, words, flags and heredocs is left to the reference parser (the
``dockerfile`` package); what it leaves out is added here: the place of an error, whether
a heredoc is quoted or strips tabs, the text of ONBUILD triggers, and the directives.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import dockerfile  # type: ignore[import-not-found,import-untyped,unused-ignore]

from lazarette.runtime.builds.errors import DockerfileError, Location

MAX_SIZE: Final = 4 * 1024 * 1024
_DIRECTIVE = re.compile(r"^#\s*([a-zA-Z][a-zA-Z0-9]*)\s*=\s*(.+?)\s*$")
_HEREDOC = re.compile(r"(\d*)<<(-?)\s*([^<\s]+)")
_DIRECTIVES = frozenset({"syntax", "escape", "check"})
_LOCATED_LINES = 4000


class _ParsedHeredoc(Protocol):
    name: str
    file_descriptor: int
    content: str


class _Parsed(Protocol):
    """An instruction as the reference parser gives it."""

    cmd: str
    json: bool
    original: str
    start_line: int
    end_line: int
    flags: tuple[str, ...]
    value: tuple[str, ...]
    heredocs: tuple[_ParsedHeredoc, ...]


_split: Callable[[str], tuple[_Parsed, ...]] = dockerfile.parse_string
_SplitError: type[Exception] = dockerfile.GoParseError


@dataclass(frozen=True, slots=True)
class Heredoc:
    """A here-document of a statement.

    Attributes:
        name: its delimiter, which is also the name of the file COPY makes of it.
        content: its text, leading tabs already removed for ``<<-``.
        expand: whether the builder substitutes variables (the delimiter is not quoted).
        descriptor: the number before ``<<``, or 0.
        token: the word as it stands in the file, e.g. ``<<-"EOF"``.
        strip_tabs: whether it was written ``<<-``.
    """

    name: str
    content: str
    expand: bool
    descriptor: int
    token: str
    strip_tabs: bool


@dataclass(frozen=True, slots=True)
class Statement:
    """One instruction as it stands in the file.

    Attributes:
        word: its name in upper case.
        words: its arguments as the reference parser splits them.
        flags: its ``--flags``, quotes removed.
        json: whether the arguments came as a JSON array.
        heredocs: here-documents in order.
        rest: everything after the instruction's word, continuation lines joined.
        trigger: for ONBUILD, the text of what is to be done later.
        where: its place.
    """

    word: str
    words: tuple[str, ...]
    flags: tuple[str, ...]
    json: bool
    heredocs: tuple[Heredoc, ...]
    rest: str
    trigger: str
    where: Location


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """A file's statements and its directives.

    Attributes:
        statements: in order.
        escape: the escape character, a backslash or a backtick.
        syntax: the frontend asked for; shown, never fetched.
        check: the lint settings; shown, never applied.
    """

    statements: tuple[Statement, ...]
    escape: str
    syntax: str
    check: str


def decode(raw: bytes, file: str = "Dockerfile") -> str:
    """The file's text, without a byte order mark.

    Raises:
        DockerfileError: it is too long or not UTF-8.
    """
    if len(raw) > MAX_SIZE:
        raise DockerfileError(f"{file} is larger than {MAX_SIZE} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        line = raw[: bad.start].count(b"\n") + 1
        shown = raw.split(b"\n")[line - 1].decode(errors="backslashreplace")
        raise DockerfileError("the line is not UTF-8", Location(file, line, shown)) from bad


def directives(text: str) -> dict[str, str]:
    """The parser directives at the very top, names in lower case.

    They end at the first line that is none: an empty one, a comment, an instruction or an
    unknown directive.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines()):
        if number == 0 and line.startswith("#!"):
            continue
        match = _DIRECTIVE.match(line.strip())
        if match is None or match[1].lower() not in _DIRECTIVES:
            break
        found[match[1].lower()] = match[2]
    return found


def parse(text: str, file: str = "Dockerfile") -> Dockerfile:
    """Split a Dockerfile into its statements.

    Args:
        text: what :func:`decode` gave.
        file: its name, for messages.

    Raises:
        DockerfileError: with the line that is wrong.
    """
    text = text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
    top = directives(text)
    try:
        commands = _split(text)
    except _SplitError as bad:
        message = str(bad)
        if message == "file with no instructions":
            raise DockerfileError(f"{file}: {message}") from bad
        in_comment = "escape token" in message or "parser directive" in message
        raise DockerfileError(message, _place_of_error(text, file, in_comment)) from bad
    lines = text.splitlines()
    statements = tuple(_statement(command, lines, file) for command in commands)
    return Dockerfile(
        statements, top.get("escape", "\\"), top.get("syntax", ""), top.get("check", "")
    )


def _statement(command: _Parsed, lines: list[str], file: str) -> Statement:
    source = "\n".join(lines[command.start_line - 1 : command.end_line])
    where = Location(file, command.start_line, source)
    original = command.original.strip()
    pieces = original.split(None, 1)
    rest = pieces[1] if len(pieces) > 1 else ""
    trigger = _trigger(rest, source) if command.cmd.upper() == "ONBUILD" else ""
    return Statement(
        word=command.cmd.upper(),
        words=tuple(command.value),
        flags=tuple(command.flags),
        json=bool(command.json),
        heredocs=_heredocs(command),
        rest=rest,
        trigger=trigger,
        where=where,
    )


def _trigger(rest: str, source: str) -> str:
    """An ONBUILD's instruction; the reference parser leaves the bodies of heredocs out."""
    body = source.split("\n", 1)
    if _HEREDOC.search(rest) and len(body) > 1 and not body[0].rstrip().endswith(("\\", "`")):
        return f"{rest}\n{body[1]}\n"
    return rest


def _heredocs(command: _Parsed) -> tuple[Heredoc, ...]:
    tokens = _HEREDOC.finditer(command.original.split("\n", 1)[0])
    found: list[Heredoc] = []
    pending = list(tokens)
    for heredoc in command.heredocs:
        token = next((m for m in pending if _unquoted(m[3]) == heredoc.name), None)
        if token is None:
            token_text, strip, quoted = f"<<{heredoc.name}", False, False
        else:
            pending = pending[pending.index(token) + 1 :]
            token_text, strip = token[0], token[2] == "-"
            quoted = any(mark in token[3] for mark in "\"'\\")
        content = heredoc.content
        if strip:
            content = re.sub(r"(?m)^\t+", "", content)
        found.append(
            Heredoc(heredoc.name, content, not quoted, heredoc.file_descriptor, token_text, strip)
        )
    return tuple(found)


def _unquoted(word: str) -> str:
    return re.sub(r"[\"'\\]", "", word)


def _place_of_error(text: str, file: str, in_comment: bool) -> Location | None:
    """The line of the first error: the one after the longest beginning without any."""
    lines = text.splitlines()
    if len(lines) > _LOCATED_LINES:
        return None
    for good in range(len(lines) - 1, -1, -1):
        try:
            commands = _split("\n".join(lines[:good]) + "\n")
        except _SplitError as bad:
            if str(bad) != "file with no instructions":
                continue
            commands = ()
        at = good
        if commands and commands[-1].end_line == good and _continues(lines[good - 1]):
            at = commands[-1].start_line - 1
        while at < len(lines) - 1 and not in_comment and _says_nothing(lines[at]):
            at += 1
        return Location(file, at + 1, lines[at])
    return Location(file, 1, lines[0] if lines else "")


def _says_nothing(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def _continues(line: str) -> bool:
    return line.rstrip().endswith(("\\", "`"))

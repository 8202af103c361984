"""The instructions of a Dockerfile as typed values.

Variables are not yet substituted here, since their values depend on what runs before;
what can be judged without them (flags, counts of arguments, forms) is judged.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from lazarette.runtime.builds.devices import parse_device
from lazarette.runtime.builds.durations import parse_duration
from lazarette.runtime.builds.errors import DockerfileError, Location
from lazarette.runtime.builds.expansion import Expander
from lazarette.runtime.builds.flags import Flags, Kind
from lazarette.runtime.builds.mounts import parse_mount
from lazarette.runtime.builds.parser import Heredoc, Statement

STAGE_NAME = re.compile(r"[a-z][a-z0-9-_.]*")
MINIMUM_INTERVAL = 1_000_000


@dataclass(frozen=True, slots=True)
class Instruction:
    """What all have: their place and their text as shown in ``Step n/m``."""

    where: Location
    text: str


@dataclass(frozen=True, slots=True)
class From(Instruction):
    """``FROM base [AS name]``."""

    base: str
    name: str
    platform: str


@dataclass(frozen=True, slots=True)
class Arg(Instruction):
    """``ARG name[=default] …``; a default of None means there is none."""

    names: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True, slots=True)
class Pairs(Instruction):
    """``ENV`` and ``LABEL``."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Env(Pairs):
    """``ENV key=value …``."""


@dataclass(frozen=True, slots=True)
class Label(Pairs):
    """``LABEL key=value …``."""


@dataclass(frozen=True, slots=True)
class Command(Instruction):
    """A command in its shell form (one string) or exec form (a list).

    Attributes:
        words: the arguments, or the whole line as one word in the shell form.
        shell: whether it is the shell form.
    """

    words: tuple[str, ...]
    shell: bool


@dataclass(frozen=True, slots=True)
class Cmd(Command):
    """``CMD``."""


@dataclass(frozen=True, slots=True)
class Entrypoint(Command):
    """``ENTRYPOINT``."""


@dataclass(frozen=True, slots=True)
class Run(Command):
    """``RUN``, with the heredocs that belong to its script."""

    mounts: tuple[str, ...]
    network: str
    security: str
    heredocs: tuple[Heredoc, ...]
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Transfer(Instruction):
    """``COPY`` and ``ADD``.

    Attributes:
        sources: paths, patterns, URLs; not those that are heredocs.
        target: destination.
        heredocs: files written out in the Dockerfile.
        add: whether it is ADD.
        origin: ``--from``.
    """

    sources: tuple[str, ...]
    target: str
    heredocs: tuple[Heredoc, ...]
    add: bool
    origin: str
    chown: str
    chmod: str
    link: bool
    parents: bool
    exclude: tuple[str, ...]
    checksum: str
    keep_git_dir: bool
    unpack: bool | None


@dataclass(frozen=True, slots=True)
class Words(Instruction):
    """``EXPOSE`` and ``VOLUME``."""

    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Expose(Words):
    """``EXPOSE port[/protocol] …``."""


@dataclass(frozen=True, slots=True)
class Volume(Words):
    """``VOLUME path …``."""


@dataclass(frozen=True, slots=True)
class Value(Instruction):
    """Instructions of one value."""

    value: str


@dataclass(frozen=True, slots=True)
class Maintainer(Value):
    """``MAINTAINER name``."""


@dataclass(frozen=True, slots=True)
class User(Value):
    """``USER user[:group]``."""


@dataclass(frozen=True, slots=True)
class Workdir(Value):
    """``WORKDIR path``."""


@dataclass(frozen=True, slots=True)
class StopSignal(Value):
    """``STOPSIGNAL name-or-number``."""


@dataclass(frozen=True, slots=True)
class OnBuild(Value):
    """``ONBUILD instruction``: the instruction's text, kept as it is."""


@dataclass(frozen=True, slots=True)
class Shell(Instruction):
    """``SHELL ["program", "argument"]``."""

    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Healthcheck(Instruction):
    """``HEALTHCHECK``: times in nanoseconds, 0 for the default; ``test`` as in the config."""

    test: tuple[str, ...]
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0


_T = Kind.TEXT
_TS = Kind.TEXTS
_B = Kind.BOOL
FLAGS: dict[str, dict[str, Kind]] = {
    "FROM": {"platform": _T},
    "RUN": {"mount": _TS, "network": _T, "security": _T, "device": _TS},
    "COPY": {
        "from": _T,
        "chown": _T,
        "chmod": _T,
        "link": _B,
        "parents": _B,
        "exclude": _TS,
    },
    "ADD": {
        "chown": _T,
        "chmod": _T,
        "link": _B,
        "exclude": _TS,
        "checksum": _T,
        "keep-git-dir": _B,
        "unpack": _B,
    },
    "HEALTHCHECK": {
        "interval": _T,
        "timeout": _T,
        "start-period": _T,
        "start-interval": _T,
        "retries": _T,
    },
}


def instruction(statement: Statement) -> Instruction:
    """The typed instruction of a statement.

    Raises:
        DockerfileError: with the statement's place.
    """
    reader = _READERS.get(statement.word)
    try:
        if reader is None:
            raise DockerfileError(_unknown(statement.word))
        flags = Flags(statement.word, statement.flags, FLAGS.get(statement.word, {}))
        return reader(statement, flags)
    except DockerfileError as bad:
        raise bad.at(statement.where) from bad


def _unknown(word: str) -> str:
    near = difflib.get_close_matches(word, _READERS, 1)
    return f"unknown instruction: {word}" + (f" (did you mean {near[0]}?)" if near else "")


def shown(statement: Statement) -> str:
    """A statement as ``Step n/m`` shows it: its word in upper case and its arguments."""
    return f"{statement.word} {statement.rest}".rstrip()


def _exactly(statement: Statement, count: int) -> None:
    if len(statement.words) != count:
        number = "one argument" if count == 1 else f"{count} arguments"
        raise DockerfileError(f"{statement.word} requires exactly {number}")


def _at_least(statement: Statement, count: int) -> None:
    if len(statement.words) < count or statement.words == ("",):
        number = "one argument" if count == 1 else f"{count} arguments"
        raise DockerfileError(f"{statement.word} requires at least {number}")


def _from(statement: Statement, flags: Flags) -> From:
    words = statement.words
    if len(words) not in (1, 3) or (len(words) == 3 and words[1].lower() != "as"):
        raise DockerfileError("FROM requires either one or three arguments")
    name = words[2].lower() if len(words) == 3 else ""
    if len(words) == 3 and not STAGE_NAME.fullmatch(name):
        raise DockerfileError(
            f'invalid name for build stage: "{words[2]}", name can\'t start with a number'
            " or contain symbols"
        )
    return From(statement.where, shown(statement), words[0], name, flags.text("platform"))


def _arg(statement: Statement, _flags: Flags) -> Arg:
    _at_least(statement, 1)
    found: list[tuple[str, str | None]] = []
    for word in statement.words:
        name, equals, default = word.partition("=")
        if not name:
            raise DockerfileError("ARG names can not be blank")
        found.append((name, default if equals else None))
    return Arg(statement.where, shown(statement), tuple(found))


def _pairs(statement: Statement) -> tuple[tuple[str, str], ...]:
    words = statement.words
    if not words:
        raise DockerfileError(f"{statement.word} requires at least one argument")
    if len(words) % 2:
        raise DockerfileError(f"{statement.word} must have two arguments")
    pairs = tuple(zip(words[::2], words[1::2], strict=True))
    if any(not name for name, _ in pairs):
        raise DockerfileError(f"{statement.word} names can not be blank")
    return pairs


def _env(statement: Statement, _flags: Flags) -> Env:
    return Env(statement.where, shown(statement), _pairs(statement))


def _label(statement: Statement, _flags: Flags) -> Label:
    return Label(statement.where, shown(statement), _pairs(statement))


def _cmd(statement: Statement, _flags: Flags) -> Cmd:
    return Cmd(statement.where, shown(statement), statement.words, not statement.json)


def _entrypoint(statement: Statement, _flags: Flags) -> Entrypoint:
    return Entrypoint(statement.where, shown(statement), statement.words, not statement.json)


def _run(statement: Statement, flags: Flags) -> Run:
    if not statement.words:
        raise DockerfileError("RUN requires at least one argument")
    nothing = Expander({})
    for mount in flags.texts("mount"):
        if "$" not in mount:
            parse_mount(mount, nothing)
    network = flags.text("network") or "default"
    if network not in ("default", "none", "host"):
        raise DockerfileError(f'invalid network mode: "{network}"')
    security = flags.text("security") or "sandbox"
    if security not in ("sandbox", "insecure"):
        raise DockerfileError(f'security "{security}" is not valid')
    devices = flags.texts("device")
    for text in devices:
        parse_device(text)
    return Run(
        statement.where,
        shown(statement),
        statement.words,
        not statement.json,
        flags.texts("mount"),
        network,
        security,
        statement.heredocs,
        devices,
    )


def _transfer(statement: Statement, flags: Flags) -> Transfer:
    if len(statement.words) < 2:
        raise DockerfileError(
            f"{statement.word} requires at least two arguments, but only"
            f" {len(statement.words)} were provided. Destination could not be determined"
        )
    tokens = {heredoc.token.replace(" ", "") for heredoc in statement.heredocs}
    *sources, target = statement.words
    if not statement.json and target in tokens:
        raise DockerfileError(f"{statement.word} cannot accept a heredoc as a destination")
    add = statement.word == "ADD"
    if not add and any(re.match(r"https?://", source) for source in sources):
        raise DockerfileError("source can't be a URL for COPY")
    return Transfer(
        statement.where,
        shown(statement),
        tuple(word for word in sources if statement.json or word not in tokens),
        target,
        statement.heredocs,
        add,
        "" if add else flags.text("from"),
        flags.text("chown"),
        flags.text("chmod"),
        flags.flag("link"),
        False if add else flags.flag("parents"),
        flags.texts("exclude"),
        flags.text("checksum") if add else "",
        flags.flag("keep-git-dir") if add else False,
        flags.maybe("unpack") if add else None,
    )


def _expose(statement: Statement, _flags: Flags) -> Expose:
    _at_least(statement, 1)
    return Expose(statement.where, shown(statement), statement.words)


def _volume(statement: Statement, _flags: Flags) -> Volume:
    if not statement.words:
        raise DockerfileError("VOLUME requires at least one argument")
    if any(not word.strip() for word in statement.words):
        raise DockerfileError("VOLUME specified can not be an empty string")
    return Volume(statement.where, shown(statement), statement.words)


def _value(kind: type[Value]) -> Callable[[Statement, Flags], Value]:
    def read(statement: Statement, _flags: Flags) -> Value:
        _exactly(statement, 1)
        return kind(statement.where, shown(statement), statement.words[0])

    return read


def _workdir(statement: Statement, _flags: Flags) -> Workdir:
    _exactly(statement, 1)
    if not statement.words[0].strip():
        raise DockerfileError("WORKDIR requires exactly one argument")
    return Workdir(statement.where, shown(statement), statement.words[0])


def _onbuild(statement: Statement, _flags: Flags) -> OnBuild:
    text = statement.trigger.strip("\n")
    if not text.strip():
        raise DockerfileError("ONBUILD requires at least one argument")
    word = text.split(None, 1)[0].upper()
    if word == "ONBUILD":
        raise DockerfileError("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed")
    if word in ("FROM", "MAINTAINER"):
        raise DockerfileError(f"{word} isn't allowed as an ONBUILD trigger")
    if word not in _READERS:
        raise DockerfileError(_unknown(word))
    return OnBuild(statement.where, shown(statement), text)


def _shell(statement: Statement, _flags: Flags) -> Shell:
    if not statement.words:
        raise DockerfileError("SHELL requires at least one argument")
    if not statement.json:
        raise DockerfileError("SHELL requires the arguments to be in JSON form")
    return Shell(statement.where, shown(statement), statement.words)


def _healthcheck(statement: Statement, flags: Flags) -> Healthcheck:
    if not statement.words:
        raise DockerfileError("HEALTHCHECK requires at least one argument")
    kind, *rest = statement.words
    if kind.upper() == "NONE":
        if rest:
            raise DockerfileError("HEALTHCHECK NONE takes no arguments")
        if not flags.empty:
            raise DockerfileError("HEALTHCHECK NONE takes no flags")
        return Healthcheck(statement.where, shown(statement), ("NONE",))
    if kind.upper() != "CMD":
        raise DockerfileError(f'unknown type "{kind}" in HEALTHCHECK (try CMD)')
    if not rest or not "".join(rest).strip():
        raise DockerfileError("missing command after HEALTHCHECK CMD")
    test = ("CMD", *rest) if statement.json else ("CMD-SHELL", rest[0])
    retries = flags.text("retries")
    try:
        count = int(retries or "0")
    except ValueError as bad:
        raise DockerfileError(f"--retries is not a number: {retries}") from bad
    if count < 0:
        raise DockerfileError(f"--retries cannot be negative ({count})")
    return Healthcheck(
        statement.where,
        shown(statement),
        test,
        _health_time(flags, "interval"),
        _health_time(flags, "timeout"),
        _health_time(flags, "start-period"),
        _health_time(flags, "start-interval"),
        count,
    )


def _health_time(flags: Flags, name: str) -> int:
    text = flags.text(name)
    if not text:
        return 0
    try:
        value = parse_duration(text)
    except ValueError as bad:
        raise DockerfileError(f"invalid value for --{name}: {bad}") from bad
    if value < 0 or 0 < value < MINIMUM_INTERVAL:
        raise DockerfileError(f'Interval "{name}" cannot be less than 1ms')
    return value


_READERS: dict[str, Callable[[Statement, Flags], Instruction]] = {
    "FROM": _from,
    "ARG": _arg,
    "ENV": _env,
    "LABEL": _label,
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "RUN": _run,
    "COPY": _transfer,
    "ADD": _transfer,
    "EXPOSE": _expose,
    "VOLUME": _volume,
    "MAINTAINER": _value(Maintainer),
    "USER": _value(User),
    "WORKDIR": _workdir,
    "STOPSIGNAL": _value(StopSignal),
    "ONBUILD": _onbuild,
    "SHELL": _shell,
    "HEALTHCHECK": _healthcheck,
}
INSTRUCTIONS = tuple(sorted(_READERS))

"""The ``changes`` of commit and import: Dockerfile instructions that only touch the config.

Allowed as in the Engine: CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, USER,
VOLUME, WORKDIR, STOPSIGNAL and SHELL.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence

import msgspec

from lazarette.fuse import jsontext
from lazarette.runtime.images.model import Healthcheck, RunConfig
from lazarette.storage.errors import InvalidArgument

_WORD = re.compile(r"""(?:[^\s"'\\]|\\.|"(?:[^"\\]|\\.)*"|'[^']*')+""")
_QUOTING = re.compile(r"""\\(.)|"((?:[^"\\]|\\.)*)"|'([^']*)'""")
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?", re.IGNORECASE)
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9}
_UNITS["h"] = 3600 * 10**9
_DEFAULT_SHELL = ("/bin/sh", "-c")


def apply_changes(config: RunConfig, changes: Sequence[str]) -> RunConfig:
    """A configuration with instructions applied; the one given is not touched.

    Raises:
        InvalidArgument: an instruction is unknown, not allowed here or malformed.
    """
    made = msgspec.convert(msgspec.to_builtins(config), RunConfig)
    for change in changes:
        for line in filter(None, map(str.strip, change.splitlines())):
            keyword, _, rest = line.partition(" ")
            apply = _INSTRUCTIONS.get(keyword.upper())
            if apply is None:
                raise InvalidArgument(f"{keyword} is not a valid change command")
            if not rest.strip():
                raise InvalidArgument(f"{keyword.upper()} requires at least one argument")
            apply(made, rest.strip())
    return made


def exec_form(text: str) -> list[str] | None:
    """``["a", "b"]`` as a list; None where the text is not of that form."""
    if not text.startswith("["):
        return None
    try:
        return jsontext.decode(text, type=list[str])
    except msgspec.MsgspecError:
        return None


def duration_ns(text: str) -> int:
    """A Go duration such as ``1m30s``, in nanoseconds.

    Raises:
        InvalidArgument: it is none.
    """
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise InvalidArgument(f'time: invalid duration "{text}"')
    return sum(round(float(number) * _UNITS[unit]) for number, unit in parts)


def words(text: str) -> list[str]:
    """Split at blanks; quotes and backslashes protect them and are taken off."""
    return [_QUOTING.sub(_unquoted, match.group()) for match in _WORD.finditer(text)]


def _unquoted(match: re.Match[str]) -> str:
    if match[1] is not None:
        return match[1]
    return re.sub(r'\\(["\\$])', r"\1", match[2]) if match[2] is not None else match[3]


def _pairs(text: str, keyword: str) -> list[tuple[str, str]]:
    found = words(text)
    if "=" not in found[0]:
        key, _, value = text.partition(" ")
        if not value.strip():
            raise InvalidArgument(f"{keyword} must have two arguments")
        return [(key, value.strip())]
    pairs = []
    for word in found:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise InvalidArgument(
                f"Syntax error - can't find = in {word!r}. Must be of the form: name=value"
            )
        pairs.append((key, value))
    return pairs


def _command(config: RunConfig, text: str) -> list[str]:
    parsed = exec_form(text)
    return parsed if parsed is not None else [*(config.shell or _DEFAULT_SHELL), text]


def _cmd(config: RunConfig, text: str) -> None:
    config.cmd = _command(config, text)


def _entrypoint(config: RunConfig, text: str) -> None:
    config.entrypoint = _command(config, text)
    config.cmd = None


def _env(config: RunConfig, text: str) -> None:
    env = list(config.env or [])
    for key, value in _pairs(text, "ENV"):
        entry = f"{key}={value}"
        at = next((i for i, old in enumerate(env) if old.partition("=")[0] == key), None)
        if at is None:
            env.append(entry)
        else:
            env[at] = entry
    config.env = env


def _expose(config: RunConfig, text: str) -> None:
    ports = dict(config.exposed_ports or {})
    for word in words(text):
        match = _PORT.fullmatch(word)
        if match is None:
            raise InvalidArgument(f"invalid containerPort: {word}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 < first <= last <= 65535:
            raise InvalidArgument(f"invalid containerPort: {word}")
        for port in range(first, last + 1):
            ports[f"{port}/{(match[3] or 'tcp').lower()}"] = {}
    config.exposed_ports = ports


def _healthcheck(config: RunConfig, text: str) -> None:
    check = Healthcheck()
    while text.startswith("--"):
        option, _, text = text.partition(" ")
        text = text.strip()
        name, _, value = option[2:].partition("=")
        if name == "retries" and value.isdecimal():
            check.retries = int(value)
        elif name in ("interval", "timeout", "start-period", "start-interval"):
            setattr(check, name.replace("-", "_"), duration_ns(value))
        else:
            raise InvalidArgument(f"invalid HEALTHCHECK option: {option}")
    kind, _, command = text.partition(" ")
    if kind.upper() == "NONE":
        check.test = ["NONE"]
    elif kind.upper() == "CMD" and command.strip():
        parsed = exec_form(command.strip())
        check.test = ["CMD", *parsed] if parsed else ["CMD-SHELL", command.strip()]
    else:
        raise InvalidArgument(f'Unknown type "{kind}" in HEALTHCHECK (try CMD)')
    config.healthcheck = check


def _label(config: RunConfig, text: str) -> None:
    config.labels = dict(config.labels or {}) | dict(_pairs(text, "LABEL"))


def _onbuild(config: RunConfig, text: str) -> None:
    if text.split()[0].upper() in ("ONBUILD", "FROM", "MAINTAINER"):
        raise InvalidArgument(f"{text.split()[0].upper()} isn't allowed as an ONBUILD trigger")
    config.on_build = [*(config.on_build or []), text]


def _user(config: RunConfig, text: str) -> None:
    config.user = text


def _volume(config: RunConfig, text: str) -> None:
    paths = exec_form(text) or words(text)
    config.volumes = dict(config.volumes or {}) | {path: {} for path in paths}


def _workdir(config: RunConfig, text: str) -> None:
    path = posixpath.normpath(posixpath.join(config.working_dir or "/", text))
    config.working_dir = "/" + path.lstrip("/")


def _stopsignal(config: RunConfig, text: str) -> None:
    config.stop_signal = text


def _shell(config: RunConfig, text: str) -> None:
    parsed = exec_form(text)
    if not parsed:
        raise InvalidArgument("SHELL requires the arguments to be in JSON form")
    config.shell = parsed


_INSTRUCTIONS: dict[str, Callable[[RunConfig, str], None]] = {
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "ONBUILD": _onbuild,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _workdir,
    "STOPSIGNAL": _stopsignal,
    "SHELL": _shell,
}

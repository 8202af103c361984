"""``RUN --mount=…``: the five kinds of mounts that exist during one step."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace
from enum import Enum

from lazarette.runtime.builds.errors import DockerfileError
from lazarette.runtime.builds.expansion import Expander


class MountKind(Enum):
    """What is mounted."""

    BIND = "bind"
    CACHE = "cache"
    TMPFS = "tmpfs"
    SECRET = "secret"
    SSH = "ssh"


class Sharing(Enum):
    """How steps that run at once use a cache mount."""

    SHARED = "shared"
    PRIVATE = "private"
    LOCKED = "locked"


@dataclass(frozen=True, slots=True)
class StepMount:
    """One ``--mount``.

    Attributes:
        kind: what is mounted.
        target: where; may be relative to WORKDIR, empty for the kind's default.
        source: path within ``origin`` (bind, cache).
        origin: stage, image or context; empty means the build context (bind) or nothing.
        writable: whether the step may write (a bind's writes are thrown away).
        id: name of the cache, secret or agent.
        sharing: how a cache is shared.
        size: limit of a tmpfs in bytes; 0 for none.
        mode: permission bits of a cache folder, secret file or socket; None for the default.
        uid: its owner.
        gid: its group.
        required: whether a missing secret or agent is an error.
        env: variable that carries the secret instead of a file.
    """

    kind: MountKind = MountKind.BIND
    target: str = ""
    source: str = ""
    origin: str = ""
    writable: bool = False
    id: str = ""
    sharing: Sharing = Sharing.SHARED
    size: int = 0
    mode: int | None = None
    uid: int = 0
    gid: int = 0
    required: bool = False
    env: str = ""

    def key(self) -> str:
        """What of it belongs to a step's cache key (a secret's content does not)."""
        return (
            f"{self.kind.value}:{self.target}:{self.source}:{self.origin}:{self.writable}:"
            f"{self.id}:{self.env}:{self.mode}:{self.uid}:{self.gid}"
        )


_BOOLS = {"true": True, "1": True, "false": False, "0": False, "": True}
_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_ALLOWED = {
    MountKind.BIND: {"source", "from", "rw", "ro"},
    MountKind.CACHE: {"source", "from", "rw", "ro", "id", "sharing", "mode", "uid", "gid"},
    MountKind.TMPFS: {"size"},
    MountKind.SECRET: {"id", "source", "required", "mode", "uid", "gid", "env"},
    MountKind.SSH: {"id", "required", "mode", "uid", "gid"},
}
_ALIASES = {
    "src": "source",
    "dst": "target",
    "destination": "target",
    "readonly": "ro",
    "readwrite": "rw",
}


def parse_size(text: str) -> int:
    """``64m`` in bytes.

    Raises:
        DockerfileError: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise DockerfileError(f"invalid value for size: {text}")
    return int(match[1]) << (10 * " kmgt".index(match[2].lower() or " "))


def parse_mount(text: str, expander: Expander) -> StepMount:
    """The value of one ``--mount``.

    Args:
        text: comma separated ``key=value`` pairs.
        expander: for the keys in which variables are allowed.

    Raises:
        DockerfileError: unknown kind, key or value.
    """
    fields = _fields(text)
    name = fields.pop("type", "bind").lower()
    try:
        kind = MountKind(name)
    except ValueError as bad:
        raise DockerfileError(f'unsupported mount type "{name}"') from bad
    target = expander.word(fields.pop("target", ""))
    for key in fields:
        if key not in _ALLOWED[kind]:
            raise DockerfileError(f"unexpected key '{key}' for mount type '{name}'")
    mount = StepMount(kind=kind, target=target, writable=kind is MountKind.CACHE)
    for key, value in fields.items():
        mount = _with(mount, key, value, expander)
    return _checked(mount)


def _fields(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for field in next(csv.reader([text]), []):
        key, equals, value = field.partition("=")
        key = _ALIASES.get(key.strip().lower(), key.strip().lower())
        if not equals and key not in ("ro", "rw", "required"):
            raise DockerfileError(f"invalid field '{field}' must be a key=value pair")
        if key in ("ro", "rw", "required") and value.lower() not in _BOOLS:
            raise DockerfileError(f"invalid value for {key}: {value}")
        found[key] = value
    return found


def _with(mount: StepMount, key: str, value: str, expander: Expander) -> StepMount:
    if key in ("ro", "rw"):
        on = _BOOLS[value.lower()]
        return replace(mount, writable=on if key == "rw" else not on)
    if key == "required":
        return replace(mount, required=_BOOLS[value.lower()])
    if key == "size":
        return replace(mount, size=parse_size(value))
    if key == "sharing":
        try:
            return replace(mount, sharing=Sharing(value.lower()))
        except ValueError as bad:
            raise DockerfileError(f'unsupported sharing value "{value}"') from bad
    if key in ("mode", "uid", "gid"):
        try:
            number = int(expander.word(value), 8 if key == "mode" else 10)
        except ValueError as bad:
            raise DockerfileError(f"invalid value {value} for {key}") from bad
        if key == "mode":
            return replace(mount, mode=number)
        return replace(mount, uid=number) if key == "uid" else replace(mount, gid=number)
    word = expander.word(value)
    if key == "source":
        return replace(mount, source=word)
    if key == "from":
        return replace(mount, origin=word)
    return replace(mount, id=word) if key == "id" else replace(mount, env=word)


def _checked(mount: StepMount) -> StepMount:
    kind = mount.kind
    if kind in (MountKind.BIND, MountKind.CACHE, MountKind.TMPFS) and not mount.target:
        raise DockerfileError("target is required")
    if kind is MountKind.CACHE:
        return replace(mount, id=mount.id or mount.target)
    if kind is MountKind.SECRET:
        name = mount.id or mount.source.rsplit("/", 1)[-1] or mount.target.rsplit("/", 1)[-1]
        if not name:
            raise DockerfileError("one of source, target, id required")
        target = mount.target or ("" if mount.env else f"/run/secrets/{name}")
        return replace(mount, id=name, target=target)
    if kind is MountKind.SSH:
        return replace(mount, id=mount.id or "default")
    return mount

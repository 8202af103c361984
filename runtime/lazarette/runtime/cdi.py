"""Devices as their vendors describe them: the Container Device Interface, version 1.1.

A vendor leaves files in ``/etc/cdi`` or ``/var/run/cdi``; each names a kind
(``vendor.com/class``), its devices, and what a container needs for one of them: nodes,
variables, mounts, hooks, groups.
https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import msgspec

from lazarette.fuse import jsontext
from lazarette.storage.errors import InvalidArgument, NotFound

FOLDERS: Final = (Path("/etc/cdi"), Path("/var/run/cdi"))
_HOOKS: Final = (
    "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop",
)  # fmt: skip


class Node(msgspec.Struct, rename="camel", frozen=True):
    """A device node; what is not said is taken from the host's own."""

    path: str
    host_path: str = ""
    type: str = ""
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    permissions: str = "rwm"
    uid: int | None = None
    gid: int | None = None


class Mount(msgspec.Struct, rename="camel", frozen=True):
    """Something of the host's that is mounted."""

    host_path: str
    container_path: str
    options: tuple[str, ...] = ()
    type: str = "bind"


class Hook(msgspec.Struct, rename="camel", frozen=True, omit_defaults=True):
    """A program the OCI runtime runs at a moment of the container's life."""

    hook_name: str
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: int | None = None


class Edits(msgspec.Struct, rename="camel", frozen=True):
    """What a container needs."""

    env: tuple[str, ...] = ()
    device_nodes: tuple[Node, ...] = ()
    hooks: tuple[Hook, ...] = ()
    mounts: tuple[Mount, ...] = ()
    additional_gids: tuple[int, ...] = ()

    def __add__(self, other: Edits) -> Edits:
        """Both."""
        return Edits(
            self.env + other.env,
            self.device_nodes + other.device_nodes,
            self.hooks + other.hooks,
            self.mounts + other.mounts,
            self.additional_gids + other.additional_gids,
        )

    def apply(self, configuration: MutableMapping[str, object]) -> None:
        """Write them into an OCI runtime configuration."""
        process = cast(dict[str, object], configuration["process"])
        linux = cast(dict[str, object], configuration["linux"])
        resources = cast(dict[str, object], linux.setdefault("resources", {}))
        user = cast(dict[str, object], process["user"])
        _extend(process, "env", self.env)
        _extend(user, "additionalGids", self.additional_gids)
        nodes = [_found(node) for node in self.device_nodes]
        _extend(linux, "devices", [node for node, _ in nodes])
        _extend(resources, "devices", [rule for _, rule in nodes])
        _extend(configuration, "mounts", [_bind(mount) for mount in self.mounts])
        if self.hooks:
            hooks = cast(dict[str, object], configuration.setdefault("hooks", {}))
            for hook in self.hooks:
                made = msgspec.to_builtins(hook)
                _extend(hooks, cast(str, made.pop("hookName")), [made])


class _Device(msgspec.Struct, rename="camel"):
    name: str
    container_edits: Edits = Edits()


class _Spec(msgspec.Struct, rename="camel"):
    cdi_version: str
    kind: str
    devices: list[_Device] = []
    container_edits: Edits = Edits()


@dataclass(frozen=True)
class DeviceName:
    """``vendor.com/class=name``; without ``=name`` the kind's first device."""

    kind: str
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> DeviceName:
        """Read one.

        Raises:
            InvalidArgument: it is no such name.
        """
        kind, _, name = text.partition("=")
        vendor, _, group = kind.partition("/")
        if not vendor or not group or "/" in group:
            raise InvalidArgument(
                f"invalid device name {text}", hint="a device is named vendor.com/class=name"
            )
        return cls(kind, name)

    def __str__(self) -> str:
        return f"{self.kind}={self.name}" if self.name else self.kind


def find(wanted: Sequence[DeviceName], folders: Iterable[Path] = FOLDERS) -> Edits:
    """What a container needs for some devices.

    Raises:
        NotFound: a device that no file describes.
        InvalidArgument: a file that cannot be read, or a hook of no known moment.
    """
    specs = _specs(folders) if wanted else {}
    edits = Edits()
    general: set[str] = set()
    for device in wanted:
        spec = specs.get(device.kind)
        known = spec.devices if spec is not None else []
        chosen = next((one for one in known if device.name in ("", one.name)), None)
        if spec is None or chosen is None:
            raise NotFound(
                f"no such device: {device}",
                hint="its vendor describes it in a file in " + " or ".join(map(str, FOLDERS)),
            )
        if device.kind not in general:
            general.add(device.kind)
            edits += spec.container_edits
        edits += chosen.container_edits
    for hook in edits.hooks:
        if hook.hook_name not in _HOOKS:
            raise InvalidArgument(f"device hook {hook.hook_name} is not one of {', '.join(_HOOKS)}")
    return edits


def _specs(folders: Iterable[Path]) -> dict[str, _Spec]:
    """By kind; a later folder goes before an earlier one, as the specification has it."""
    found: dict[str, _Spec] = {}
    for folder in folders:
        here: dict[str, _Spec] = {}
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.suffix not in (".json", ".yaml", ".yml"):
                continue
            try:
                read = file.read_bytes()
                if file.suffix == ".json":
                    spec = jsontext.decode(read, type=_Spec)
                else:
                    spec = msgspec.yaml.decode(read, type=_Spec)
            except (OSError, msgspec.MsgspecError) as bad:
                raise InvalidArgument(f"device file {file} cannot be read: {bad}") from bad
            if before := here.get(spec.kind):
                spec.devices = before.devices + spec.devices
                spec.container_edits = before.container_edits + spec.container_edits
            here[spec.kind] = spec
        found |= here
    return found


def _extend(where: MutableMapping[str, object], key: str, more: Iterable[object]) -> None:
    added = list(more)
    if added:
        where[key] = [*cast(Sequence[object], where.get(key) or ()), *added]


def _found(node: Node) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """The entries of ``linux.devices`` and ``linux.resources.devices``."""
    kind, major, minor, mode = node.type, node.major, node.minor, node.file_mode
    if not kind or not (major or minor):
        try:
            status = os.stat(node.host_path or node.path)
        except OSError as missing:
            raise InvalidArgument(f"device node {node.host_path or node.path}: {missing}") from None
        kind = "b" if stat.S_ISBLK(status.st_mode) else "c"
        major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
        mode = stat.S_IMODE(status.st_mode) if mode is None else mode
    made: dict[str, object] = {"path": node.path, "type": kind, "major": major, "minor": minor}
    given = {"fileMode": mode, "uid": node.uid, "gid": node.gid}
    made |= {key: value for key, value in given.items() if value is not None}
    access = {"allow": True, "type": kind, "major": major, "minor": minor}
    return made, {**access, "access": node.permissions or "rwm"}


def _bind(mount: Mount) -> Mapping[str, object]:
    options = list(mount.options or ("rbind", "nosuid", "nodev", "ro"))
    if mount.type == "bind" and not {"bind", "rbind"} & set(options):
        options.append("bind")
    return {
        "destination": mount.container_path,
        "source": mount.host_path,
        "type": mount.type,
        "options": options,
    }

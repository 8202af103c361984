"""What a container asks to have mounted: ``-v``, ``--mount``, ``--tmpfs``, image volumes.

Everything becomes :class:`MountPoint` records; nothing is mounted or made here except
that the existence of a bind's source is looked at where the Engine does.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Mapping

import msgspec

from lazarette.runtime.containers.model import HostConfig, Mount
from lazarette.runtime.containers.record import Definition, MountPoint
from lazarette.storage.errors import InvalidArgument, NotFound
from lazarette.storage.volumes.names import check_name

_PROPAGATIONS = ("private", "rprivate", "shared", "rshared", "slave", "rslave")
_MODES = {"rw", "ro", "z", "Z", "nocopy", "consistent", "cached", "delegated", "default"}
_TYPES = ("bind", "volume", "tmpfs", "image", "npipe", "cluster")

Lookup = Callable[[str], Definition]


def collect(
    host: HostConfig,
    config_volumes: Iterable[str],
    lookup: Lookup,
    version: tuple[int, int] = (1, 50),
) -> list[MountPoint]:
    """All mounts of a container, later ones never hiding earlier ones.

    Args:
        host: the host part of the request.
        config_volumes: targets of anonymous volumes, of the request and its image.
        lookup: finds another container, for ``VolumesFrom``.
        version: API version; gates subpaths, image mounts and recursive read-only.

    Raises:
        InvalidArgument: a specification that cannot be, or two mounts of one target.
    """
    found: dict[str, MountPoint] = {}
    for spec in host.volumes_from or []:
        for point in _from_container(spec, lookup):
            found[point.destination] = point
    asked: dict[str, MountPoint] = {}
    for text in host.binds or []:
        _add_once(asked, parse_bind(text, host.volume_driver))
    mounts = [] if isinstance(host.mounts, msgspec.UnsetType) else host.mounts
    for mount in mounts:
        _add_once(asked, from_mount(mount, version, host.volume_driver))
    tmpfs = {} if isinstance(host.tmpfs, msgspec.UnsetType) else host.tmpfs
    for target, options in tmpfs.items():
        made = _tmpfs(target, [o for o in options.split(",") if o])
        asked[made.destination] = made
    found.update(asked)
    for target in config_volumes:
        clean = _target(target)
        if clean not in found:
            found[clean] = MountPoint(
                type="volume",
                destination=clean,
                driver=host.volume_driver,
                anonymous=True,
                copy=True,
            )
    return sorted(found.values(), key=lambda point: point.destination.count("/"))


def _add_once(found: dict[str, MountPoint], point: MountPoint) -> None:
    if point.destination in found:
        raise InvalidArgument(f"Duplicate mount point: {point.destination}")
    found[point.destination] = point


def _target(path: str) -> str:
    if not path.startswith("/"):
        raise InvalidArgument(f"invalid mount path: '{path}' mount path must be absolute")
    clean = posixpath.normpath(path).replace("//", "/")
    if clean == "/":
        raise InvalidArgument("invalid volume specification: destination can't be '/'")
    return clean


def _from_container(spec: str, lookup: Lookup) -> list[MountPoint]:
    reference, _, mode = spec.partition(":")
    if not reference:
        raise InvalidArgument(f"malformed volumes-from specification: {spec}")
    if any(word not in _MODES for word in mode.split(",") if word):
        raise InvalidArgument(f'invalid mode for volumes-from: "{mode}"')
    try:
        source = lookup(reference)
    except NotFound as missing:
        # Not a 404: the docker command line would take that for a missing image and pull.
        raise InvalidArgument(missing.message) from missing
    made = []
    for point in source.mounts:
        if point.type not in ("bind", "volume"):
            continue
        copy = msgspec.structs.replace(point, copy=False)
        if "ro" in mode.split(","):
            copy.rw = False
        made.append(copy)
    return made


def parse_bind(text: str, volume_driver: str = "") -> MountPoint:
    """``/host:/target``, ``name:/target`` or ``/target``, each with ``:options``.

    Raises:
        InvalidArgument: anything else.
    """
    parts = text.split(":")
    wrong = InvalidArgument(f"invalid volume specification: '{text}'")
    if len(parts) > 3 or not all(parts):
        raise wrong
    if len(parts) == 1:
        return MountPoint(
            type="volume",
            destination=_target(parts[0]),
            driver=volume_driver,
            anonymous=True,
            copy=True,
        )
    source, target = parts[0], parts[1]
    mode = parts[2] if len(parts) == 3 else ""
    words = [word for word in mode.split(",") if word]
    propagation = [word for word in words if word in _PROPAGATIONS]
    if any(word not in _MODES and word not in _PROPAGATIONS for word in words):
        raise InvalidArgument(f'invalid mode: "{mode}"')
    if len(propagation) > 1 or {"ro", "rw"} <= set(words):
        raise InvalidArgument(f'invalid mode: "{mode}"')
    if not target.startswith("/"):
        raise InvalidArgument(
            f"invalid volume specification: '{text}': invalid mount config for type "
            f'"{"bind" if source.startswith("/") else "volume"}": invalid mount path: '
            f"'{target}' mount path must be absolute"
        )
    rw = "ro" not in words
    if source.startswith("/"):
        if "nocopy" in words:
            raise InvalidArgument(f'invalid mode for bind mount: "{mode}"')
        return MountPoint(
            type="bind",
            source=posixpath.normpath(source),
            destination=_target(target),
            mode=mode,
            rw=rw,
            propagation=propagation[0] if propagation else "rprivate",
            create_source=True,
        )
    if propagation:
        raise InvalidArgument(f'invalid mode for volume: "{mode}"')
    check_name(source)
    return MountPoint(
        type="volume",
        name=source,
        destination=_target(target),
        driver=volume_driver,
        mode=mode or "z",
        rw=rw,
        copy="nocopy" not in words,
    )


def from_mount(mount: Mount, version: tuple[int, int], volume_driver: str = "") -> MountPoint:
    """An entry of ``HostConfig.Mounts``.

    Raises:
        InvalidArgument: options of another type, a missing or relative path, a bind whose
            source does not exist.
    """
    kind = mount.type
    if kind not in _TYPES:
        raise InvalidArgument(f'invalid mount config for type "{kind}": mount type unknown')

    def wrong(reason: str) -> InvalidArgument:
        return InvalidArgument(f'invalid mount config for type "{kind}": {reason}')

    if kind in ("npipe", "cluster") or (kind == "image" and version < (1, 48)):
        raise wrong("mount type is not supported here")
    if not mount.target:
        raise wrong("field Target must not be empty")
    if not mount.target.startswith("/"):
        raise wrong(f"invalid mount path: '{mount.target}' mount path must be absolute")
    own = {"bind": "bind_options", "volume": "volume_options"}
    own |= {"tmpfs": "tmpfs_options", "image": "image_options"}
    for other, attribute in own.items():
        if other != kind and getattr(mount, attribute) is not None:
            name = attribute.split("_")[0].capitalize()
            raise wrong(f"field {name}Options must not be specified")
    point = MountPoint(
        type=kind,
        destination=_target(mount.target),
        rw=not mount.read_only,
        from_mounts=True,
    )
    if kind == "bind":
        return _bind_mount(mount, point, wrong, version)
    if kind == "tmpfs":
        if mount.source:
            raise wrong("field Source must not be specified")
        return _tmpfs_mount(mount, point)
    if kind == "image":
        if not mount.source:
            raise wrong("field Source must not be empty")
        point.source, point.rw = mount.source, False
        point.subpath = mount.image_options.subpath if mount.image_options else ""
        return point
    options = mount.volume_options
    point.name, point.anonymous = mount.source, not mount.source
    if point.name:
        check_name(point.name)
    point.copy = not (options and options.no_copy)
    point.driver = (options.driver_config.name if options and options.driver_config else "") or (
        volume_driver
    )
    if options and options.subpath:
        if version < (1, 45):
            raise wrong("field Subpath needs API version 1.45")
        if point.anonymous:
            raise wrong("must not set Subpath when using anonymous volumes")
        check_subpath(options.subpath, wrong)
        point.subpath = options.subpath
    return point


def check_subpath(subpath: str, wrong: Callable[[str], InvalidArgument]) -> None:
    """Refuse a subpath that is absolute or climbs."""
    if subpath.startswith("/") or ".." in subpath.split("/"):
        raise wrong("subpath must be a relative path within the volume")


def _bind_mount(
    mount: Mount,
    point: MountPoint,
    wrong: Callable[[str], InvalidArgument],
    version: tuple[int, int],
) -> MountPoint:
    options = mount.bind_options
    if not mount.source:
        raise wrong("field Source must not be empty")
    if not mount.source.startswith("/"):
        raise wrong(f"invalid mount path: '{mount.source}' mount path must be absolute")
    point.source = posixpath.normpath(mount.source)
    point.create_source = bool(options and options.create_mountpoint)
    if not point.create_source and not os.path.lexists(point.source):
        raise wrong(f"bind source path does not exist: {point.source}")
    point.propagation = (options.propagation if options else "") or "rprivate"
    if point.propagation not in _PROPAGATIONS:
        raise wrong(f'invalid propagation mode: "{point.propagation}"')
    if options and options.non_recursive:
        point.recursive = False
    if options and options.read_only_non_recursive and options.read_only_force_recursive:
        raise wrong("ReadOnlyNonRecursive and ReadOnlyForceRecursive exclude each other")
    if options and options.read_only_force_recursive:
        if not mount.read_only or point.propagation != "rprivate":
            raise wrong("ReadOnlyForceRecursive needs ReadOnly and propagation rprivate")
        point.read_only_recursive = "enabled"
    elif (options and options.read_only_non_recursive) or version < (1, 44):
        point.read_only_recursive = "disabled"
    return point


def _tmpfs(target: str, options: list[str]) -> MountPoint:
    return MountPoint(
        type="tmpfs",
        destination=_target(target),
        rw="ro" not in options,
        options=options,
    )


def _tmpfs_mount(mount: Mount, point: MountPoint) -> MountPoint:
    options = mount.tmpfs_options
    if options:
        if options.size_bytes:
            point.options.append(f"size={options.size_bytes}")
        if options.mode:
            point.options.append(f"mode={options.mode:o}")
        point.options += ["=".join(words) for words in options.options or []]
    return point


def merged_volumes(*sets: Mapping[str, object] | None) -> list[str]:
    """Targets of anonymous volumes of a request and of its image, each once."""
    return list(dict.fromkeys(target for given in sets for target in (given or {})))

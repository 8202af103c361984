"""The OCI runtime configuration (``config.json``) of a container.

Source of the format: the OCI runtime specification 1.0; of the defaults: the Engine's
documentation.  Everything that touches the host (mounted root, volumes, namespaces,
files) is made before and handed over as :class:`Prepared`; this module only writes down.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lazarette.runtime.containers import capabilities, resources, seccomp
from lazarette.runtime.containers.cgroups import Hierarchies, Layout
from lazarette.runtime.containers.model import HostConfig, words
from lazarette.runtime.containers.record import Definition, MountPoint
from lazarette.runtime.containers.rootfs import User
from lazarette.storage.errors import InvalidArgument
from lazarette.storage.idmaps import IdMap, IdRange

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_SHM_SIZE = 64 << 20
INIT_IN_CONTAINER = "/sbin/docker-init"

MASKED_PATHS = [
    "/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys",
    "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug",
    "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
]  # fmt: skip
READONLY_PATHS = [
    "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
]  # fmt: skip

_SECURE = ["nosuid", "noexec", "nodev"]


@dataclass(frozen=True)
class HostFacts:
    """What of the host shapes every container, found once at start.

    Attributes:
        hierarchies: its control groups.
        bounding: capabilities we can give.
        apparmor: whether AppArmor confines processes here.
        seccomp: whether the kernel filters system calls.
        init: program for ``--init``, None when there is none.
        idmap: whom users of containers are, None: they are the host's.
    """

    hierarchies: Hierarchies
    bounding: frozenset[str]
    apparmor: bool
    seccomp: bool
    init: Path | None
    idmap: IdMap | None = None


@dataclass(frozen=True)
class PlacedMount:
    """A mount whose host side is there."""

    point: MountPoint
    source: Path | None


@dataclass(frozen=True)
class Prepared:
    """What was made for one start of a container.

    Attributes:
        rootfs: the mounted root.
        user: whom it runs as.
        cgroup: path of its control group.
        files: host files to show, by path in the container (hosts, resolv.conf, hostname).
        mounts: volumes, binds and tmpfs.
        namespaces: OCI namespace type → path to join; ``""`` makes a fresh one; a type
            that is absent is the host's.
        hostname, domainname: what the UTS namespace is set to.
        shm: host folder for ``/dev/shm``, None for a fresh tmpfs.
        env: environment of the process.
        idmap: of the user namespace.
    """

    rootfs: Path
    user: User
    cgroup: str
    namespaces: dict[str, str]
    files: dict[str, Path] = field(default_factory=dict)
    mounts: list[PlacedMount] = field(default_factory=list)
    hostname: str = ""
    domainname: str = ""
    shm: Path | None = None
    env: list[str] = field(default_factory=list)
    idmap: IdMap | None = None


@dataclass(frozen=True)
class SecurityOptions:
    """``--security-opt`` read."""

    seccomp: str = ""
    apparmor: str = ""
    no_new_privileges: bool = False
    labels: tuple[str, ...] = ()
    systempaths_unconfined: bool = False
    writable_cgroups: bool = False


def security_options(texts: list[str] | None) -> SecurityOptions:
    """Read ``--security-opt`` values, with ``=`` or the old ``:``.

    Raises:
        InvalidArgument: an option nobody knows.
    """
    profile = apparmor = ""
    no_new, unconfined, writable = False, False, False
    labels: list[str] = []
    for text in texts or []:
        if text in ("no-new-privileges", "no-new-privileges:true", "no-new-privileges=true"):
            no_new = True
            continue
        if text == "systempaths=unconfined":
            unconfined = True
            continue
        separator = "=" if "=" in text else ":"
        key, _, value = text.partition(separator)
        if key == "seccomp":
            profile = value
        elif key == "apparmor":
            apparmor = value
        elif key == "label":
            labels.append(value)
        elif key == "no-new-privileges":
            no_new = value.lower() == "true"
        elif key == "writable-cgroups":
            writable = value.lower() == "true"
        else:
            raise InvalidArgument(f'invalid --security-opt 2: "{text}"')
    return SecurityOptions(profile, apparmor, no_new, tuple(labels), unconfined, writable)


def build(definition: Definition, made: Prepared, facts: HostFacts) -> dict[str, object]:
    """The configuration of one start of a container.

    Raises:
        InvalidArgument: a security option, capability, device or limit that cannot be.
        DriverMissing: devices are asked for that only a driver could give.
    """
    host = definition.host
    options = security_options(host.security_opt)
    described = resources.requested_devices(host.device_requests or [])
    devices = resources.find_devices(host.devices or [])
    if host.privileged:
        devices = resources.all_devices() + devices
    spec: dict[str, object] = {
        "ociVersion": "1.0.2",
        "process": process(definition, made, facts, options),
        "root": {"path": str(made.rootfs), "readonly": host.readonly_rootfs},
        "mounts": _mounts(host, made, facts, options),
        "linux": _linux(definition, made, facts, options, devices),
    }
    if made.namespaces.get("uts") == "":
        spec["hostname"] = made.hostname
        if made.domainname:
            spec["domainname"] = made.domainname
    if not isinstance(host.annotations, msgspec.UnsetType):
        spec["annotations"] = host.annotations
    described.apply(spec)
    return spec


def process(
    definition: Definition, made: Prepared, facts: HostFacts, options: SecurityOptions
) -> dict[str, object]:
    """The ``process`` object: command, user, environment, capabilities, limits."""
    host, config = definition.host, definition.config
    command = list(definition.command)
    if host.init is True and facts.init is not None:
        command = [INIT_IN_CONTAINER, "--", *command]
    spec: dict[str, object] = {
        "terminal": config.tty,
        "user": user(made.user),
        "args": command,
        "env": made.env,
        "cwd": config.working_dir or "/",
        "capabilities": capability_sets(host, facts, made.user),
    }
    if config.tty and any(host.console_size):
        spec["consoleSize"] = {"height": host.console_size[0], "width": host.console_size[1]}
    spec |= _confinement(host, facts, options)
    adjust = host.oom_score_adj
    if adjust > 0 or (adjust < 0 and "SYS_RESOURCE" in facts.bounding):
        spec["oomScoreAdj"] = adjust
    return spec


def further_process(
    definition: Definition,
    found: User,
    command: list[str],
    facts: HostFacts,
    *,
    env: list[str],
    cwd: str = "",
    terminal: bool = False,
    privileged: bool = False,
) -> dict[str, object]:
    """The ``process`` object of one more process in a running container."""
    host = definition.host
    if privileged:
        host = msgspec.structs.replace(host, privileged=True)
    return {
        "terminal": terminal,
        "user": user(found),
        "args": command,
        "env": env,
        "cwd": cwd or definition.config.working_dir or "/",
        "capabilities": capability_sets(host, facts, found),
        **_confinement(host, facts, security_options(host.security_opt)),
    }


def _confinement(host: HostConfig, facts: HostFacts, options: SecurityOptions) -> dict[str, object]:
    """What every process of a container is held to beside its capabilities."""
    made: dict[str, object] = {"noNewPrivileges": options.no_new_privileges}
    limits = resources.rlimits(host.ulimits or [], "SYS_RESOURCE" in facts.bounding)
    if limits:
        made["rlimits"] = limits
    if facts.apparmor and not host.privileged and options.apparmor not in ("", "unconfined"):
        made["apparmorProfile"] = options.apparmor
    return made


def user(found: User) -> dict[str, object]:
    """The ``user`` object."""
    made: dict[str, object] = {"uid": found.uid, "gid": found.gid}
    groups = [*found.groups] if found.gid in found.groups else [found.gid, *found.groups]
    made["additionalGids"] = groups
    return made


def capability_sets(host: HostConfig, facts: HostFacts, found: User) -> dict[str, list[str]]:
    """The capability sets of a process; another user than root gets no effective ones."""
    chosen = capabilities.choose(
        host.cap_add or [], host.cap_drop or [], host.privileged, facts.bounding
    )
    if found.uid != 0:
        return {"bounding": chosen}
    return {"bounding": chosen, "effective": chosen, "permitted": chosen}


def environment(definition: Definition, hostname: str, home: str = "") -> list[str]:
    """Environment of the first process: defaults below what was asked for."""
    config = definition.config
    given = list(config.env or [])
    names = {entry.partition("=")[0] for entry in given}
    defaults = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname}
    if config.tty:
        defaults["TERM"] = "xterm"
    if home:
        defaults["HOME"] = home
    made = [f"{key}={value}" for key, value in defaults.items() if key not in names]
    return made + [entry for entry in given if "=" in entry]


def command_of(entrypoint: list[str], cmd: list[str]) -> list[str]:
    """Entrypoint and command as one argument list."""
    return [*words(entrypoint), *words(cmd)]


def _mounts(
    host: HostConfig, made: Prepared, facts: HostFacts, options: SecurityOptions
) -> list[dict[str, object]]:
    writable = host.privileged
    taken = {placed.point.destination for placed in made.mounts}
    mounts: list[dict[str, object]] = [
        _mount("/proc", "proc", "proc", _SECURE),
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "/dev/pts",
            "devpts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        _sys(made, writable),
        _mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            [*_SECURE, "relatime", "rw" if writable or options.writable_cgroups else "ro"],
        ),
    ]
    if "ipc" in made.namespaces:
        mounts.append(_mount("/dev/mqueue", "mqueue", "mqueue", _SECURE))
    else:
        mounts.append(_bind("/dev/mqueue", Path("/dev/mqueue"), ["rbind", *_SECURE]))
    if made.shm is not None:
        mounts.append(_bind("/dev/shm", made.shm, ["rbind", *_SECURE]))
    elif host.ipc_mode != "none":
        size = host.shm_size or DEFAULT_SHM_SIZE
        mounts.append(_mount("/dev/shm", "tmpfs", "shm", [*_SECURE, "mode=1777", f"size={size}"]))
    for target, source in made.files.items():
        if target not in taken:
            mode = "ro" if host.readonly_rootfs else "rw"
            mounts.append(_bind(target, source, ["rbind", "rprivate", mode]))
    if host.init is True and facts.init is not None:
        mounts.append(_bind(INIT_IN_CONTAINER, facts.init, ["bind", "ro"]))
    mounts = [mount for mount in mounts if mount["destination"] not in taken]
    mounts += [_placed(placed) for placed in made.mounts]
    return mounts


def _sys(made: Prepared, writable: bool) -> dict[str, object]:
    if "network" not in made.namespaces:
        return _bind("/sys", Path("/sys"), ["rbind", *_SECURE, "rw" if writable else "ro"])
    return _mount("/sys", "sysfs", "sysfs", [*_SECURE, "rw" if writable else "ro"])


def _mount(target: str, kind: str, source: str, options: list[str]) -> dict[str, object]:
    return {"destination": target, "type": kind, "source": source, "options": options}


def _bind(target: str, source: Path, options: list[str]) -> dict[str, object]:
    return _mount(target, "bind", str(source), options)


def _placed(placed: PlacedMount) -> dict[str, object]:
    point = placed.point
    if point.type == "tmpfs":
        options = ["noexec", "nosuid", "nodev", *point.options]
        if not point.rw and "ro" not in options:
            options.append("ro")
        overruled = {"exec": "noexec", "suid": "nosuid", "dev": "nodev"}
        options = [o for o in options if o not in {overruled.get(p, "") for p in point.options}]
        return _mount(point.destination, "tmpfs", "tmpfs", options)
    if placed.source is None:
        raise InvalidArgument(f"mount {point.destination}: nothing to mount")
    options = ["rbind" if point.recursive else "bind", point.propagation or "rprivate"]
    if not point.rw:
        # A file has no mounts below it, and crun opens the target of "rro" as a folder.
        has_below = point.recursive and placed.source.is_dir()
        recursive = has_below and point.read_only_recursive != "disabled"
        options.append("rro" if recursive else "ro")
        if recursive:
            options.append("ro")
    return _bind(point.destination, placed.source, options)


def _linux(
    definition: Definition,
    made: Prepared,
    facts: HostFacts,
    options: SecurityOptions,
    devices: list[resources.HostDevice],
) -> dict[str, object]:
    host = definition.host
    limits = resources.limits(host, facts.hierarchies).resources
    if host.privileged:
        rules: list[dict[str, object]] = [{"allow": True, "access": "rwm"}]
    else:
        rules = [{"allow": False, "access": "rwm"}]
        rules += [device.rule() for device in devices]
        rules += resources.device_rules(host.device_cgroup_rules or [])
    linux: dict[str, object] = {
        "cgroupsPath": made.cgroup,
        "namespaces": [
            {"type": kind, **({"path": path} if path else {})}
            for kind, path in made.namespaces.items()
        ],
        "resources": {**limits, "devices": rules},
        "devices": [device.node() for device in devices],
        "rootfsPropagation": _propagation(made.mounts),
    }
    if made.idmap is not None:
        linux["uidMappings"] = _mapping(made.idmap.uids)
        linux["gidMappings"] = _mapping(made.idmap.gids)
    if not isinstance(host.sysctls, msgspec.UnsetType) and host.sysctls:
        linux["sysctl"] = host.sysctls
    if not host.privileged and not options.systempaths_unconfined:
        linux["maskedPaths"] = MASKED_PATHS if host.masked_paths is None else host.masked_paths
        linux["readonlyPaths"] = (
            READONLY_PATHS if host.readonly_paths is None else host.readonly_paths
        )
    if facts.seccomp and not host.privileged and options.seccomp != "unconfined":
        names = capability_sets(host, facts, made.user)["bounding"]
        if options.seccomp in ("", "builtin"):
            linux["seccomp"] = seccomp.default_filter(names)
        else:
            linux["seccomp"] = seccomp.from_profile(options.seccomp, names)
    return linux


def _mapping(ranges: Sequence[IdRange]) -> list[dict[str, object]]:
    return [
        {"containerID": each.inside, "hostID": each.outside, "size": each.length} for each in ranges
    ]


def _propagation(mounts: list[PlacedMount]) -> str:
    kinds = {placed.point.propagation for placed in mounts if placed.point.type == "bind"}
    if kinds & {"shared", "rshared"}:
        return "shared"
    return "rslave" if kinds & {"slave", "rslave"} else "rprivate"


def find_facts(
    hierarchies: Hierarchies, init: Path | None, idmap: IdMap | None = None
) -> HostFacts:
    """Ask the host once; the map is the daemon's setting."""
    apparmor = Path("/sys/module/apparmor/parameters/enabled")
    try:
        confined = apparmor.read_text().startswith("Y")
    except OSError:
        confined = False
    return HostFacts(
        hierarchies,
        capabilities.bounding_set(),
        confined,
        os.path.exists("/proc/sys/kernel/seccomp"),
        init,
        idmap,
    )


def default_cgroupns(hierarchies: Hierarchies) -> str:
    """The mode a container gets that names none."""
    return "private" if hierarchies.layout is Layout.V2 else "host"


def warnings(host: HostConfig, facts: HostFacts) -> list[str]:
    """What of a request the host cannot do, for its maker."""
    made = resources.limits(host, facts.hierarchies).warnings
    if host.init is True and facts.init is None:
        made.append("No init program is installed: Init is ignored.")
    return made


def volume_options(host: HostConfig, destination: str) -> tuple[dict[str, str], dict[str, str]]:
    """Driver options and labels that a volume mount asks for, should its volume be made."""
    for mount in [] if isinstance(host.mounts, msgspec.UnsetType) else host.mounts:
        if mount.target.rstrip("/") == destination and mount.volume_options is not None:
            options = mount.volume_options
            driver = options.driver_config
            return dict((driver.options if driver else None) or {}), dict(options.labels or {})
    return {}, {}

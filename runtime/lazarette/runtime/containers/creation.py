"""From a create request and an image to a container's definition.

The image's defaults are merged below what was asked for, the host part gets the values
the Engine fills in, and everything that can be refused is refused here, before anything
is made.
"""

from __future__ import annotations

import posixpath

import msgspec
from msgspec import UNSET, UnsetType

from lazarette.runtime.containers import mounts, pidfd, resources, spec, users
from lazarette.runtime.containers.logs import parse_options
from lazarette.runtime.containers.model import (
    ContainerConfig,
    CreateRequest,
    EndpointSettings,
    Healthcheck,
    HostConfig,
    Nothing,
    PortBinding,
    RestartPolicy,
    words,
)
from lazarette.runtime.containers.mounts import Lookup
from lazarette.runtime.containers.record import Definition
from lazarette.runtime.containers.spec import HostFacts
from lazarette.runtime.images.model import Image, RunConfig
from lazarette.storage.errors import InvalidArgument

RESTART_POLICIES = ("", "no", "always", "unless-stopped", "on-failure")
_MILLISECOND = 1_000_000


def define(
    request: CreateRequest,
    image: Image,
    container_id: str,
    name: str,
    now_ns: int,
    facts: HostFacts,
    lookup: Lookup,
    version: tuple[int, int],
) -> Definition:
    """The definition of a new container.

    Raises:
        InvalidArgument: something in the request cannot be.
    """
    run = image.config.run
    config = merged_config(request, run, container_id)
    host = filled_host(request.host_config, facts)
    check(config, host, version)
    users.check(host, facts.idmap)
    points = mounts.collect(
        host, mounts.merged_volumes(request.volumes, run.volumes), lookup, version
    )
    command = [*words(config.entrypoint), *words(config.cmd)]
    if not command or not command[0]:
        raise InvalidArgument("no command specified")
    return Definition(
        id=container_id,
        name=name,
        created_ns=now_ns,
        image_id=image.id,
        image_ref=request.image,
        image_layer=image.layer,
        config=config,
        host=host,
        endpoints=endpoints(request, host, version),
        mounts=points,
        command=command,
    )


def merged_config(request: CreateRequest, run: RunConfig, container_id: str) -> ContainerConfig:
    """The request's configuration with the image's defaults below it."""
    given = {name: getattr(request, name) for name in ContainerConfig.__struct_fields__}
    config = ContainerConfig(**given)
    config.user = config.user or run.user
    config.working_dir = config.working_dir or run.working_dir
    if config.working_dir and not config.working_dir.startswith("/"):
        raise InvalidArgument(
            f"the working directory '{config.working_dir}' is invalid, it needs to be an "
            "absolute path"
        )
    if config.working_dir:
        config.working_dir = posixpath.normpath(config.working_dir)
    config.env = _merged_env(run.env or [], config.env or [])
    config.labels = {**(run.labels or {}), **config.labels}
    ports = {} if isinstance(config.exposed_ports, UnsetType) else dict(config.exposed_ports)
    for port in run.exposed_ports or {}:
        ports.setdefault(port, Nothing())
    for port in request.host_config.port_bindings or {}:
        ports.setdefault(port, Nothing())
    ports = {_port(port): Nothing() for port in ports}
    config.exposed_ports = ports or UNSET
    if run.volumes:
        config.volumes = {**{v: Nothing() for v in run.volumes}, **(config.volumes or {})}
    entrypoint = words(config.entrypoint) if config.entrypoint is not None else None
    cmd = words(config.cmd) if config.cmd is not None else None
    if entrypoint == [""]:
        config.entrypoint = None
        config.cmd = cmd
    elif not entrypoint:
        config.entrypoint = run.entrypoint
        config.cmd = cmd or run.cmd
    else:
        config.entrypoint, config.cmd = entrypoint, cmd
    config.healthcheck = _merged_health(config.healthcheck, run)
    if isinstance(config.stop_signal, UnsetType) and run.stop_signal:
        config.stop_signal = run.stop_signal
    if isinstance(config.stop_timeout, UnsetType) and run.stop_timeout is not None:
        config.stop_timeout = run.stop_timeout
    if isinstance(config.shell, UnsetType) and run.shell:
        config.shell = run.shell
    if not config.hostname and not _shares_uts(request.host_config):
        config.hostname = container_id[:12]
    return config


def _shares_uts(host: HostConfig) -> bool:
    return (
        host.uts_mode == "host"
        or host.network_mode.startswith("container:")
        or (host.network_mode == "host")
    )


def _merged_env(image: list[str], given: list[str]) -> list[str]:
    names = {entry.partition("=")[0] for entry in given}
    return [entry for entry in image if entry.partition("=")[0] not in names] + given


def _port(text: str) -> str:
    number, _, proto = text.partition("/")
    proto = proto or "tcp"
    first, _, last = number.partition("-")
    valid = first.isdecimal() and int(first) < 65536 and (not last or last.isdecimal())
    if not valid or proto not in ("tcp", "udp", "sctp"):
        raise InvalidArgument(f"invalid port specification: '{text}'")
    return f"{number}/{proto}"


def _merged_health(given: Healthcheck | UnsetType, run: RunConfig) -> Healthcheck | UnsetType:
    image = run.healthcheck
    if isinstance(given, UnsetType):
        if image is None:
            return UNSET
        return msgspec.convert(msgspec.to_builtins(image), type=Healthcheck)
    if image is None or given.test == ["NONE"]:
        return given
    merged = msgspec.structs.replace(given)
    for name in Healthcheck.__struct_fields__:
        if not getattr(merged, name):
            setattr(merged, name, getattr(image, name, getattr(merged, name)))
    return merged


def filled_host(given: HostConfig, facts: HostFacts) -> HostConfig:
    """The host part with the values the Engine fills in."""
    host = msgspec.convert(msgspec.to_builtins(given), type=HostConfig)
    if host.network_mode in ("", "default"):
        host.network_mode = "bridge"
    host.restart_policy.name = host.restart_policy.name or "no"
    host.log_config.type = host.log_config.type or "json-file"
    host.ipc_mode = host.ipc_mode or "private"
    host.cgroupns_mode = host.cgroupns_mode or (
        "host" if host.privileged else spec.default_cgroupns(facts.hierarchies)
    )
    host.shm_size = host.shm_size or spec.DEFAULT_SHM_SIZE
    host.runtime = host.runtime or "runc"
    if host.memory > 0 and host.memory_swap == 0:
        host.memory_swap = host.memory * 2
    if host.memory_swappiness == -1:
        host.memory_swappiness = None
    if host.pids_limit is not None and host.pids_limit <= 0:
        host.pids_limit = None
    bindings = host.port_bindings
    host.port_bindings = {
        _port(port): _bindings(port, entries) for port, entries in (bindings or {}).items()
    }
    if host.privileged:
        host.masked_paths = host.readonly_paths = None
        host.security_opt = host.security_opt or ["label=disable"]
    else:
        if host.masked_paths is None:
            host.masked_paths = list(spec.MASKED_PATHS)
        if host.readonly_paths is None:
            host.readonly_paths = list(spec.READONLY_PATHS)
        if spec.security_options(host.security_opt).systempaths_unconfined:
            host.masked_paths = host.readonly_paths = []
    return host


def _bindings(port: str, entries: list[PortBinding] | None) -> list[PortBinding]:
    made = []
    for entry in entries or [PortBinding()]:
        text = str(entry.host_port)
        first, _, last = text.partition("-")
        if text and not (first.isdecimal() and (not last or last.isdecimal())):
            raise InvalidArgument(f"invalid port specification: '{text}'")
        if text and int(last or first) > 65535:
            raise InvalidArgument(f"invalid port specification: '{text}'")
        made.append(PortBinding(host_ip=entry.host_ip, host_port=text))
    return made


def check(config: ContainerConfig, host: HostConfig, version: tuple[int, int]) -> None:
    """Refuse combinations and values that cannot be.

    Raises:
        InvalidArgument: see the message.
    """
    resources.check(host)
    check_restart(host.restart_policy)
    if host.auto_remove and host.restart_policy.name not in ("", "no"):
        raise InvalidArgument("can't create 'AutoRemove' container with restart policy")
    signal = config.stop_signal if isinstance(config.stop_signal, str) else ""
    if signal and not pidfd.parse_signal(signal):
        raise InvalidArgument(f"invalid signal: {signal}")
    parse_options(host.log_config.type, host.log_config.config)
    spec.security_options(host.security_opt)
    if isinstance(config.healthcheck, Healthcheck):
        _check_health(config.healthcheck)
    modes = {"pid": host.pid_mode, "ipc": host.ipc_mode, "uts": host.uts_mode}
    allowed = {
        "pid": ("", "host", "private"),
        "ipc": ("", "none", "private", "shareable", "host"),
        "uts": ("", "host"),
    }
    for kind, mode in modes.items():
        if mode not in allowed[kind] and not (
            kind != "uts" and mode.startswith("container:") and mode != "container:"
        ):
            raise InvalidArgument(f"invalid {kind.upper()} mode: {mode}")
    if host.userns_mode not in ("", "host"):
        raise InvalidArgument(f"invalid user namespace mode: {host.userns_mode}")
    if host.cgroupns_mode not in ("", "host", "private"):
        raise InvalidArgument(f"invalid cgroup namespace mode: {host.cgroupns_mode}")
    if host.network_mode.startswith("container:") and config.hostname:
        raise InvalidArgument("conflicting options: hostname and the network mode")
    if host.runtime not in ("runc", "crun", "io.containerd.runc.v2"):
        raise InvalidArgument(f"unknown or invalid runtime name: {host.runtime}")
    if host.isolation not in ("", "default"):
        raise InvalidArgument(f"Invalid isolation: {host.isolation!r}")
    if host.extra_hosts:
        for entry in host.extra_hosts:
            if ":" not in entry and "=" not in entry:
                raise InvalidArgument(f'bad format for add-host: "{entry}"')


def check_restart(policy: RestartPolicy) -> None:
    """Refuse a restart policy that cannot be.

    Raises:
        InvalidArgument: an unknown name, or a count without ``on-failure``.
    """
    if policy.name not in RESTART_POLICIES:
        raise InvalidArgument(
            f"invalid restart policy: unknown policy '{policy.name}'; use one of 'no', "
            "'always', 'on-failure', or 'unless-stopped'"
        )
    if policy.maximum_retry_count < 0:
        raise InvalidArgument("invalid restart policy: maximum retry count cannot be negative")
    if policy.maximum_retry_count and policy.name != "on-failure":
        raise InvalidArgument(
            "invalid restart policy: maximum retry count can only be used with 'on-failure'"
        )


def _check_health(health: Healthcheck) -> None:
    for name in ("interval", "timeout", "start_period", "start_interval"):
        value = getattr(health, name)
        if value and value < _MILLISECOND:
            shown = "".join(part.capitalize() for part in name.split("_"))
            raise InvalidArgument(f"{shown} in Healthcheck cannot be less than 1ms")
    if health.retries < 0:
        raise InvalidArgument("Retries in Healthcheck cannot be negative")


def endpoints(
    request: CreateRequest, host: HostConfig, version: tuple[int, int]
) -> dict[str, EndpointSettings]:
    """The networks a new container is on, by the name or id they were asked for with."""
    given = request.networking_config.endpoints_config or {}
    if len(given) > 1 and version < (1, 44):
        raise InvalidArgument(
            f"Container cannot be created with multiple network endpoints: [{', '.join(given)}]"
        )
    mode = host.network_mode
    if mode in ("none", "host") or mode.startswith("container:"):
        if given and set(given) - {mode}:
            raise InvalidArgument(
                f"conflicting options: cannot attach a container in network mode {mode!r} "
                "to other networks"
            )
        return {}
    made = {"bridge" if key == "default" else key: value for key, value in given.items()}
    if mode not in made:
        made = {mode: EndpointSettings(), **made} if not made or mode != "bridge" else made
    return {key: value or EndpointSettings() for key, value in made.items()}

"""The Engine API's words for a container: configuration, host part, endpoints, mounts.

Field names and meanings are those of the Engine's API description; values a client left
out have Go's zero value, so that ``inspect`` echoes what was asked.  :func:`parse` reads
them as Go does: names in any case, ``null`` for the zero value, unknown names ignored.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import field

from lazarette.runtime import gojson
from lazarette.storage.errors import InvalidArgument

T = TypeVar("T")
Words = list[str] | str | None


class Struct(msgspec.Struct, rename="pascal", kw_only=True):
    """Base of the API's objects: ``cpu_shares`` here is ``CpuShares`` there."""


class Healthcheck(Struct, omit_defaults=True):
    """How health is probed; durations in nanoseconds, 0 means inherited or default."""

    test: list[str] | None = None
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0


class Nothing(msgspec.Struct):
    """Go's ``struct{}``: the value of sets."""


class ContainerConfig(Struct):
    """What of a container does not depend on the host."""

    hostname: str = ""
    domainname: str = ""
    user: str = ""
    attach_stdin: bool = False
    attach_stdout: bool = False
    attach_stderr: bool = False
    exposed_ports: dict[str, Nothing] | msgspec.UnsetType = msgspec.UNSET
    tty: bool = False
    open_stdin: bool = False
    stdin_once: bool = False
    env: list[str] | None = None
    cmd: Words = None
    healthcheck: Healthcheck | msgspec.UnsetType = msgspec.UNSET
    args_escaped: bool | msgspec.UnsetType = msgspec.UNSET
    image: str = ""
    volumes: dict[str, Nothing] | None = None
    working_dir: str = ""
    entrypoint: Words = None
    network_disabled: bool | msgspec.UnsetType = msgspec.UNSET
    mac_address: str | msgspec.UnsetType = msgspec.UNSET
    on_build: list[str] | None = None
    labels: dict[str, str] = field(default_factory=dict)
    stop_signal: str | msgspec.UnsetType = msgspec.UNSET
    stop_timeout: int | msgspec.UnsetType = msgspec.UNSET
    shell: list[str] | msgspec.UnsetType = msgspec.UNSET


class LogConfig(Struct):
    """The logging driver and its options."""

    type: str = ""
    config: dict[str, str] = field(default_factory=dict)


class RestartPolicy(Struct):
    """``no``, ``always``, ``unless-stopped`` or ``on-failure`` with a limit."""

    name: str = ""
    maximum_retry_count: int = 0


class PortBinding(Struct):
    """A host address and port; empty means any."""

    host_ip: str = ""
    host_port: str | int = ""


class Device(Struct):
    """A host device shown in the container."""

    path_on_host: str = ""
    path_in_container: str = ""
    cgroup_permissions: str = "rwm"


class WeightDevice(Struct):
    """Relative I/O weight of one device."""

    path: str = ""
    weight: int = 0


class ThrottleDevice(Struct):
    """I/O limit of one device, bytes or operations a second."""

    path: str = ""
    rate: int = 0


class Ulimit(Struct):
    """A resource limit by its name, e.g. ``nofile``; -1 is unlimited."""

    name: str = ""
    soft: int = 0
    hard: int = 0


class BindOptions(Struct, omit_defaults=True):
    """Options of a bind mount."""

    propagation: str = ""
    non_recursive: bool = False
    create_mountpoint: bool = False
    read_only_non_recursive: bool = False
    read_only_force_recursive: bool = False


class DriverConfig(Struct, omit_defaults=True):
    """Volume driver and its options, for a volume made on the way."""

    name: str = ""
    options: dict[str, str] | None = None


class VolumeOptions(Struct, omit_defaults=True):
    """Options of a volume mount."""

    no_copy: bool = False
    labels: dict[str, str] | None = None
    driver_config: DriverConfig | None = None
    subpath: str = ""


class TmpfsOptions(Struct, omit_defaults=True):
    """Options of a tmpfs mount: size in bytes, mode, further options."""

    size_bytes: int = 0
    mode: int = 0
    options: list[list[str]] | None = None


class ImageOptions(Struct, omit_defaults=True):
    """Options of an image mount."""

    subpath: str = ""


class Mount(Struct, omit_defaults=True):
    """An entry of ``HostConfig.Mounts``."""

    type: str = ""
    source: str = ""
    target: str = ""
    read_only: bool = False
    consistency: str = ""
    bind_options: BindOptions | None = None
    volume_options: VolumeOptions | None = None
    tmpfs_options: TmpfsOptions | None = None
    image_options: ImageOptions | None = None


class HostConfig(Struct):
    """What of a container depends on the host; echoed by ``inspect`` as it was asked."""

    binds: list[str] | None = None
    container_id_file: str = field(default="", name="ContainerIDFile")
    log_config: LogConfig = field(default_factory=LogConfig)
    network_mode: str = ""
    port_bindings: dict[str, list[PortBinding] | None] | None = None
    restart_policy: RestartPolicy = field(default_factory=RestartPolicy)
    auto_remove: bool = False
    volume_driver: str = ""
    volumes_from: list[str] | None = None
    console_size: list[int] = field(default_factory=lambda: [0, 0])
    annotations: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    cap_add: list[str] | None = None
    cap_drop: list[str] | None = None
    cgroupns_mode: str = ""
    dns: list[str] | None = None
    dns_options: list[str] | None = None
    dns_search: list[str] | None = None
    extra_hosts: list[str] | None = None
    group_add: list[str] | None = None
    ipc_mode: str = ""
    cgroup: str = ""
    links: list[str] | None = None
    oom_score_adj: int = 0
    pid_mode: str = ""
    privileged: bool = False
    publish_all_ports: bool = False
    readonly_rootfs: bool = False
    security_opt: list[str] | None = None
    storage_opt: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    tmpfs: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    uts_mode: str = field(default="", name="UTSMode")
    userns_mode: str = ""
    shm_size: int = 0
    sysctls: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    runtime: str = ""
    isolation: str = ""
    cpu_shares: int = 0
    memory: int = 0
    nano_cpus: int = 0
    cgroup_parent: str = ""
    blkio_weight: int = 0
    blkio_weight_device: list[WeightDevice] | None = None
    blkio_device_read_bps: list[ThrottleDevice] | None = None
    blkio_device_write_bps: list[ThrottleDevice] | None = None
    blkio_device_read_i_ops: list[ThrottleDevice] | None = field(
        default=None, name="BlkioDeviceReadIOps"
    )
    blkio_device_write_i_ops: list[ThrottleDevice] | None = field(
        default=None, name="BlkioDeviceWriteIOps"
    )
    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_realtime_period: int = 0
    cpu_realtime_runtime: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    devices: list[Device] | None = None
    device_cgroup_rules: list[str] | None = None
    device_requests: list[dict[str, object]] | None = None
    memory_reservation: int = 0
    memory_swap: int = 0
    memory_swappiness: int | None = None
    oom_kill_disable: bool | None = None
    pids_limit: int | None = None
    ulimits: list[Ulimit] | None = None
    cpu_count: int = 0
    cpu_percent: int = 0
    io_maximum_i_ops: int = field(default=0, name="IOMaximumIOps")
    io_maximum_bandwidth: int = field(default=0, name="IOMaximumBandwidth")
    mounts: list[Mount] | msgspec.UnsetType = msgspec.UNSET
    masked_paths: list[str] | None = None
    readonly_paths: list[str] | None = None
    init: bool | msgspec.UnsetType = msgspec.UNSET


class IpamConfig(Struct, omit_defaults=True):
    """Addresses asked for on an endpoint."""

    ipv4_address: str = field(default="", name="IPv4Address")
    ipv6_address: str = field(default="", name="IPv6Address")
    link_local_ips: list[str] | None = field(default=None, name="LinkLocalIPs")


class EndpointSettings(Struct):
    """A container's place on one network, as asked for."""

    ipam_config: IpamConfig | None = field(default=None, name="IPAMConfig")
    links: list[str] | None = None
    aliases: list[str] | None = None
    mac_address: str = ""
    driver_opts: dict[str, str] | None = None
    gw_priority: int = 0
    network_id: str = field(default="", name="NetworkID")


class NetworkingConfig(Struct):
    """The endpoints of a new container by the network's name or id."""

    endpoints_config: dict[str, EndpointSettings | None] | None = None


class CreateRequest(ContainerConfig):
    """The body of ``POST /containers/create``."""

    host_config: HostConfig = field(default_factory=HostConfig)
    networking_config: NetworkingConfig = field(default_factory=NetworkingConfig)


class UpdateRequest(Struct):
    """The body of ``POST /containers/{id}/update``; zero means unchanged."""

    cpu_shares: int = 0
    memory: int = 0
    nano_cpus: int = 0
    blkio_weight: int = 0
    cpu_period: int = 0
    cpu_quota: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    memory_reservation: int = 0
    memory_swap: int = 0
    pids_limit: int | None = None
    restart_policy: RestartPolicy | None = None


class ExecRequest(Struct):
    """The body of ``POST /containers/{id}/exec``."""

    user: str = ""
    privileged: bool = False
    tty: bool = False
    console_size: list[int] | None = None
    attach_stdin: bool = False
    attach_stderr: bool = False
    attach_stdout: bool = False
    detach_keys: str = ""
    env: list[str] | None = None
    working_dir: str = ""
    cmd: Words = None


class ExecStart(Struct):
    """The body of ``POST /exec/{id}/start``."""

    detach: bool = False
    tty: bool = False
    console_size: list[int] | None = None


def parse(kind: type[T], value: object) -> T:
    """Read decoded JSON as ``kind``, as Go would.

    Raises:
        InvalidArgument: a value has the wrong type; the message says where.
    """
    try:
        return gojson.convert(value, kind)
    except msgspec.ValidationError as bad:
        raise InvalidArgument(f"invalid JSON: {bad}") from bad


def words(value: Words) -> list[str]:
    """A command given as text or as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)

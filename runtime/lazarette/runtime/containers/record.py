"""What is known of one container: its definition, which does not change, and its state.

Both are structs that go into the database as JSON.
"""

from __future__ import annotations

from enum import Enum

import msgspec
from msgspec import field

from lazarette.runtime.containers.model import ContainerConfig, EndpointSettings, HostConfig


class Status(Enum):
    """The states of a container, by Docker's names.

    ::

        created ──start──▶ running ◀──pause/unpause──▶ paused
           │                │  ▲
           │               die └──restarting (waits for its back-off)
           ▼                ▼
        removing ◀────── exited          dead: removal failed half-way
    """

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    RESTARTING = "restarting"
    EXITED = "exited"
    REMOVING = "removing"
    DEAD = "dead"


class MountPoint(msgspec.Struct, kw_only=True):
    """Something mounted in a container beside its root.

    Attributes:
        type: ``bind``, ``volume``, ``tmpfs`` or ``image``.
        name: of the volume.
        source: host path of a bind; image reference of an image mount.
        destination: absolute path in the container.
        driver: of the volume.
        mode: what was written after the second colon of ``-v``.
        rw: writable.
        propagation: of a bind.
        anonymous: the volume was made for this container alone, without a name.
        copy: copy the image's content into the volume when it is empty.
        recursive: bind what is mounted below as well.
        read_only_recursive: ``if-possible``, ``enabled`` or ``disabled``.
        subpath: folder of the volume or image that is mounted instead of its root.
        options: mount options of a tmpfs.
        create_source: make the missing source of a bind.
        from_mounts: asked for through ``HostConfig.Mounts``.
    """

    type: str
    destination: str
    name: str = ""
    source: str = ""
    driver: str = ""
    mode: str = ""
    rw: bool = True
    propagation: str = ""
    anonymous: bool = False
    copy: bool = False
    recursive: bool = True
    read_only_recursive: str = "if-possible"
    subpath: str = ""
    options: list[str] = field(default_factory=list)
    create_source: bool = False
    from_mounts: bool = False


class HealthProbe(msgspec.Struct):
    """One run of the health check."""

    start_ns: int
    end_ns: int
    exit_code: int
    output: str


class Health(msgspec.Struct):
    """Health so far: ``starting``, ``healthy`` or ``unhealthy``."""

    status: str = "starting"
    failing_streak: int = 0
    log: list[HealthProbe] = field(default_factory=list)


class State(msgspec.Struct, kw_only=True):
    """What changes while a container lives.

    Attributes:
        status: see :class:`Status`.
        pid: first process, as the host sees it; 0 when not running.
        pid_start: its start time in clock ticks since boot, to tell it from a later
            process with the same number.
        monitor_pid: conmon's process.
        exit_code: of the last run.
        error: why the last start failed.
        oom_killed: the last run met its memory limit.
        started_ns, finished_ns: wall clock of the last run; 0 is never.
        restart_count: restarts by policy since the last start by hand.
        stopped_by_hand: the policy does not restart it, and ``unless-stopped`` not even
            at the next start of the daemon.
        backoff_ns: delay before the next restart by policy.
        health: None without a health check.
        restart_due: it is waiting for, or in, a restart by policy.
    """

    status: Status = Status.CREATED
    pid: int = 0
    pid_start: int = 0
    monitor_pid: int = 0
    exit_code: int = 0
    error: str = ""
    oom_killed: bool = False
    started_ns: int = 0
    finished_ns: int = 0
    restart_count: int = 0
    stopped_by_hand: bool = False
    backoff_ns: int = 0
    health: Health | None = None
    restart_due: bool = False

    @property
    def running(self) -> bool:
        """Whether it has a process (paused counts)."""
        return self.status in (Status.RUNNING, Status.PAUSED)


class Definition(msgspec.Struct, kw_only=True):
    """What a container is; changed only by rename, update and network connect.

    Attributes:
        id: 64 hex digits.
        name: without a slash.
        created_ns: wall clock.
        image_id: digest id of its image.
        image_ref: the reference it was created with.
        image_layer: key of the image's top layer.
        config: with the image's defaults merged in.
        host: as it was asked for, defaults filled in.
        endpoints: networks by name.
        mounts: everything mounted beside the root.
        command: entrypoint and arguments as they are executed.
        stop_signal: name or number.
        image_env: variables of the image alone, for ``commit``.
    """

    id: str
    name: str
    created_ns: int
    image_id: str
    image_ref: str
    image_layer: str | None
    config: ContainerConfig
    host: HostConfig
    endpoints: dict[str, EndpointSettings] = field(default_factory=dict)
    mounts: list[MountPoint] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    platform: str = "linux"

    @property
    def layer(self) -> str:
        """Key of its writable layer."""
        return layer_key(self.id)

    @property
    def short_id(self) -> str:
        """The first twelve digits."""
        return self.id[:12]


LAYER_PREFIX = "container-"


def layer_key(container_id: str) -> str:
    """The layer driver's key for a container's writable layer."""
    return LAYER_PREFIX + container_id

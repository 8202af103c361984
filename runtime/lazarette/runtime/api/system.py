"""Ping, version, info, events and disk usage of the Engine API."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from aiohttp import web

from lazarette.runtime.api.hijack import while_connected
from lazarette.runtime.api.http import (
    API_VERSION,
    MIN_API_VERSION,
    Call,
    Route,
    json_response,
    stream,
    version_text,
)
from lazarette.runtime.containers.cgroups import Layout
from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.housekeeping import has_labels
from lazarette.runtime.containers.manager import ContainerManager
from lazarette.runtime.containers.record import Status
from lazarette.runtime.containers.times import parse_instant
from lazarette.runtime.events import Event
from lazarette.runtime.images.store import ImageStore
from lazarette.runtime.networks.manager import NetworkManager
from lazarette.storage.clock import NANOSECONDS, rfc3339
from lazarette.storage.errors import InvalidArgument, LazaretteError
from lazarette.storage.volumes.manager import VolumeManager

VERSION = "0.1.0"
_EVENT_FILTERS = (
    "config", "container", "daemon", "event", "image", "label", "network", "node", "plugin",
    "scope", "secret", "service", "type", "volume",
)  # fmt: skip
_DF_TYPES = ("container", "image", "volume", "build-cache")


def routes(
    manager: ContainerManager,
    images: ImageStore,
    volumes: VolumeManager,
    networks: NetworkManager,
    daemon_id: str,
    build_cache: Callable[[], list[dict[str, object]]] = list,
    driver_status: Sequence[tuple[str, str]] = (),
) -> list[Route]:
    """The routes about the engine itself.

    Args:
        manager: containers.
        images: images.
        volumes: volumes.
        networks: networks.
        daemon_id: shown as the engine's id.
        build_cache: lists what the build cache holds.
        driver_status: which drivers were chosen, and why.
    """
    made = SystemRoutes(manager, images, volumes, networks, daemon_id)
    made.build_cache = build_cache
    made.driver_status = list(driver_status)
    return [
        Route("GET", "/_ping", made.ping),
        Route("HEAD", "/_ping", made.ping),
        Route("GET", "/version", made.version),
        Route("GET", "/info", made.info),
        Route("GET", "/events", made.events),
        Route("GET", "/system/df", made.disk_usage),
    ]


class SystemRoutes:
    """The handlers."""

    def __init__(
        self,
        manager: ContainerManager,
        images: ImageStore,
        volumes: VolumeManager,
        networks: NetworkManager,
        daemon_id: str,
    ) -> None:
        self._manager = manager
        self._images = images
        self._volumes = volumes
        self._networks = networks
        self._daemon_id = daemon_id
        self.build_cache: Callable[[], list[dict[str, object]]] = list
        self.driver_status: list[tuple[str, str]] = []

    async def ping(self, call: Call) -> web.StreamResponse:
        """``/_ping``: where negotiation begins."""
        return web.Response(
            text="" if call.request.method == "HEAD" else "OK",
            headers={
                "Api-Version": version_text(API_VERSION),
                "Ostype": "linux",
                "Builder-Version": "1",
                "Swarm": "inactive",
                "Docker-Experimental": "true",
                "Server": f"Lazarette/{VERSION} (linux)",
                "Cache-Control": "no-cache, no-store, must-revalidate",
                "Pragma": "no-cache",
            },
        )

    async def version(self, call: Call) -> web.StreamResponse:
        """``GET /version``."""
        kernel, machine = os.uname().release, _architecture()
        runtime = self._manager.runtime
        details = {
            "ApiVersion": version_text(API_VERSION),
            "MinAPIVersion": version_text(MIN_API_VERSION),
            "Os": "linux",
            "Arch": machine,
            "KernelVersion": kernel,
            "Experimental": "true",
        }
        return json_response(
            {
                "Platform": {"Name": "Lazarette"},
                "Components": [
                    {"Name": "Engine", "Version": VERSION, "Details": details},
                    {"Name": runtime.name, "Version": runtime.version, "Details": {}},
                ],
                "Version": VERSION,
                "ApiVersion": version_text(API_VERSION),
                "MinAPIVersion": version_text(MIN_API_VERSION),
                "GitCommit": "",
                "GoVersion": "",
                "Os": "linux",
                "Arch": machine,
                "KernelVersion": kernel,
                "BuildTime": "",
            }
        )

    async def info(self, call: Call) -> web.StreamResponse:
        """``GET /info``."""
        manager = self._manager
        containers = manager.all()
        states = [one.state.status for one in containers]
        hierarchies, runtime = manager.facts.hierarchies, manager.runtime
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        options = ["name=seccomp,profile=builtin"] if manager.facts.seccomp else []
        options += ["name=apparmor"] if manager.facts.apparmor else []
        options += ["name=userns"] if manager.facts.idmap is not None else []
        has = hierarchies.has
        v2 = hierarchies.layout is Layout.V2
        return json_response(
            {
                "ID": self._daemon_id,
                "Containers": len(containers),
                "ContainersRunning": states.count(Status.RUNNING),
                "ContainersPaused": states.count(Status.PAUSED),
                "ContainersStopped": len(
                    [s for s in states if s not in (Status.RUNNING, Status.PAUSED)]
                ),
                "Images": len(self._images.all()),
                "Driver": manager.layers.capabilities.name,
                "DriverStatus": self.driver_status,
                "Plugins": {
                    "Volume": sorted({"local", *self._volumes.drivers}),
                    "Network": ["bridge", "host", "macvlan", "null", "overlay"],
                    "Authorization": None,
                    "Log": ["json-file", "local", "none"],
                },
                "MemoryLimit": has("memory"),
                "SwapLimit": has("memory"),
                "CpuCfsPeriod": has("cpu"),
                "CpuCfsQuota": has("cpu"),
                "CPUShares": has("cpu"),
                "CPUSet": has("cpuset"),
                "PidsLimit": has("pids"),
                "OomKillDisable": not v2 and has("memory"),
                "IPv4Forwarding": True,
                "BridgeNfIptables": False,
                "BridgeNfIp6tables": False,
                "Debug": False,
                "NFd": len(os.listdir("/proc/self/fd")),
                "NGoroutines": len(asyncio.all_tasks()),
                "SystemTime": rfc3339(manager.clock.now_ns()),
                "LoggingDriver": "json-file",
                "CgroupDriver": "cgroupfs",
                "CgroupVersion": "2" if v2 else "1",
                "NEventsListener": 0,
                "KernelVersion": os.uname().release,
                "OperatingSystem": _operating_system(),
                "OSVersion": "",
                "OSType": "linux",
                "Architecture": platform.machine(),
                "IndexServerAddress": "https://index.docker.io/v1/",
                "RegistryConfig": _registries(manager),
                "NCPU": os.cpu_count() or 1,
                "MemTotal": memory,
                "GenericResources": None,
                "DockerRootDir": str(manager.config.data_root),
                "HttpProxy": "",
                "HttpsProxy": "",
                "NoProxy": "",
                "Name": os.uname().nodename,
                "Labels": list(manager.config.labels),
                "ExperimentalBuild": True,
                "ServerVersion": VERSION,
                "Runtimes": {
                    "runc": {"path": runtime.program},
                    runtime.name: {"path": runtime.program},
                },
                "DefaultRuntime": "runc",
                "Swarm": {
                    "NodeID": "",
                    "NodeAddr": "",
                    "LocalNodeState": "inactive",
                    "ControlAvailable": False,
                    "Error": "",
                    "RemoteManagers": None,
                },
                "LiveRestoreEnabled": True,
                "Isolation": "",
                "InitBinary": "" if manager.facts.init is None else str(manager.facts.init),
                "ContainerdCommit": {"ID": "", "Expected": ""},
                "RuncCommit": {"ID": f"{runtime.name} {runtime.version}", "Expected": ""},
                "InitCommit": {"ID": "", "Expected": ""},
                "SecurityOptions": options,
                "CDISpecDirs": [],
                "FirewallBackend": {"Driver": "nftables"},
                "Warnings": [
                    f"OCI runtime: {runtime.reason}",
                    *await asyncio.to_thread(self._networks.warnings),
                ],
            }
        )

    # ---- events

    async def events(self, call: Call) -> web.StreamResponse:
        """``GET /events``."""
        now = self._manager.clock.now_ns()
        since = parse_instant(call.text("since"), now)
        until = parse_instant(call.text("until"), now)
        filters = call.filters(_EVENT_FILTERS)
        with self._manager.events.subscribe() as (past, queue):
            response = await stream(call)
            if since:
                for event in past:
                    if event.time_ns >= since and (not until or event.time_ns <= until):
                        await self._send(call, response, event, filters)
            await while_connected(call, self._follow(call, response, queue, until, filters))
        await response.write_eof()
        return response

    async def _follow(
        self,
        call: Call,
        response: web.StreamResponse,
        queue: asyncio.Queue[Event],
        until: int,
        filters: Mapping[str, Sequence[str]],
    ) -> None:
        while True:
            left = None
            if until:
                left = (until - self._manager.clock.now_ns()) / NANOSECONDS
                if left <= 0 and queue.empty():
                    return
            try:
                async with asyncio.timeout(left):
                    event = await queue.get()
            except TimeoutError:
                return
            if until and event.time_ns > until:
                return
            await self._send(call, response, event, filters)

    async def _send(
        self,
        call: Call,
        response: web.StreamResponse,
        event: Event,
        filters: Mapping[str, Sequence[str]],
    ) -> None:
        made = event.type == "image" and event.action == "create"
        if self._passes(event, filters) and (call.version >= (1, 46) or not made):
            line = msgspec.json.encode(rendered_event(event, call.version)) + b"\n"
            await response.write(line)

    def _passes(self, event: Event, filters: Mapping[str, Sequence[str]]) -> bool:
        for key, values in filters.items():
            if not values:
                continue
            if key == "event":
                verbs = {event.action, event.action.split(":")[0]}
                if not verbs & set(values):
                    return False
            elif key == "type":
                if event.type not in values:
                    return False
            elif key == "label":
                if not has_labels(event.attributes, values):
                    return False
            elif key == "scope":
                if "local" not in values:
                    return False
            elif key == "container":
                if event.type != "container" or not self._is_container(event, values):
                    return False
            elif not _names_object(event, key, values):
                return False
        return True

    def _is_container(self, event: Event, values: Sequence[str]) -> bool:
        name = event.attributes.get("name", "")
        return any(
            value.removeprefix("/") == name or event.id.startswith(value) for value in values
        )

    # ---- disk usage

    async def disk_usage(self, call: Call) -> web.StreamResponse:
        """``GET /system/df``."""
        types = call.texts("type") or list(_DF_TYPES)
        for wanted in types:
            if wanted not in _DF_TYPES:
                raise InvalidArgument(f"unknown object type: {wanted}")
        return json_response(await asyncio.to_thread(self._usage, types, call.version))

    def _usage(self, types: Sequence[str], version: tuple[int, int]) -> dict[str, object]:
        made: dict[str, object] = {}
        containers = self._manager.all()
        if "image" in types:
            uses: dict[str, int] = {}
            for one in containers:
                image_id = one.definition.image_id
                uses[image_id] = uses.get(image_id, 0) + 1
            made["LayersSize"] = self._layers_size()
            made["Images"] = [
                {
                    "Id": image.id,
                    "ParentId": image.parent,
                    "RepoTags": list(image.tags),
                    "RepoDigests": list(image.digests),
                    "Created": image.created_ns // NANOSECONDS,
                    "Size": image.size,
                    **({"VirtualSize": image.size} if version < (1, 44) else {}),
                    "SharedSize": 0,
                    "Labels": image.labels or None,
                    "Containers": uses.get(image.id, 0),
                }
                for image in self._images.all()
            ]
        if "container" in types:
            now = self._manager.clock.now_ns()
            made["Containers"] = [self._container(one, now) for one in containers]
        if "volume" in types:
            made["Volumes"] = [self._volume(volume.name) for volume in self._volumes.list()]
        if "build-cache" in types:
            made["BuildCache"] = self.build_cache()
        made["BuilderSize"] = 0
        return made

    def _container(self, container: Container, now: int) -> dict[str, object]:
        try:
            return self._manager.inspector.entry(container, now, True)
        except LazaretteError:
            return self._manager.inspector.entry(container, now)

    def _layers_size(self) -> int:
        return sum(layer.size for layer in self._images.layers.all())

    def _volume(self, name: str) -> dict[str, object]:
        volume = self._volumes.get(name)
        return {
            "Name": volume.name,
            "Driver": self._volumes.shown(volume.driver),
            "Mountpoint": str(volume.mountpoint),
            "CreatedAt": rfc3339(volume.created_ns),
            "Labels": dict(volume.labels) or None,
            "Options": dict(volume.options) or None,
            "Scope": "local",
            "UsageData": {
                "Size": self._volumes.usage(name).referenced,
                "RefCount": len(self._manager.using_volume(name)),
            },
        }


def _names_object(event: Event, key: str, values: Sequence[str]) -> bool:
    if event.type != key:
        return False
    name = event.attributes.get("name", "")
    return any(
        value in (event.id, name) or (key == "image" and _untagged(name) == _untagged(value))
        for value in values
    )


def _untagged(name: str) -> str:
    """An image's name without its tag; an id is no name with a tag."""
    path, slash, last = name.rpartition("/")
    if last.startswith("sha256:"):
        return name
    return path + slash + last.partition(":")[0]


def rendered_event(event: Event, version: tuple[int, int]) -> dict[str, object]:
    """An event as the Engine shows it, with the old fields below 1.52."""
    made: dict[str, object] = {}
    if event.type in ("container", "image") and version < (1, 52):
        made = {"status": event.action, "id": event.id}
        if event.type == "container":
            made["from"] = event.attributes.get("image", "")
    return made | {
        "Type": event.type,
        "Action": event.action,
        "Actor": {"ID": event.id, "Attributes": event.attributes},
        "scope": "local",
        "time": event.time_ns // NANOSECONDS,
        "timeNano": event.time_ns,
    }


def _architecture() -> str:
    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _operating_system() -> str:
    try:
        for line in Path("/etc/os-release").read_text().splitlines():
            if line.startswith("PRETTY_NAME="):
                return line.partition("=")[2].strip('"')
    except OSError:
        return "linux"
    return "linux"


def _registries(manager: ContainerManager) -> dict[str, object]:
    config = manager.config
    ranges = [name for name in config.insecure_registries if "/" in name]
    names = [name for name in config.insecure_registries if "/" not in name]
    index = {"Name": "docker.io", "Mirrors": list(config.registry_mirrors), "Secure": True}
    insecure = {
        name: {"Name": name, "Mirrors": [], "Secure": False, "Official": False} for name in names
    }
    return {
        "AllowNondistributableArtifactsCIDRs": None,
        "AllowNondistributableArtifactsHostnames": None,
        "InsecureRegistryCIDRs": ranges,
        "IndexConfigs": {"docker.io": index | {"Official": True}, **insecure},
        "Mirrors": list(config.registry_mirrors) or None,
    }

"""A container as the Engine shows it: ``inspect`` and the entries of ``ps``."""

from __future__ import annotations

from pathlib import Path

from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.model import EndpointSettings
from lazarette.runtime.containers.record import Health, MountPoint, Status
from lazarette.runtime.networks.manager import NetworkManager
from lazarette.runtime.networks.model import Endpoint, PortBinding
from lazarette.storage.clock import NANOSECONDS, rfc3339
from lazarette.storage.errors import VolumeNotFound
from lazarette.storage.layers.contract import LayerDriver
from lazarette.storage.volumes.manager import VolumeManager

Json = dict[str, object]


class Inspector:
    """Renders containers.

    Args:
        networks: for live addresses and ports.
        volumes: for where volumes are.
        layers: for sizes.
        sandboxes: folder of the network namespaces.
    """

    def __init__(
        self,
        networks: NetworkManager,
        volumes: VolumeManager,
        layers: LayerDriver,
        sandboxes: Path,
    ) -> None:
        self._sandboxes = sandboxes
        self._networks = networks
        self._volumes = volumes
        self._layers = layers

    def inspect(
        self, container: Container, size: bool = False, version: tuple[int, int] = (1, 50)
    ) -> Json:
        """The answer of ``GET /containers/{id}/json``."""
        definition, state = container.definition, container.state
        command = definition.command
        made: Json = {
            "Id": definition.id,
            "Created": rfc3339(definition.created_ns),
            "Path": command[0] if command else "",
            "Args": command[1:],
            "State": self.state(container),
            "Image": definition.image_id,
            "ResolvConfPath": str(container.data / "resolv.conf"),
            "HostnamePath": str(container.data / "hostname"),
            "HostsPath": str(container.data / "hosts"),
            "LogPath": (
                str(container.log_path) if definition.host.log_config.type == "json-file" else ""
            ),
            "Name": f"/{definition.name}",
            "RestartCount": state.restart_count,
            "Driver": self._layers.capabilities.name,
            "Platform": definition.platform,
            "MountLabel": "",
            "ProcessLabel": "",
            "AppArmorProfile": "",
            "ExecIDs": [s.id for s in container.sessions.values() if s.running] or None,
            "HostConfig": definition.host,
            "GraphDriver": {"Data": None, "Name": self._layers.capabilities.name},
            "Mounts": self.mounts(container),
            "Config": definition.config,
            "NetworkSettings": self.network_settings(container, version),
        }
        if size:
            made["SizeRw"], made["SizeRootFs"] = self.sizes(container)
        return made

    @staticmethod
    def state(container: Container) -> Json:
        """``State``."""
        state = container.state
        made: Json = {
            "Status": state.status.value,
            "Running": state.running or state.status is Status.RESTARTING,
            "Paused": state.status is Status.PAUSED,
            "Restarting": state.status is Status.RESTARTING,
            "OOMKilled": state.oom_killed,
            "Dead": state.status is Status.DEAD,
            "Pid": state.pid,
            "ExitCode": state.exit_code,
            "Error": state.error,
            "StartedAt": rfc3339(state.started_ns),
            "FinishedAt": rfc3339(state.finished_ns),
        }
        if state.health is not None:
            made["Health"] = health(state.health)
        return made

    def sizes(self, container: Container) -> tuple[int, int]:
        """Bytes of the writable layer, and of it with all below."""
        own = self._layers.usage(container.definition.layer).bytes
        below = 0
        layer = container.definition.image_layer
        if layer is not None and self._layers.exists(layer):
            below = self._layers.usage(layer).bytes
        return own, own + below

    def mounts(self, container: Container) -> list[Json]:
        """``Mounts``, without tmpfs mounts that were not asked for through ``Mounts``."""
        return [
            self._mount(point)
            for point in container.definition.mounts
            if point.type != "tmpfs" or point.from_mounts
        ]

    def _mount(self, point: MountPoint) -> Json:
        made: Json = {"Type": point.type}
        if point.type == "volume":
            made["Name"] = point.name
            made["Source"] = self._volume_path(point.name)
            made["Driver"] = self._volumes.shown(point.driver)
        else:
            made["Source"] = point.source
        made |= {
            "Destination": point.destination,
            "Mode": point.mode or ("z" if point.type == "volume" and point.from_mounts else ""),
            "RW": point.rw,
            "Propagation": point.propagation,
        }
        return made

    def _volume_path(self, name: str) -> str:
        try:
            return str(self._volumes.get(name).mountpoint)
        except VolumeNotFound:
            return ""

    # ---- network

    def network_settings(self, container: Container, version: tuple[int, int]) -> Json:
        """``NetworkSettings``, with the fields of the default bridge repeated on top."""
        live = {e.network_name: e for e in self._networks.of_container(container.id)}
        endpoints = {
            name: endpoint_settings(container, name, settings, live.get(name), version)
            for name, settings in container.definition.endpoints.items()
        }
        mode = container.definition.host.network_mode
        if mode in ("host", "none"):
            endpoints[mode] = endpoint_settings(container, mode, EndpointSettings(), None)
        bridge = endpoints.get("bridge", {})
        sandbox = container.id if live else ""
        return {
            "Bridge": "",
            "SandboxID": sandbox,
            "SandboxKey": str(self._sandboxes / container.id) if sandbox else "",
            "Ports": self.ports(container),
            "HairpinMode": False,
            "LinkLocalIPv6Address": "",
            "LinkLocalIPv6PrefixLen": 0,
            "SecondaryIPAddresses": None,
            "SecondaryIPv6Addresses": None,
            "EndpointID": bridge.get("EndpointID", ""),
            "Gateway": bridge.get("Gateway", ""),
            "GlobalIPv6Address": bridge.get("GlobalIPv6Address", ""),
            "GlobalIPv6PrefixLen": bridge.get("GlobalIPv6PrefixLen", 0),
            "IPAddress": bridge.get("IPAddress", ""),
            "IPPrefixLen": bridge.get("IPPrefixLen", 0),
            "IPv6Gateway": bridge.get("IPv6Gateway", ""),
            "MacAddress": bridge.get("MacAddress", ""),
            "Networks": endpoints,
        }

    def ports(self, container: Container) -> dict[str, list[Json] | None]:
        """Exposed ports of a running container and where they are published."""
        if not container.state.running:
            return {}
        exposed = container.definition.config.exposed_ports
        made: dict[str, list[Json] | None] = {}
        for port in exposed if isinstance(exposed, dict) else {}:
            if "-" not in port:
                made[port] = None
        for binding in self._networks.published(container.id):
            entry: Json = {"HostIp": binding.host_ip, "HostPort": str(binding.host_port)}
            key = f"{binding.container_port}/{binding.proto}"
            made[key] = [*(made.get(key) or []), entry]
        return made

    # ---- ps

    def entry(self, container: Container, now_ns: int, size: bool = False) -> Json:
        """One entry of ``GET /containers/json``."""
        definition = container.definition
        networks = {
            name: endpoint_settings(container, name, settings, live)
            for name, settings, live in self._live(container)
        }
        image = definition.image_ref
        made: Json = {
            "Id": definition.id,
            "Names": [f"/{definition.name}"],
            "Image": image,
            "ImageID": definition.image_id,
            "Command": " ".join(_quoted(word) for word in definition.command),
            "Created": definition.created_ns // NANOSECONDS,
            "Ports": self._port_entries(container),
            "Labels": definition.config.labels,
            "State": container.state.status.value,
            "Status": status_text(container, now_ns),
            "HostConfig": {"NetworkMode": definition.host.network_mode},
            "NetworkSettings": {"Networks": networks},
            "Mounts": self.mounts(container),
        }
        if isinstance(definition.host.annotations, dict):
            made["HostConfig"] = {
                "NetworkMode": definition.host.network_mode,
                "Annotations": definition.host.annotations,
            }
        if size:
            made["SizeRw"], made["SizeRootFs"] = self.sizes(container)
        return made

    def _live(self, container: Container) -> list[tuple[str, EndpointSettings, Endpoint | None]]:
        live = {e.network_name: e for e in self._networks.of_container(container.id)}
        return [
            (name, settings, live.get(name))
            for name, settings in container.definition.endpoints.items()
        ]

    def _port_entries(self, container: Container) -> list[Json]:
        if not container.state.running:
            return []
        published = self._networks.published(container.id)
        seen = {(b.container_port, b.proto) for b in published}
        made = [_published(binding) for binding in published]
        exposed = container.definition.config.exposed_ports
        for port in exposed if isinstance(exposed, dict) else {}:
            number, _, proto = port.partition("/")
            if number.isdecimal() and (int(number), proto) not in seen:
                made.append({"PrivatePort": int(number), "Type": proto})
        return made


def _published(binding: PortBinding) -> Json:
    return {
        "IP": binding.host_ip,
        "PrivatePort": binding.container_port,
        "PublicPort": binding.host_port,
        "Type": binding.proto,
    }


def _quoted(word: str) -> str:
    if " " in word or not word:
        return "'" + word.replace("'", "'\\''") + "'"
    return word


def endpoint_settings(
    container: Container,
    network: str,
    asked: EndpointSettings,
    live: Endpoint | None,
    version: tuple[int, int] = (1, 50),
) -> Json:
    """An entry of ``Networks``: what was asked for and what it got.

    Below 1.45 the short id is one of the aliases.
    """
    predefined = network in ("bridge", "host", "none")
    names = list(live.dns_names) if live is not None and not predefined else None
    aliases = asked.aliases
    if not predefined and version < (1, 45):
        aliases = [*(aliases or []), container.definition.short_id]
    return {
        "IPAMConfig": asked.ipam_config,
        "Links": asked.links,
        "Aliases": aliases,
        "MacAddress": live.mac if live else asked.mac_address,
        "DriverOpts": asked.driver_opts,
        "GwPriority": asked.gw_priority,
        "NetworkID": live.network if live else asked.network_id,
        "EndpointID": live.id if live else "",
        "Gateway": live.gateway if live else "",
        "IPAddress": live.ip if live else "",
        "IPPrefixLen": live.prefix if live else 0,
        "IPv6Gateway": live.ipv6_gateway if live else "",
        "GlobalIPv6Address": live.ipv6 if live else "",
        "GlobalIPv6PrefixLen": live.ipv6_prefix if live else 0,
        "DNSNames": names,
    }


def health(found: Health) -> Json:
    """``State.Health``."""
    return {
        "Status": found.status,
        "FailingStreak": found.failing_streak,
        "Log": [
            {
                "Start": rfc3339(probe.start_ns),
                "End": rfc3339(probe.end_ns),
                "ExitCode": probe.exit_code,
                "Output": probe.output,
            }
            for probe in found.log
        ],
    }


def status_text(container: Container, now_ns: int) -> str:
    """``Up 5 minutes (healthy)`` and the like."""
    state = container.state
    if state.running:
        text = f"Up {duration_text(now_ns - state.started_ns)}"
        if state.status is Status.PAUSED:
            return f"{text} (Paused)"
        if state.health is not None:
            shown = state.health.status
            return f"{text} ({'health: starting' if shown == 'starting' else shown})"
        return text
    since = duration_text(now_ns - state.finished_ns)
    if state.status is Status.RESTARTING:
        return f"Restarting ({state.exit_code}) {since} ago"
    if state.status is Status.REMOVING:
        return "Removal In Progress"
    if state.status is Status.DEAD:
        return "Dead"
    if state.status is Status.CREATED or not state.finished_ns:
        return "Created"
    return f"Exited ({state.exit_code}) {since} ago"


def duration_text(ns: int) -> str:
    """A duration as Docker tells it: ``About a minute``, ``5 hours``, ``2 weeks``."""
    seconds = max(0, ns) // NANOSECONDS
    if seconds < 1:
        return "Less than a second"
    if seconds == 1:
        return "1 second"
    if seconds < 60:
        return f"{seconds} seconds"
    minutes = seconds // 60
    if minutes == 1:
        return "About a minute"
    if minutes < 60:
        return f"{minutes} minutes"
    hours = round(seconds / 3600)
    if hours == 1:
        return "About an hour"
    if hours < 48:
        return f"{hours} hours"
    if hours < 24 * 7 * 2:
        return f"{hours // 24} days"
    if hours < 24 * 30 * 2:
        return f"{hours // 24 // 7} weeks"
    if hours < 24 * 365 * 2:
        return f"{hours // 24 // 30} months"
    return f"{hours // 24 // 365} years"

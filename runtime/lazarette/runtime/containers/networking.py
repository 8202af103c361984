"""A container's network as its own part sees it: sandbox, endpoints, ports, name files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lazarette.runtime.containers.container import Container
from lazarette.runtime.containers.model import EndpointSettings, IpamConfig
from lazarette.runtime.networks import resolvconf
from lazarette.runtime.networks.manager import NetworkManager
from lazarette.runtime.networks.model import EndpointRequest, PortRequest
from lazarette.storage.errors import InvalidArgument, NotFound

JOIN = "container:"
Linked = Sequence[tuple[Container, str]]
HOST_GATEWAY = "host-gateway"


class Networking:
    """Makes and unmakes the network part of runs.

    Args:
        networks: all networks of the host.
    """

    def __init__(self, networks: NetworkManager) -> None:
        self.networks = networks

    def connect(self, container: Container, new: Path | None = None) -> Path | None:
        """Make the sandbox of a run with its endpoints and published ports.

        Args:
            container: whose.
            new: a new network namespace to take; None makes one.

        Returns:
            Where the namespace is bound; None for the host's and for another container's.

        Raises:
            NetworkNotFound: a network it is on does not exist.
            PortAllocated: a host port is taken.
        """
        mode = container.definition.host.network_mode
        if mode == "host" or mode.startswith(JOIN):
            return None
        path = self.networks.create_sandbox(container.id, new)
        requests = [
            endpoint_request(container, name, settings)
            for name, settings in container.definition.endpoints.items()
        ]
        if requests:
            self.networks.attach(container.id, requests)
            self.networks.publish(container.id, port_requests(container))
        return path

    def disconnect(self, container: Container) -> None:
        """Undo :meth:`connect`; idempotent."""
        mode = container.definition.host.network_mode
        if mode != "host" and not mode.startswith(JOIN):
            self.networks.teardown(container.id)

    def address(self, container: Container) -> str:
        """A container's first address, empty when it is on no network now."""
        return next((e.ip for e in self.networks.of_container(container.id) if e.ip), "")

    def files(
        self,
        container: Container,
        hostname: str,
        joined: Container | None,
        linked: Linked,
    ) -> dict[str, Path]:
        """Write ``hosts``, ``hostname`` and ``resolv.conf``; by path in the container.

        Args:
            container: whose.
            hostname: its name.
            joined: the container whose network it shares, and so its files.
            linked: other containers by the alias it knows them by.
        """
        if joined is not None:
            folder = joined.data
        else:
            folder = container.data
            (folder / "hostname").write_text(hostname + "\n")
            self.write_names(container, hostname, linked)
        made = {f"/etc/{name}": folder / name for name in ("hosts", "hostname", "resolv.conf")}
        found = {target: source for target, source in made.items() if source.exists()}
        if joined is None:
            for source in found.values():
                os.chown(source, *container.owner)
        return found

    def write_names(self, container: Container, hostname: str, linked: Linked) -> None:
        """Write ``hosts`` and ``resolv.conf`` for the networks it is on now.

        The files are written in place: they are bind mounted into a running container.
        """
        host = container.definition.host
        if host.network_mode == "host":
            hosts = _read(Path("/etc/hosts")) + "".join(
                f"{address}\t{names}\n" for address, names in self._extra(container)
            )
            (container.data / "hosts").write_text(hosts)
        else:
            domain = container.definition.config.domainname
            names = f"{hostname}.{domain} {hostname}" if domain else hostname
            entries = self.networks.hosts_entries(container.id, names)
            for other, alias in linked:
                if address := self.address(other):
                    known = dict.fromkeys((alias, other.definition.short_id, other.name))
                    entries.append((address, " ".join(known)))
            (container.data / "hosts").write_bytes(
                resolvconf.hosts([*self._extra(container), *entries])
            )
        resolver = self.networks.resolv_conf(
            container.id, host.dns or (), host.dns_search or (), host.dns_options or ()
        )
        (container.data / "resolv.conf").write_bytes(resolver)

    def _extra(self, container: Container) -> list[tuple[str, str]]:
        made = []
        for entry in container.definition.host.extra_hosts or []:
            separator = "=" if "=" in entry and ":" not in entry.partition("=")[0] else ":"
            name, _, address = entry.partition(separator)
            if address == HOST_GATEWAY:
                address = self._gateway()
            made.append((address.strip("[]"), name))
        return made

    def _gateway(self) -> str:
        pools = self.networks.inspect("bridge").spec.pools
        return next((pool.gateway for pool in pools if pool.gateway), "127.0.0.1")

    def known_name(self, reference: str) -> tuple[str, str]:
        """Name and id of a network; the reference itself and no id when there is none."""
        try:
            network = self.networks.inspect(reference)
        except NotFound:
            return reference, ""
        return network.name, network.id


def endpoint_request(
    container: Container, network: str, settings: EndpointSettings
) -> EndpointRequest:
    """What a container wants of one of its networks."""
    ipam = settings.ipam_config or IpamConfig()
    config = container.definition.config
    mac = settings.mac_address
    if not mac and isinstance(config.mac_address, str):
        mode = container.definition.host.network_mode
        mac = config.mac_address if network == mode else ""
    return EndpointRequest(
        network=settings.network_id or network,
        name=container.name,
        hostname=config.hostname,
        aliases=tuple(settings.aliases or ()),
        links=tuple(settings.links or ()),
        ipv4=ipam.ipv4_address,
        ipv6=ipam.ipv6_address,
        mac=mac,
        link_local=tuple(ipam.link_local_ips or ()),
        driver_opts=settings.driver_opts or {},
        gateway_priority=settings.gw_priority,
    )


def settings_of(request: EndpointRequest, network_id: str) -> EndpointSettings:
    """An endpoint request as it is remembered and shown."""
    ipam = None
    if request.ipv4 or request.ipv6 or request.link_local:
        ipam = IpamConfig(
            ipv4_address=request.ipv4,
            ipv6_address=request.ipv6,
            link_local_ips=list(request.link_local) or None,
        )
    return EndpointSettings(
        ipam_config=ipam,
        links=list(request.links) or None,
        aliases=list(request.aliases) or None,
        mac_address=request.mac,
        driver_opts=dict(request.driver_opts) or None,
        gw_priority=request.gateway_priority,
        network_id=network_id,
    )


def port_requests(container: Container) -> list[PortRequest]:
    """The ports a container publishes, ``--publish-all`` included."""
    host = container.definition.host
    bound = host.port_bindings or {}
    made = []
    for port, bindings in bound.items():
        number, _, proto = port.partition("/")
        for binding in bindings or []:
            first, last = _range(str(binding.host_port))
            made.append(
                PortRequest(
                    container_port=int(number),
                    proto=proto or "tcp",
                    host_ip=binding.host_ip,
                    host_port=first,
                    host_port_end=last,
                )
            )
    if host.publish_all_ports:
        exposed = container.definition.config.exposed_ports
        for port in exposed if isinstance(exposed, dict) else {}:
            number, _, proto = port.partition("/")
            first, last = _range(number)
            for each in range(first, (last or first) + 1):
                if f"{each}/{proto}" not in bound:
                    made.append(PortRequest(container_port=each, proto=proto or "tcp"))
    return made


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        return int(first or 0), int(last or 0)
    except ValueError as bad:
        raise InvalidArgument(f"invalid port specification: '{text}'") from bad


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return f"127.0.0.1\tlocalhost {os.uname().nodename}\n"

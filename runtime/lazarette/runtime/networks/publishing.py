"""Published ports of sandboxes: held on the host, translated by the firewall, and what it
cannot translate carried by hand.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Collection, Sequence

import msgspec

from lazarette.runtime.networks.carrier import Carrier
from lazarette.runtime.networks.firewall import Firewall, Forward, Opening, Published
from lazarette.runtime.networks.model import Endpoint, PortBinding, PortRequest, parse_ip
from lazarette.runtime.networks.netlink import NetlinkError
from lazarette.runtime.networks.ports import ANY4, ANY6, HeldPort, HostPorts
from lazarette.runtime.networks.records import LiveRecords
from lazarette.runtime.networks.sandbox import Sandbox


class Publisher:
    """Sends host ports to sandboxes.

    Args:
        firewall: the table.
        ports: the host's ports.
        carrier: for what the table does not translate.
        live: where bindings are recorded.
        expose: tells the driver of an endpoint that is about to get ports.
    """

    def __init__(
        self,
        firewall: Firewall,
        ports: HostPorts,
        carrier: Carrier,
        live: LiveRecords,
        expose: Callable[[Endpoint], None],
    ) -> None:
        self._firewall = firewall
        self._ports = ports
        self._carrier = carrier
        self._live = live
        self._expose = expose
        self.rules = threading.Lock()
        """Held while the table or what is known of its elements changes."""

    def publish(
        self,
        sandbox: Sandbox,
        requests: Sequence[PortRequest],
        routed: Collection[int] = (),
    ) -> list[PortBinding]:
        """Send host ports to a sandbox, all or none; replaces what it had.

        Args:
            sandbox: whose.
            requests: the ports.
            routed: IP versions for which no host port is taken: the container's own is opened.

        Raises:
            PortAllocated: one is held by somebody; nothing is left behind.
        """
        self.unpublish(sandbox)
        endpoint = sandbox.way_out()
        if endpoint is None or not requests:
            return []
        translated, opened = _divided(requests, routed)
        held = self._ports.reserve(translated) + [HeldPort(each, None) for each in opened]
        bindings = [each.binding for each in held]
        forwards = _forwards(endpoint, bindings)
        try:
            self._live.save_ports(sandbox.container, bindings)
            self._expose(endpoint)
            with self.rules:
                self._add(forwards)
                sandbox.held, sandbox.forwards = held, forwards
            for each in held:
                self._carry(sandbox, each)
        except BaseException:
            self.unpublish(sandbox)
            self._live.save_ports(sandbox.container, [])
            self._ports.release(held)
            raise
        return [each for each in bindings if each.host_port]

    def unpublish(self, sandbox: Sandbox) -> None:
        """Take a sandbox's ports back; none is fine."""
        if not (sandbox.held or sandbox.forwards):
            return
        for each in sandbox.held:
            self._carrier.stop(each)
        with self.rules:
            self._firewall.withdraw(sandbox.forwards)
            held, sandbox.held, sandbox.forwards = sandbox.held, [], []
        self._ports.release(held)
        self._live.save_ports(sandbox.container, [])

    def let_go(self, sandbox: Sandbox) -> None:
        """The daemon ends: stop carrying by hand; the table goes on."""
        for each in sandbox.held:
            self._carrier.stop(each)

    def recover(self, sandbox: Sandbox, bindings: Sequence[PortBinding]) -> None:
        """Hold the ports a record speaks of; the table is rebuilt later, as a whole."""
        sandbox.held = self._ports.hold_again(bindings)
        endpoint = sandbox.way_out()
        sandbox.forwards = _forwards(endpoint, bindings) if endpoint else []
        for each in sandbox.held:
            self._carry(sandbox, each)

    def retarget(self, sandbox: Sandbox) -> None:
        """The way out may have changed: send the ports to the right address."""
        endpoint = sandbox.way_out()
        with self.rules:
            old = sandbox.forwards
            new = _forwards(endpoint, [each.binding for each in sandbox.held]) if endpoint else []
            if old == new:
                return
            sandbox.forwards = new
            self._firewall.withdraw(old)
            if endpoint is not None:
                self._expose(endpoint)
            self._add(new)

    def _add(self, forwards: Sequence[Published]) -> None:
        """Add elements; a table that was flushed is put back with them soon."""
        try:
            self._firewall.add(forwards)
        except NetlinkError as error:
            if error.errno != errno.ENOENT:
                raise

    def _carry(self, sandbox: Sandbox, held: HeldPort) -> None:
        port = held.binding.container_port
        if not held.binding.host_port:
            return

        def target() -> tuple[str, int] | None:
            endpoint = sandbox.way_out()
            if endpoint is None:
                return None
            return (endpoint.ip or endpoint.ipv6, port)

        self._carrier.start(held, target)


def _divided(
    requests: Sequence[PortRequest], routed: Collection[int]
) -> tuple[list[PortRequest], list[PortBinding]]:
    """What takes a host port, and what is opened at the container's own address."""
    translated: list[PortRequest] = []
    opened: list[PortBinding] = []
    for request in requests:
        any_ = {4: ANY4, 6: ANY6}
        versions = (parse_ip(request.host_ip).version,) if request.host_ip else (4, 6)
        left = [version for version in versions if version not in routed]
        if len(left) == len(versions):
            translated.append(request)
        elif left:
            translated.append(msgspec.structs.replace(request, host_ip=any_[left[0]]))
        opened += [
            PortBinding(
                container_port=request.container_port,
                proto=request.proto,
                host_ip=any_[version],
                host_port=0,
            )
            for version in versions
            if version in routed
        ]
    return translated, opened


def _forwards(endpoint: Endpoint, bindings: Sequence[PortBinding]) -> list[Published]:
    """What the table can do for bindings: each family to its own, and not ``::1``, which
    the kernel lets nothing leave from.
    """
    forwards: list[Published] = []
    for binding in bindings:
        target = endpoint.ipv6 if ":" in binding.host_ip else endpoint.ip
        if target and not binding.host_port:
            forwards.append(Opening(binding.proto, target, binding.container_port))
        elif target and binding.host_ip != "::1":
            forwards.append(
                Forward(
                    proto=binding.proto,
                    host_ip="" if binding.host_ip in (ANY4, ANY6) else binding.host_ip,
                    host_port=binding.host_port,
                    target=target,
                    target_port=binding.container_port,
                )
            )
    return list(dict.fromkeys(forwards))  # two may open one port

"""Host ports: who holds which, and held for real.

A published port is bound with a socket of ours, so that no other program, no other
daemon and no second container gets it, whatever any table says (case A31).  The sockets
of TCP listen and those of UDP receive: what the firewall does not translate (``::1``, an
address family the container lacks) arrives there and is carried by hand.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lazarette.runtime.networks.model import (
    PortAllocated,
    PortBinding,
    PortRequest,
    parse_ip,
)
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.errors import InvalidArgument

ANY4, ANY6 = "0.0.0.0", "::"


@dataclass(frozen=True)
class HeldPort:
    """A binding with the socket that keeps it; none where the kernel has no such socket."""

    binding: PortBinding
    socket: socket.socket | None

    def release(self) -> None:
        """Let others have it."""
        if self.socket is not None:
            self.socket.close()


class HostPorts:
    """The ports of one network namespace, by convention the host's.

    Args:
        namespace: where sockets are bound.
    """

    def __init__(self, namespace: NetNamespace) -> None:
        self._namespace = namespace
        self._lock = threading.Lock()
        self._held: dict[tuple[str, str, int], HeldPort] = {}
        self._next = 0

    def reserve(self, requests: Sequence[PortRequest]) -> list[HeldPort]:
        """Hold a host port for each request, all or none.

        Fixed ports go before chosen ones, so that none of them is taken by the latter.

        Raises:
            PortAllocated: one is held by somebody.
            InvalidArgument: a request makes no sense.
        """
        order = sorted(range(len(requests)), key=lambda n: _freedom(requests[n]))
        held: dict[int, list[HeldPort]] = {}
        with self._lock, self._namespace.entered():
            try:
                for place in order:
                    held[place] = self._reserve(requests[place])
            except BaseException:
                for each in held.values():
                    self._release(each)
                raise
        return [each for place in range(len(requests)) for each in held[place]]

    def hold_again(self, bindings: Sequence[PortBinding]) -> list[HeldPort]:
        """Hold ports a record speaks of; one that is gone meanwhile has no socket."""
        again = []
        with self._lock, self._namespace.entered():
            for binding in bindings:
                if not binding.host_port:
                    again.append(HeldPort(binding, None))
                    continue
                try:
                    held = _bind(binding)
                except PortAllocated:
                    held = HeldPort(binding, None)
                self._held[_key(binding)] = held
                again.append(held)
        return again

    def release(self, held: Sequence[HeldPort]) -> None:
        """Give ports back."""
        with self._lock:
            self._release(held)

    def close(self) -> None:
        """Give all back."""
        with self._lock:
            self._release(list(self._held.values()))

    def _release(self, held: Sequence[HeldPort]) -> None:
        for each in held:
            each.release()
            self._held.pop(_key(each.binding), None)

    def _reserve(self, request: PortRequest) -> list[HeldPort]:
        addresses = [request.host_ip] if request.host_ip else [ANY4, ANY6]
        for address in addresses:
            parse_ip(address)
        if request.proto not in ("tcp", "udp", "sctp"):
            raise InvalidArgument(f"invalid protocol {request.proto} of a port")
        refusal = PortAllocated(
            f"Bind for {addresses[0]}:{request.host_port} failed: all ports are allocated",
        )
        for port in self._candidates(request):
            try:
                return self._hold(request, addresses, port)
            except PortAllocated as taken:
                refusal = taken
        raise refusal

    def _hold(self, request: PortRequest, addresses: Sequence[str], port: int) -> list[HeldPort]:
        held: list[HeldPort] = []
        try:
            for address in addresses:
                binding = PortBinding(
                    container_port=request.container_port,
                    proto=request.proto,
                    host_ip=address,
                    host_port=port,
                )
                self._check(binding)
                try:
                    each = _bind(binding)
                except OSError as error:
                    no_family = error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
                    if no_family and len(addresses) > 1 and address == ANY6:
                        continue  # the host has no IPv6
                    raise InvalidArgument(
                        f"cannot bind {address}:{port}/{request.proto}: {error.strerror}"
                    ) from error
                held.append(each)
                self._held[_key(binding)] = each
        except BaseException:
            self._release(held)
            raise
        return held

    def _check(self, binding: PortBinding) -> None:
        """Refuse what the kernel would let pass: it knows no SCTP sockets everywhere."""
        for proto, address, port in self._held:
            if (proto, port) != (binding.proto, binding.host_port):
                continue
            same_family = (":" in address) == (":" in binding.host_ip)
            either_any = {address, binding.host_ip} & {ANY4, ANY6}
            if same_family and (either_any or address == binding.host_ip):
                raise _allocated(binding)

    def _candidates(self, request: PortRequest) -> list[int]:
        if request.host_port:
            return list(range(request.host_port, (request.host_port_end or request.host_port) + 1))
        low, high = ephemeral_range()
        start = self._next if low <= self._next <= high else low
        ports = [*range(start, high + 1), *range(low, start)]
        self._next = start + 1
        return ports


def ephemeral_range() -> tuple[int, int]:
    """The ports chosen from when none is named: the kernel's ephemeral ones."""
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(low), int(high)


def _freedom(request: PortRequest) -> int:
    if not request.host_port:
        return 1 << 17
    return max(0, request.host_port_end - request.host_port)


def _key(binding: PortBinding) -> tuple[str, str, int]:
    return binding.proto, binding.host_ip, binding.host_port


def _allocated(binding: PortBinding) -> PortAllocated:
    address = f"[{binding.host_ip}]" if ":" in binding.host_ip else binding.host_ip
    return PortAllocated(
        f"Bind for {address}:{binding.host_port} failed: port is already allocated",
        hint="publish another host port, or stop what holds this one",
    )


def _bind(binding: PortBinding) -> HeldPort:
    """Bind for real.

    Raises:
        PortAllocated: somebody has it.
        OSError: the address or its family is not the host's.
    """
    family = socket.AF_INET6 if ":" in binding.host_ip else socket.AF_INET
    kind = socket.SOCK_DGRAM if binding.proto == "udp" else socket.SOCK_STREAM
    protocol = socket.IPPROTO_SCTP if binding.proto == "sctp" else 0
    try:
        bound = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    except OSError as error:
        if binding.proto == "sctp" and error.errno in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT):
            return HeldPort(binding, None)
        raise
    try:
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if binding.proto == "tcp":
            # connections that are over do not count, a listener does
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((binding.host_ip, binding.host_port))
        if kind == socket.SOCK_STREAM:
            bound.listen(128)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise _allocated(binding) from error
        raise
    return HeldPort(binding, bound)

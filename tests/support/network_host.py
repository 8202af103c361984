"""A daemon's networks in a namespace of their own, with containers that are sandboxes."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from lazarette.runtime.events import Event, EventBus
from lazarette.runtime.networks.etcd import ClusterConfig
from lazarette.runtime.networks.manager import NetworkManager
from lazarette.runtime.networks.model import EndpointRequest, PortBinding, PortRequest
from lazarette.runtime.networks.namespaces import NetNamespace
from lazarette.storage.clock import SystemClock
from lazarette.storage.state import State

_numbers = itertools.count()


class NetworkHost:
    """A network manager made in the calling thread's namespace.

    Args:
        folder: for its state.
        bridge: its default bridge.
        cluster: how it takes part in networks over several hosts.
    """

    def __init__(
        self, folder: Path, bridge: str = "lazt0", cluster: ClusterConfig | None = None
    ) -> None:
        self.cluster = cluster
        self.folder = folder
        self.bridge = bridge
        folder.mkdir(parents=True, exist_ok=True)
        self.loop = asyncio.new_event_loop()
        self.seen: list[Event] = []
        self._open(())

    def _open(self, active: Sequence[str]) -> None:
        clock = SystemClock()
        bus = EventBus(clock, self.loop)
        bus.on_event(self.seen.append)
        self.state = State(self.folder / "state.db")
        self.manager = NetworkManager(
            self.state, self.folder / "exec", self.bridge, bus, clock, self.cluster
        )
        self.manager.recover(set(active))

    def start(
        self,
        name: str,
        *networks: str | EndpointRequest,
        ports: Sequence[PortRequest] = (),
    ) -> Container:
        """A container on those networks (the default one if none is named)."""
        id_ = hashlib.sha256(f"{name}{next(_numbers)}".encode()).hexdigest()
        path = self.manager.create_sandbox(id_)
        requests = [
            EndpointRequest(network=each, name=name) if isinstance(each, str) else each
            for each in networks or ("bridge",)
        ]
        try:
            self.manager.attach(id_, requests)
            bindings = self.manager.publish(id_, ports)
        except BaseException:
            self.manager.teardown(id_)
            raise
        return Container(self, id_, path, bindings)

    def restart(self, *active: Container) -> None:
        """The daemon ends and starts again; these containers ran on."""
        self.stop_daemon()
        self.start_daemon(*active)

    def stop_daemon(self) -> None:
        """The daemon ends; containers run on."""
        self._namespace = NetNamespace(os.dup(self.manager.host.descriptor))
        self.manager.close()
        self.state.close()

    def start_daemon(self, *active: Container) -> None:
        """It starts again; these containers ran on."""
        with self._namespace, self._namespace.entered():
            self._open([container.id for container in active])

    def events(self) -> list[Event]:
        """What was told so far."""
        self.loop.run_until_complete(asyncio.sleep(0.01))
        return self.seen

    def close(self) -> None:
        """Tear everything down, as a host that ends would."""
        with self.manager.lock:
            running = self.manager.containers()
        for container in running:
            self.manager.teardown(container)
        self.manager.close()
        self.state.close()
        self.loop.close()


class Container:
    """A running container as far as networks go."""

    def __init__(
        self, host: NetworkHost, id_: str, path: Path, bindings: Sequence[PortBinding]
    ) -> None:
        self.host = host
        self.id = id_
        self.path = path
        self.bindings = bindings

    @property
    def ip(self) -> str:
        """Its first IPv4 address."""
        return self.host.manager.of_container(self.id)[0].ip

    @property
    def ipv6(self) -> str:
        """Its first IPv6 address."""
        return self.host.manager.of_container(self.id)[0].ipv6

    def stop(self) -> None:
        """It ends."""
        self.host.manager.teardown(self.id)
